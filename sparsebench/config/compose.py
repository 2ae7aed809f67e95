"""From the command line to configurations as plain Python: Hydra's composition, everything unknown named at once.

Nothing here imports torch or the classes that `_target_` names.
"""

from __future__ import annotations

import copy
import difflib
import functools
import itertools
import math
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sparsebench.config import early, option_files
from sparsebench.config.fields import ConfigError, unknown_key

CONFIG_MODULE = "sparsebench.conf"
GROUPS = ("dataset", "model", "method", "hardware", "experiment")
MOST_RUNS = 10_000  # of one sweep: more is a slip, such as range(0,1000000000), and composing them takes minutes
PLUGINS = {  # Hydra's groups whose options come with packages of their own: option -> what pip installs it by
    "hydra/launcher": {
        **dict.fromkeys(("joblib", "submitit_local", "submitit_slurm"), "'sparsebench[launchers]'"),
        **dict.fromkeys(("ray", "ray_aws"), "'sparsebench[ray]'"), "rq": "hydra-rq-launcher",
    },
    "hydra/sweeper": {"optuna": "'sparsebench[sweep]'", "ax": "hydra-ax-sweeper", "nevergrad": "hydra-nevergrad-sweeper"},
}  # fmt: skip


def to_dict(config: DictConfig) -> dict[str, Any]:
    """The composed configuration as plain Python (interpolations resolved), without what is no setting of the run.

    That is Hydra's own node, and the published claim that an experiment of conf/experiment/claims tests.
    """
    with open_dict(config):
        config = config.copy()
        for key in ("hydra", "experiment", "claim"):
            config.pop(key, None)
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    model = plain.get("model")
    if isinstance(model, dict) and model.get("name", "") is None:
        model["name"] = name_of(str(model.get("path") or ""))
    return plain


def name_of(path: str) -> str:
    """A model's name from its folder, file or Hub id: the last part, of a Hub's cache the repository's, as a name may be."""
    parts = [part for part in os.path.abspath(path).split(os.sep) if part and path]
    if "snapshots" in parts[-2:-1] and parts[-3].startswith("models--"):
        parts = parts[-3].split("--")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", parts[-1] if parts else "").lstrip("._-")
    return name.removesuffix(".gguf") or "model"


@dataclass(frozen=True)
class Plan:
    """What a command line asks for.

    overrides: what each configuration was made by, one choice of every swept key.
    partial: overrides (as typed) of keys that only some of the swept options have; they apply where the key exists.
    """

    configurations: list[dict[str, Any]]
    overrides: list[list[str]]
    partial: frozenset[str]


def compose_all(
    overrides: list[str], sweep: bool = False, config_dir: str | None = None, name: str = "config"
) -> list[dict[str, Any]]:
    """Every configuration that the command-line `overrides` describe: one, or with `sweep` one per combination.

    Raises ConfigError naming every unknown option of a group, unknown key and unreadable override at once.
    """
    return plan(overrides, sweep, config_dir, name).configurations


def plan(overrides: list[str], sweep: bool = False, config_dir: str | None = None, name: str = "config") -> Plan:
    """As `compose_all`, with what the command has to know about the overrides. name: the primary YAML of conf/."""
    if config_dir is not None and not os.path.isdir(config_dir):
        raise ConfigError([f"--config-dir must be an existing folder, got {config_dir!r}"])
    try:
        return planned(overrides, sweep, config_dir, name)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # Hydra's own words, as on a file that an option names in turn
        raise ConfigError([f"the options can't be read: {' '.join(str(error).split())}"]) from error
    except RecursionError:
        raise ConfigError(["the defaults of an option lead back to itself"]) from None


def planned(overrides: list[str], sweep: bool, config_dir: str | None, name: str) -> Plan:
    """As `plan`, where options and their files are what they should be."""
    problems: list[str] = []
    composed.cache_clear()
    GlobalHydra.instance().clear()
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        if config_dir:
            search_first(config_dir)
        parsed = parse(overrides, problems)
        parsed += swept_by_experiment(parsed) if sweep else []
        other = any(o.key_or_group in ("hydra/sweeper", "experiment") for o in parsed)
        choices = [alternatives(override, sweep, problems, other) for override in parsed]
        problems += unknown_options(parsed, choices)
        if config_dir:
            problems += broken_options(config_dir, [each for options in choices for each in options])
        if math.prod(map(len, choices)) > MOST_RUNS:
            problems.append(
                f"a sweep must be of at most {MOST_RUNS:,} runs, got {math.prod(map(len, choices)):,} or more"
            )
        if problems:
            raise ConfigError(problems)
        groups = [c for o, c in zip(parsed, choices, strict=True) if is_group(o)]
        values = [o for o in parsed if not is_group(o)]
        typed = set(overrides)
        unknown = [unknown_keys(list(combination), values, name) for combination in itertools.product(*groups)]
        nowhere = set.intersection(*map(set, unknown)) | {
            line for each in unknown for line in each if line not in typed
        }
        if nowhere:
            problems += [line for key, line in merged(unknown).items() if key in nowhere]
            known = [c[0] for o, c in zip(parsed, choices, strict=True) if o.input_line not in nowhere]
            with suppress(HydraException, OmegaConfBaseException):  # what else is wrong, as if those were not given
                problems += early.wrong_values(to_dict(compose(name, overrides=known)), early.SETTINGS[name])
            raise ConfigError(problems)
        try:
            made = list(combinations(parsed, choices, unknown, name))
            return Plan([each for each, _ in made], [used for _, used in made], frozenset(merged(unknown)))
        except (HydraException, OmegaConfBaseException) as error:
            reason = f" ({str(error.__cause__).splitlines()[0]})" if str(error.__cause__ or "") else ""
            raise ConfigError([" ".join(f"{error}{reason}".split())]) from error


