"""What every key means, read from the comments of the YAML files: for `--explain`, `--help` and the documentation.

`entries` reads the YAML alone: no torch, no class is imported. What a key allows is said by the field of its class, which
only `describe` imports.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

import yaml

from sparsebench.config.fields import expected

GROUPS = ("dataset", "model", "method", "hardware", "train", "experiment")
OWN_NODES = {"defaults", "hydra", "_target_"}  # Hydra's, not settings
OWNERS = {  # of the files that name no class themselves
    "config": "sparsebench.config.settings.Settings",
    "bench": "sparsebench.bench.Bench",
    "train": "sparsebench.training.loop.Training",
}
FREE_NODES = {"architecture"}  # passed on as they are: their keys are those of transformers' configuration classes


@dataclass(frozen=True)
class Entry:
    """One key of one option of a group (or of the main configuration), as the YAML file says it.

    A section (`method.greedy`) is an entry, too, its default a dict; so is the option itself (key `method`, option
    `method=teal`), its meaning the comment that heads the file.
    """

    key: str  # as typed on the command line, e.g. method.sparsity
    option: str  # where it exists: method=teal; config (always); bench (sparsebench-bench); experiment=paper/teal
    default: Any
    meaning: str  # "" where no file says it
    allowed: str = ""  # filled by `describe`
    file: str = ""  # below conf/: the file that sets the default


def folder() -> Path:
    """The folder of the YAML files, in a checkout and in a wheel."""
    module = importlib.import_module("sparsebench.conf")
    return Path(next(iter(module.__path__)))


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Every key of config.yaml, bench.yaml and every option of every group, in the order of the files."""
    listed = [*of_file("config"), *of_file("bench")]
    for group in GROUPS:
        for file in sorted((folder() / group).rglob("*.yaml")):
            listed += of_file(file.relative_to(folder()).with_suffix("").as_posix())
    return tuple(filled(listed))


def of_file(name: str) -> list[Entry]:
    """The entries of conf/<name>.yaml, a training block named in its defaults list included."""
    text = (folder() / f"{name}.yaml").read_text(encoding="utf-8")
    group, _, option = name.partition("/")
    label = f"{group}={option}" if option else group
    prefix = "" if group in ("config", "bench", "experiment") else f"{group}."
    content = yaml.safe_load(text) or {}
    by_key: dict[str, Entry] = {}
    for block, source in training_blocks(content.get("defaults") or []).items():
        for entry in of_file(f"train/{source}"):
            if entry.key != "train":
                key = f"{prefix}{block}.{entry.key.partition('.')[2]}"
                by_key[key] = replace(entry, key=key, option=label)
    lines = text.splitlines()
    for key, default, meaning in walk(cast(yaml.MappingNode, yaml.compose(text)), content, lines, prefix):
        before = by_key.get(key)
        by_key[key] = Entry(key, label, default, meaning or (before.meaning if before else ""), file=f"{name}.yaml")
    own = [Entry(group, label, option, heading(lines), file=f"{name}.yaml")] if option else []
    return own + list(by_key.values())


def training_blocks(defaults: list[Any]) -> dict[str, str]:
    """key -> option of conf/train, from `- /train@key: option` of a defaults list."""
    pairs = [pair for each in defaults if isinstance(each, dict) for pair in each.items()]
    return {key.partition("@")[2]: option for key, option in pairs if key.startswith("/train@")}


def walk(
    node: yaml.MappingNode, content: dict[str, Any], lines: list[str], prefix: str
) -> Iterator[tuple[str, Any, str]]:
    """(key, default, meaning) of every key below a mapping."""
    for name, value in node.value:
        key = name.value
        if key in OWN_NODES:
            continue
        section = isinstance(value, yaml.MappingNode)
        yield f"{prefix}{key}", content[key], comment(lines, (name if section else value).end_mark)
        if section and key not in FREE_NODES:
            yield from walk(value, content[key], lines, f"{prefix}{key}.")


def comment(lines: list[str], mark: yaml.Mark) -> str:
    """The comment behind a place in the file, with the lines that go on below it in the same column."""
    rest = lines[mark.line][mark.column :] if mark.line < len(lines) else ""
    if "#" not in rest:
        return ""
    column = mark.column + rest.index("#")
    parts = [rest.partition("#")[2].strip()]
    for line in lines[mark.line + 1 :]:
        if not (line.lstrip().startswith("#") and line.index("#") == column):
            break
        parts.append(line.strip("# "))
    return " ".join(parts)


