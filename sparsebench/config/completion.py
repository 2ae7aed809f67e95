"""What Hydra's completion leaves out: options in folders (`experiment=paper/...`) and the values that a key allows."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from sparsebench.config import explain, static
from sparsebench.config.compose import GROUPS, compose_all
from sparsebench.config.fields import ConfigError


def printed(body: Callable[[], object]) -> str:
    """What `body` prints to standard output."""
    text = io.StringIO()
    with redirect_stdout(text):
        body()
    return text.getvalue()


def completed(shell: str, hydras: Callable[[], object]) -> str:
    """The words for the shell's COMP_LINE: those that `hydras` prints and ours, as that shell wants them."""
    words = os.environ.get("COMP_LINE", "").split(" ")[1:]
    own = values(words[-1], [w for w in words[:-1] if w and not w.startswith("-")]) if words else []
    return ("\n" if shell == "fish" else " ").join(sorted({*printed(hydras).split(), *own}))


def values(word: str, before: list[str]) -> list[str]:
    """`key=value` for every value that fits what is typed of it. before: the overrides that stand before it."""
    key, given, _ = word.partition("=")
    if not given:
        return []
    names = option_names(key) if key in GROUPS else allowed(key, before)
    return [f"{key}={name}" for name in names if f"{key}={name}".startswith(word)]


def option_names(group: str) -> list[str]:
    return [option.name for option in explain.options(group)]


def allowed(key: str, before: list[str]) -> list[str]:
    """What may stand behind a key with a list of choices, or behind a switch; nothing where the line so far is wrong."""
    configuration: dict[str, Any] = {}
    with suppress(ConfigError, HydraException, OmegaConfBaseException):
        configuration = compose_all(before)[0]
    group, _, rest = key.partition(".")
    node = configuration.get(group)
    target = str(node["_target_"]) if isinstance(node, dict) and "_target_" in node else None
    fields = static.fields_of(target or explain.CLASSES[""])
    hint, meta = fields.get(rest if target else key, (None, {}))
    if hint is bool:
        return ["false", "true"]
    return ["null" if choice is None else str(choice) for choice in meta.get("choices") or ()]