def merged(unknown: list[dict[str, str]]) -> dict[str, str]:
    """All of them in one."""
    return {key: line for each in unknown for key, line in each.items()}


def combinations(
    parsed: list[Override], choices: list[list[str]], unknown: list[dict[str, str]], name: str
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """The configuration and overrides of every combination, each without those of keys that it does not have.

    unknown: of each combination of the groups alone, in the order of their product.
    """
    groups = [i for i, override in enumerate(parsed) if is_group(override)]
    absent = dict(zip(itertools.product(*(choices[i] for i in groups)), unknown, strict=True))
    parser = OverridesParser.create()
    for combination in itertools.product(*choices):
        dropped = absent[tuple(combination[i] for i in groups)]
        used = [(o, c) for o, c in zip(parsed, combination, strict=True) if o.input_line not in dropped]
        config = copy.deepcopy(composed(name, tuple(c for o, c in used if is_group(o) or is_hydras(o))))
        values = parser.parse_overrides([c for o, c in used if not is_group(o) and not is_hydras(o)])
        ConfigLoaderImpl._apply_overrides_to_config(values, config)  # as Hydra's own composition ends
        yield to_dict(config), [c for _, c in used]


@functools.lru_cache(maxsize=64)
def composed(name: str, groups: tuple[str, ...]) -> DictConfig:
    """The configuration of some options, before any value is overridden; `plan` forgets them when it begins."""
    return compose(name, overrides=list(groups))


def is_hydras(override: Override) -> bool:
    return override.key_or_group.split(".")[0].split("/")[0] == "hydra"


def parse(overrides: list[str], problems: list[str]) -> list[Override]:
    """The overrides that can be read; a line in `problems` about each that can't, with the right spelling."""
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    readable: list[Override] = []
    for before, text, after in zip(["", *overrides], overrides, [*overrides[1:], ""], strict=False):
        try:
            (override,) = parser.parse_overrides([text])
        except HydraException:
            apart = after.startswith("=")
            problems.append(f"'{text} {after}': no blank stands before '='" if apart else unreadable(text, parser))
            continue
        if override.is_delete() and not is_hydras(override):
            problems.append(f"{text!r}: no key can be left out; see sparsebench --explain {key_of(text)}")
        elif is_group(override) and "@" in text.partition("=")[0]:
            group, _, option = text.lstrip("+").partition("=")
            problems.append(f"{text!r}: every group has its one place here: {group.partition('@')[0]}={option}")
        elif (override.is_add() or override.is_force_add()) and is_group(override):
            problems.append(f"{text!r}: a group is chosen without '+': {text.lstrip('+')}")
        elif not override.key_or_group:
            problems += [] if "=" not in before and before else [unreadable(text, parser)]
        elif override.key_or_group == "hydra":
            problems.append(f"{text!r}: hydra is no setting, it holds Hydra's own: hydra.<key>=<value>")
        else:
            readable.append(override)
    return readable


def key_of(text: str) -> str:
    return text.lstrip("~+").partition("=")[0]


def unreadable(text: str, parser: OverridesParser) -> str:
    """The line about an override that can't be read: how its value is quoted where that is all it lacks."""
    key, given, value = text.partition("=")
    if value.startswith("~"):
        return (
            f"{text!r} can't be read: the shell puts a home for ~ at the beginning of a word only: write {key}=$HOME..."
        )
    quoted = key + '="' + value.replace('"', '\\"') + '"'
    with suppress(HydraException):
        if given and value and key:
            parser.parse_overrides([quoted])
            return f"{text!r} can't be read: quote the value, for Hydra and for the shell: {shlex.quote(quoted)}"
    return f"{text!r} can't be read: overrides look like key=value or key=value1,value2 with -m"


def swept_by_experiment(parsed: list[Override]) -> list[Override]:
    """The axes that the chosen experiment sweeps by itself (hydra.sweeper.params) and the command line leaves alone."""
    known = options_of("experiment")
    chosen = [o for o in parsed if o.key_or_group == "experiment" and not o.is_sweep_override() and o.value() in known]
    try:
        params = compose(
            "config", overrides=[as_given(o) for o in chosen], return_hydra_config=True
        ).hydra.sweeper.params
    except (HydraException, OmegaConfBaseException):
        return []  # said with the other problems
    named = {o.key_or_group for o in parsed}
    texts = [f"{key}={value}" for key, value in (params or {}).items() if key not in named]
    return OverridesParser.create().parse_overrides(texts)


def as_given(override: Override) -> str:
    """An override as the command line has it."""
    return str(override.input_line)


def search_first(folder: str) -> None:
    """Let options of groups be found in `folder`, too, as Hydra's --config-dir does."""
    loader: Any = GlobalHydra.instance().config_loader()
    path = loader.get_search_path()
    path.prepend("command-line", f"file://{Path(folder).resolve()}", SearchPathQuery(provider="schema"))
    loader.repository.initialize_sources(path)


def is_group(override: Override) -> bool:
    return "@" in as_given(override).partition("=")[0] or override.key_or_group in GROUPS


def alternatives(override: Override, sweep: bool, problems: list[str], sweeper_chosen: bool = False) -> list[str]:
    """The single-run forms of one override. An interval (a sweeper's own) is represented by its lower end."""
    if not override.is_sweep_override():
        return [as_given(override)]
    if not sweep:
        line = f"{as_given(override)!r} lists several values: add -m to sweep over them"
        key, _, text = as_given(override).partition("=")
        if "/" in text:  # a path with a comma
            quoted = f'{key}="{text}"'
            line += f", or quote what is one value: {shlex.quote(quoted)}"
        problems.append(line)
        return []
    key = override.get_key_element()
    value = override.value()
    if isinstance(value, IntervalSweep):
        if not sweeper_chosen:
            problems.append(f"{as_given(override)!r} is for a sweeper that searches: add hydra/sweeper=optuna")
        return [f"{key}={value.start}"]
    if isinstance(value, RangeSweep) and value.step == 0:
        problems.append(f"{as_given(override)!r} never ends: its step is 0")
        return []
    values = list(itertools.islice(override.sweep_string_iterator(), MOST_RUNS + 1))
    if not values:
        allowed = "its range is empty"
        if isinstance(value, Glob):
            allowed = (
                allowed_options(override.key_or_group) if is_group(override) else f"glob() is for {', '.join(GROUPS)}"
            )
        problems.append(f"{as_given(override)!r} matches nothing: {allowed}")
    return [f"{key}={value}" for value in values]


def options_of(group: str) -> list[str]:
    """All options of a group, those in folders as folder/name."""
    loader = GlobalHydra.instance().config_loader()
    inner = loader.get_group_options(group, ObjectType.GROUP)
    names = loader.get_group_options(group, ObjectType.CONFIG)
    return sorted(names) + [f"{folder}/{name}" for folder in sorted(inner) for name in options_of(f"{group}/{folder}")]


def allowed_options(group: str) -> str:
    return f"{group} must be one of {', '.join(options_of(group))}"


def unknown_options(parsed: list[Override], choices: list[list[str]]) -> list[str]:
    """Lines about options that their group does not have, and about plugins of Hydra that are not installed."""
    problems = []
    for override, options in zip(parsed, choices, strict=True):
        group = override.key_or_group.split("@")[0]
        if not is_group(override) and not group.startswith("hydra/"):
            continue
        known = options_of(group)
        for option in options:
            name = option.partition("=")[2].strip("\"'")
            if name in known:
                continue
            package = PLUGINS.get(group, {}).get(name)
            if package:
                problems.append(f"{group}={name} is not installed: pip install {package}")
                continue
            leaves = {each.rpartition("/")[2]: each for each in reversed(known)}
            like = name.lower().removesuffix(".yaml")
            near = difflib.get_close_matches(like, known, n=1) or [
                leaves[each] for each in difflib.get_close_matches(like.rpartition("/")[2], list(leaves), n=1)
            ]
            hint = f" (did you mean {near[0]}?)" if near else ""
            problems.append(f"{allowed_options(group)}{hint}, got {name!r}")
    return problems


def broken_options(folder: str, chosen: list[str]) -> list[str]:
    """Lines about chosen options of a user's own folder whose file can't be read."""
    files = {Path(folder, *each.partition("=")[::2]).with_suffix(".yaml") for each in chosen if "=" in each}
    return [line for file in sorted(files) if file.is_file() and (line := option_files.problem(file))]


def unknown_keys(groups: list[str], values: list[Override], name: str = "config") -> dict[str, str]:
    """override -> the line about its key, for keys that the configuration chosen by `groups` does not have."""
    try:
        config = to_dict(composed(name, tuple(groups)))
    except (HydraException, OmegaConfBaseException) as error:
        return {"": " ".join(str(error).split())}
    problems = {}
    for override in values:
        key = override.key_or_group
        if override.is_add() or override.is_delete() or is_hydras(override):
            continue
        node: Any = config
        parts = key.split(".")
        for depth, part in enumerate(parts):
            if not isinstance(node, dict) or part not in node:
                allowed = node if isinstance(node, dict) else ()
                full = ".".join(parts[: depth + 1])
                problems[as_given(override)] = unknown_key(full, [k for k in allowed if k != "_target_"], config, key)
                break
            node = node[part]
    return problems