def heading(lines: list[str]) -> str:
    """The comment that heads a file: what the option is for."""
    parts = []
    for line in lines:
        if line.startswith("# @package"):
            continue
        if not line.startswith("#"):
            break
        parts.append(line.lstrip("# ").rstrip())
    return " ".join(parts)


def filled(listed: list[Entry]) -> Iterator[Entry]:
    """The entries; where a file is silent about a key, with what another option of the same class says about it."""
    said: dict[tuple[str, str], str] = {}
    for entry in listed:
        if entry.meaning:
            said.setdefault((target(entry.option), entry.key), entry.meaning)
    for entry in listed:
        meaning = entry.meaning or said.get((target(entry.option), entry.key), "")
        if not meaning and entry.key.endswith(".name"):
            meaning = "how records, tables and folders call it"
        yield replace(entry, meaning=meaning)


@functools.cache
def target(option: str) -> str:
    """The dotted path of the class that an option names; the option itself where it names none."""
    file = folder() / f"{option.replace('=', '/', 1)}.yaml"
    return (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("_target_") or option


# ---------------------------------------------------------------------------------------------------------------------
# Allowed values: of the classes


def describe(entry: Entry) -> Entry:
    """The entry with what it allows, from the field of its class. Imports the class, and torch with most."""
    where = entry.key.split(".")
    cls = owner(entry)
    if entry.option.partition("=")[0] == where[0] and cls is not None:
        where = where[1:]  # below the group
    while cls is not None and where:
        name, *where = where
        spec = next((f for f in dataclasses.fields(cls) if f.name == name), None)
        if spec is None:
            break
        hint = get_type_hints(cls)[name]
        if not where:
            return replace(entry, allowed=words(hint, spec.metadata))
        cls = next((h for h in options(hint) if dataclasses.is_dataclass(h)), None)
    return entry


def words(hint: Any, meta: Any) -> str:
    """What a field accepts; a section's keys are entries of their own."""
    if any(dataclasses.is_dataclass(h) for h in options(hint)):
        return "a section of keys" + (" or null" if type(None) in options(hint) else "")
    return "any value" if hint is Any else expected(hint, meta)


def options(hint: Any) -> tuple[Any, ...]:
    """The types that a hint allows."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def owner(entry: Entry) -> Any:
    """The dataclass whose fields are the keys of the entry's option; None for an experiment."""
    group = entry.option.partition("=")[0]
    if group == "experiment":
        return None
    module, _, name = OWNERS.get(group, target(entry.option)).rpartition(".")
    return getattr(importlib.import_module(module), name)


# ---------------------------------------------------------------------------------------------------------------------
# Looking one up


def chosen(primary: str) -> dict[str, str]:
    """group -> option that a primary file (config, bench) chooses where the user chooses none."""
    content = yaml.safe_load((folder() / f"{primary}.yaml").read_text(encoding="utf-8"))
    pairs = [pair for each in content["defaults"] if isinstance(each, dict) for pair in each.items()]
    return {group: option for group, option in pairs if group in GROUPS}


def matching(query: str, known: tuple[Entry, ...] | None = None) -> list[Entry]:
    """The entries that a user means by `query`: a whole key, a leaf or the end of a key, or an option (method=teal)."""
    known = entries() if known is None else known
    if "=" in query:
        return [e for e in known if e.option == query]
    whole = [e for e in known if e.key == query]
    ends = [e for e in known if e.key.endswith(f".{query}")]
    return [e for e in whole or ends if not e.option.startswith("experiment=") or e.key == "experiment"]


def nearest(query: str, known: tuple[Entry, ...] | None = None) -> str | None:
    """The key or option nearest to one that does not exist."""
    known = entries() if known is None else known
    names = {e.option for e in known if "=" in e.option} if "=" in query else {e.key for e in known}
    near = difflib.get_close_matches(query, sorted(names), n=1)
    if near or "=" in query:
        return near[0] if near else None
    by_leaf = {e.key.rpartition(".")[2]: e.key for e in reversed(known)}
    near = difflib.get_close_matches(query.rpartition(".")[2], list(by_leaf), n=1)
    return by_leaf[near[0]] if near else None
