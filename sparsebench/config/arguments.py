"""The options of the commands beside overrides: --help, --version, --explain, and what is wrong with them in one line.

No torch: each of these answers at once.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from sparsebench import __version__
from sparsebench.config import explain
from sparsebench.config.fields import ConfigError

COMMANDS = {
    "sparsebench": "one run, or with -m a sweep: quality, sparsity, MACs, bytes and wall clock, dense beside sparse",
    "sparsebench-bench": "kernels and decode steps of one model's shapes, timed with random weights",
    "sparsebench-report": "many records on one page: sparsebench-report outputs",
}
HEAD = {
    "sparsebench": """\
sparsebench - activation sparsity, measured - one run joins quality, sparsity, MACs, bytes and wall clock

  sparsebench                                     # TEAL on the built-in model and data
  sparsebench method=teal model=llama2-7b         # any group can be chosen by name
  sparsebench -m method.sparsity=0.25,0.5,0.65    # a sweep; finished runs are not repeated
""",
    "sparsebench-bench": """\
sparsebench-bench - what sparsity does to the clock, for the shapes of one model with random weights

Times each projection, the FFN block and the whole decode step, dense and sparse in one process, in turn. Inputs are
made sparse exactly; weights rotate over copies past the last cache, so that they come from memory. Writes a record,
a table and a plot into `output`.

  sparsebench-bench model=llama2-7b hardware=h100
  sparsebench-bench model=llama-tiny hardware=cpu parts=[projections] sparsities=[0.5,0.9]
""",
}
TAIL = """\
sparsebench --explain KEY   what a key means, its default and allowed values: --explain method.sparsity
sparsebench --explain GROUP=OPTION   all keys of one option: --explain method=teal
sparsebench --cfg job       the resolved configuration; --info searchpath, --hydra-help: Hydra's own
"""
PRIMARY = {"sparsebench": "config", "sparsebench-bench": "bench"}


def parser(command: str) -> argparse.ArgumentParser:
    """Hydra's own options, with this program's version, `--explain`, and errors as ConfigError."""
    arguments = get_args_parser()
    arguments.prog = command
    version = next(action for action in arguments._actions if action.dest == "version")
    setattr(version, "version", f"{command} {__version__}")  # noqa: B010  (argparse types it nowhere)
    arguments.add_argument("--explain", metavar="KEY")

    def error(message: str) -> NoReturn:
        raise ConfigError([f"{message} (see {command} --help)"])

    setattr(arguments, "error", error)  # noqa: B010
    return arguments


def read(command: str, given: list[str]) -> argparse.Namespace:
    """The arguments of a command; --help, --version and --explain are answered here and end the process.

    given: brought into the order that argparse can read (key=value, then options) where it is another.

    Raises ConfigError for what is no option, with the right spelling of a key given with dashes.
    """
    refuse_other_spellings(given)
    arguments, unknown = parser(command).parse_known_args(given)
    beyond = [
        text for text in unknown if "=" in text and not text.startswith("-")
    ]  # behind an option that follows others
    if beyond:
        first = [*arguments.overrides, *beyond]
        given[:] = [*first, *(text for text in given if text not in first)]  # as Hydra's parser needs them, too
        arguments, unknown = parser(command).parse_known_args(given)
    problems = [f"{text!r} is no option: {hint_for(text, command)}" for text in unknown]
    for option in ("config_name", "config_path"):
        if getattr(arguments, option) is not None:
            problems.append(
                f"--{option.replace('_', '-')} is not for this command, whose keys are fixed: options of one's own lie in "
                "the folders of --config-dir"
            )
    if problems:
        raise ConfigError(problems)
    if arguments.help:
        print(overview(command, arguments.overrides))
        sys.exit(0)
    if arguments.explain is not None:
        print(explained(arguments.explain))
        sys.exit(0)
    return arguments


def refuse_other_spellings(given: list[str]) -> None:
    """Raise ConfigError for a key behind one dash, of which argparse would take the first letter for an option."""
    wrong = [text for text in given if re.match(r"-\w[\w.]*=", text)]
    if wrong:
        raise ConfigError([f"{text!r} is no option: {hint_for(text, '')}" for text in wrong])


def hint_for(text: str, command: str) -> str:
    key = text.lstrip("-")
    return f"keys are given without dashes: {key}" if "=" in key else f"see {command} --help"


def overview(command: str, overrides: list[str]) -> str:
    """What --help prints: the commands, the groups with their options, every key of the chosen options."""
    primary = PRIMARY[command]
    known = explain.entries()
    chosen = explain.chosen(primary) | dict(o.split("=", 1) for o in overrides if o.count("=") == 1)
    parts = [HEAD[command], "== Commands =="]
    parts += [f"  {name:20}{text}" for name, text in COMMANDS.items()]
    groups = [g for g in (*explain.GROUPS, "experiment") if g in chosen or (primary == "config" and g == "experiment")]
    options = {group: {o.name: o for o in explain.options(group)} for group in groups}
    parts += ["", "== Groups: choose an option by group=option =="]
    parts += [wrapped(f"  {group + ':':12}", ", ".join(options[group])) for group in groups]
    parts += ["", "== Keys: override any as key=value =="]
    parts += [line(e) for e in known if e.group == ("bench" if primary == "bench" else "")]
    for group in groups:
        option = options[group].get(chosen.get(group, ""))
        mine = [e for e in known if option is not None and (e.group, e.option) == (group, option.name)]
        parts += ["", f"-- {group}={option.name}: {option.about}"] + [line(e) for e in mine] if option else []
    return "\n".join([*parts, "", TAIL])


def line(entry: explain.Entry) -> str:
    """A key with its default and meaning, wrapped."""
    name = f"{entry.key}:" if isinstance(entry.default, dict) else f"{entry.key}={shown(entry.default)}"
    return wrapped(f"  {name:38} ", entry.meaning)


def wrapped(label: str, text: str) -> str:
    indent = " " * (min(len(label), 41))
    return textwrap.fill(text or " ", 120, initial_indent=label, subsequent_indent=indent).rstrip()


def shown(value: object) -> str:
    """A default as it is typed."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "[" + ",".join(map(shown, value)) + "]" if isinstance(value, list) else str(value)


