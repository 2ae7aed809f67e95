"""From the command line to configurations as plain Python: Hydra's composition, everything unknown named at once.

Nothing here imports torch, and the classes named by `_target_` are imported only where the composition was found sound
or to say what else is wrong (config.py).
"""

from __future__ import annotations

import difflib
import itertools
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_module
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sparsebench.config.fields import ConfigError, build, unknown_key
from sparsebench.config.settings import Settings

CONFIG_MODULE = "sparsebench.conf"
GROUPS = ("dataset", "model", "method", "hardware", "experiment")


def to_dict(config: DictConfig) -> dict[str, Any]:
    """The composed configuration as plain Python (interpolations resolved), without Hydra's own node."""
    with open_dict(config):
        config = config.copy()
        config.pop("hydra", None)
        config.pop("experiment", None)
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


def compose_all(overrides: list[str], sweep: bool = False, config_dir: str | None = None) -> list[dict[str, Any]]:
    """Every configuration that the command-line `overrides` describe: one, or with `sweep` one per combination.

    Raises ConfigError naming every unknown option of a group, unknown key and unreadable override at once.
    """
    problems: list[str] = []
    parsed: list[Override] = []
    for text in overrides:
        try:
            parsed += OverridesParser.create().parse_overrides([text])
        except HydraException:
            problems.append(f"{text!r} can't be read: overrides look like key=value or key=value1,value2 with -m")
    if config_dir and not Path(config_dir).is_dir():
        raise ConfigError([f"--config-dir must be an existing folder, got {config_dir!r}"])
    GlobalHydra.instance().clear()
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        if config_dir:
            search_first(config_dir)
        parsed += swept_by_experiment(parsed) if sweep else []
        choices = [alternatives(override, sweep, problems) for override in parsed]
        groups = [c for o, c in zip(parsed, choices, strict=True) if is_group(o)]
        values = [o for o in parsed if not is_group(o)]
        problems += unknown_options(parsed, choices)
        if not problems:
            unknown: dict[str, str] = {}
            for combination in itertools.product(*groups):
                unknown |= unknown_keys(list(combination), values)
            if unknown:  # say what else is wrong, as if the unknown keys had not been given
                known = [c[0] for o, c in zip(parsed, choices, strict=True) if as_given(o) not in unknown]
                problems += unknown.values()
                with suppress(HydraException, OmegaConfBaseException):
                    build(to_dict(compose("config", overrides=known)), "", problems, Settings)
        if problems:
            raise ConfigError(problems)
        try:
            return [to_dict(compose("config", overrides=list(c))) for c in itertools.product(*choices)]
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError([" ".join(str(error).split())]) from error


def swept_by_experiment(parsed: list[Override]) -> list[Override]:
    """The axes that the chosen experiment sweeps by itself (hydra.sweeper.params) and the command line leaves alone."""
    chosen = [o for o in parsed if o.key_or_group == "experiment" and not o.is_sweep_override()]
    try:
        params = compose(
            "config", overrides=[as_given(o) for o in chosen], return_hydra_config=True
        ).hydra.sweeper.params
    except (HydraException, OmegaConfBaseException):
        return []  # an unknown experiment: said with the other problems
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


def alternatives(override: Override, sweep: bool, problems: list[str]) -> list[str]:
    """The single-run forms of one override. An interval (a sweeper's own) is represented by its lower end."""
    if not override.is_sweep_override():
        return [as_given(override)]
    if not sweep:
        problems.append(f"{override.input_line!r} lists several values: add -m to sweep over them")
        return []
    key = override.get_key_element()
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [f"{key}={value.start}"]
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def unknown_options(parsed: list[Override], choices: list[list[str]]) -> list[str]:
    loader = GlobalHydra.instance().config_loader()
    problems = []
    for override, options in zip(parsed, choices, strict=True):
        if not is_group(override):
            continue
        group = override.key_or_group.split("@")[0]
        known = loader.get_group_options(group)
        for option in options:
            name = option.partition("=")[2]
            if name not in known and name not in ("null", "") and not loader.get_group_options(f"{group}/{name}"):
                if "/" in name and name.rpartition("/")[2] in loader.get_group_options(
                    f"{group}/{name.rpartition('/')[0]}"
                ):
                    continue
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                problems.append(f"{group} must be one of {', '.join(sorted(known))}{hint}, got {name!r}")
    return problems


def unknown_keys(groups: list[str], values: list[Override]) -> dict[str, str]:
    """override -> the line about its key, for keys that the configuration chosen by `groups` does not have."""
    try:
        config = to_dict(compose("config", overrides=groups))
    except (HydraException, OmegaConfBaseException) as error:
        return {"": " ".join(str(error).split())}
    problems = {}
    for override in values:
        key = override.key_or_group
        if override.is_add() or override.is_delete() or key.split(".")[0].split("/")[0] == "hydra":
            continue
        node: Any = config
        parts = key.split(".")
        for depth, part in enumerate(parts):
            if not isinstance(node, dict) or part not in node:
                allowed = node if isinstance(node, dict) else ()
                full = ".".join(parts[: depth + 1])
                problems[as_given(override)] = unknown_key(full, [k for k in allowed if k != "_target_"])
                break
            node = node[part]
    return problems
