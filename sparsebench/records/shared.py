"""What runs of one machine share instead of computing it again: results of the dense model, tokenised text.

An entry lies in the program's cache (cache.py) under a hash of everything that decides it, and says which run made it.
It is a state (state.py) with its own SHA-256: a damaged one is made again. One process makes an entry, others that need
it wait. Values that a file of numbers and JSON can't hold are not shared. `share=false` turns all of it off.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock

from sparsebench import cache, ranks
from sparsebench.config.identity import digest, package
from sparsebench.records import machine
from sparsebench.records.state import Damaged, State, load, write

log = logging.getLogger(__name__)
T = TypeVar("T")
MOST_BYTES = 1 << 30  # of all entries; those that were not used for longest go first [choice]


class Sharing:
    """What the run of this process shares: nothing until it says so."""

    run: str | None = None  # its hash


def begin(run: str | None) -> None:
    """Share from here on as the run of this hash; without one share nothing. Several processes of one run share nothing."""
    Sharing.run = (run or None) if ranks.count() == 1 else None


def place(kind: str, parts: Any) -> Path:
    """Where an entry lies. parts: what decides it beside versions and this package's source, JSON-ready."""
    key = digest({"parts": parts, "versions": machine.versions(), "package": package()})
    return cache.folder() / "shared" / f"{kind}-{key[:32]}.safetensors"


@contextmanager
def held(kind: str, parts: Callable[[], Any]) -> Iterator[Path | None]:
    """The place of an entry, locked against other processes; None where this run shares nothing.

    parts: what decides the entry, asked for only where it is shared.
    """
    if Sharing.run is None:
        yield None
        return
    path = place(kind, parts())
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock"), mode=ranks.MODE):
        yield path


def shared(kind: str, parts: Callable[[], Any], make: Callable[[], T]) -> tuple[T, str | None]:
    """(what an earlier run kept of this, that run's hash), or (what `make` returns, None), kept for later ones."""
    with held(kind, parts) as path:
        entry = read(path) if path else None
        if entry is not None:
            return entry
        value = make()
        if path:
            keep(path, value)
    return value, None


def read(path: Path) -> tuple[Any, str] | None:
    """(the value at `path`, the hash of the run that made it); None where there is none, or it is damaged."""
    try:
        state, _, name = load(path)
        if name != path.stem:
            raise Damaged(f"it is that of {name or 'nothing'}")
        value = decoded(state.info["value"], state.tensors)
        path.touch()  # used now
    except FileNotFoundError:
        return None
    except (Damaged, KeyError, TypeError, ValueError, AttributeError, ImportError) as error:
        log.warning("shared result %s is damaged (%s): it is made again", path.name, error)
        return None
    except OSError as error:
        log.debug("shared result %s: %s", path.name, error)
        return None
    return value, state.info["run"]


def keep(path: Path, value: Any) -> None:
    """Write an entry, and make room; where that can't be, later runs compute it themselves."""
    state = State()
    try:
        content = encoded(value, state.tensors)
        state.info = {"value": content, "run": Sharing.run}
        path.parent.mkdir(parents=True, exist_ok=True)
        write(state, path)
        trim(path.parent, MOST_BYTES)
    except (OSError, TypeError) as error:
        log.debug("%s is not shared: %s", path.name, error)


def trim(folder: Path, most: int) -> None:
    """Remove the entries that were not used for longest, until all together are below `most` bytes."""
    files = sorted(((p.stat().st_mtime, p.stat().st_size, p) for p in folder.glob("*.safetensors")), reverse=True)
    total = 0
    for _, size, path in files:
        total += size
        if total > most:
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Values as JSON and tensors


def encoded(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON of plain values, containers and this package's own objects; arrays go to `tensors`. Raises TypeError else."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, np.generic):
        return encoded(value.item(), tensors)
    if isinstance(value, float):
        return value if math.isfinite(value) else {"!": "float", "of": repr(value)}
    if isinstance(value, list):
        return [encoded(each, tensors) for each in value]
    if isinstance(value, tuple):
        return {"!": "tuple", "of": [encoded(each, tensors) for each in value]}
    if isinstance(value, dict):
        if "!" not in value and all(isinstance(key, str) for key in value):
            return {key: encoded(each, tensors) for key, each in value.items()}
        return {"!": "dict", "of": [[encoded(k, tensors), encoded(v, tensors)] for k, v in value.items()]}
    if isinstance(value, (np.ndarray, torch.Tensor)):
        name, array = str(len(tensors)), isinstance(value, np.ndarray)
        tensors[name] = torch.as_tensor(value).detach().cpu().clone()
        return {"!": "array" if array else "tensor", "of": name}
    kind = type(value)
    if not own(kind) or not hasattr(value, "__dict__"):
        raise TypeError(f"{kind.__name__} can't be kept")
    fields = {name: encoded(each, tensors) for name, each in vars(value).items()}
    return {"!": "object", "of": [kind.__module__, kind.__qualname__], "fields": fields}


def own(kind: type) -> bool:
    """Whether a class is of this package and holds nothing but its attributes."""
    simple = dataclasses.is_dataclass(kind) or kind.__bases__ == (object,)
    return simple and kind.__module__.partition(".")[0] == __name__.partition(".")[0]


def decoded(content: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """What `encoded` was given. Raises an error of its parts where the content is not of that form."""
    if isinstance(content, list):
        return [decoded(each, tensors) for each in content]
    if not isinstance(content, dict):
        return content
    if "!" not in content:
        return {key: decoded(each, tensors) for key, each in content.items()}
    tag, inner = content["!"], content["of"]
    if tag == "float":
        return float(inner)
    if tag == "tuple":
        return tuple(decoded(each, tensors) for each in inner)
    if tag == "dict":
        return {decoded(k, tensors): decoded(v, tensors) for k, v in inner}
    if tag in ("array", "tensor"):
        return tensors[inner].numpy() if tag == "array" else tensors[inner]
    module, name = inner
    if module.partition(".")[0] != __name__.partition(".")[0]:
        raise ValueError(f"{module}.{name} is not of this package")
    kind = getattr(importlib.import_module(module), name)
    if not own(kind):
        raise ValueError(f"{module}.{name} is nothing that is kept")
    value = object.__new__(kind)
    vars(value).update({key: decoded(each, tensors) for key, each in content["fields"].items()})
    return value