def explained(query: str) -> str:
    """What --explain prints about a key (whole, or its end) or an option. ConfigError where there is none such."""
    entries = explain.matching(query)
    if not entries:
        near = explain.nearest(query)
        hint = f" (did you mean {near}?)" if near else ""
        raise ConfigError([f"{query} is not a known key or option{hint}; sparsebench --help lists them"])
    if "=" in query:
        group, _, name = query.partition("=")
        about = next(o.about for o in explain.options(group) if o.name == name)
        return "\n".join([f"{query}: {about}", *(line(e) for e in entries)])
    parts: list[str] = []
    for key in dict.fromkeys(e.key for e in entries):
        alike: dict[tuple[str, str, str], list[str]] = {}
        for entry in (e for e in entries if e.key == key):
            words = ". Here: ".join(filter(None, (entry.meaning, entry.note)))
            default = "" if isinstance(entry.default, dict) else shown(entry.default)
            where = f"{entry.group}={entry.option}" if entry.option else entry.group
            alike.setdefault((words, default, explain.allowed(entry)), []).append(where)
        parts.append(key)
        for (words, default, values), places in alike.items():
            parts.append(wrapped("  ", words))
            parts += [f"    default: {default}"] if default else []
            parts += [wrapped("    allowed: ", values)] if values else []
            parts += [wrapped("    in: ", ", ".join(places))] if any(places) else []
    below = [
        e for e in explain.find(entries[0].key, False) if e.option == entries[0].option and e.key != entries[0].key
    ]
    return "\n".join(parts + [line(e) for e in below])
