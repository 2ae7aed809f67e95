"""Backends: one file each, all with the same functions. `masked_dense` is the meaning, the others are ways to run it.

A file called `cpu_*` or `cuda_*` runs on that device only, any other runs everywhere. It has
    RANK                    larger is preferred when hardware.kernel=auto
    SKIPS                   whether work is really skipped (False = a simulation, so no speed-up may be claimed)
    prepare(threads)        set up thread pools and the like, once per process
    unsupported(...)        the reason why a call can't be served, or None
and the functions `input_sparse_linear`, ... as far as it serves them.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def names() -> list[str]:
    """Backends found in this folder, no registry."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def device_of(name: str) -> str | None:
    """`cpu` or `cuda` for a backend bound to one device, None for one that runs everywhere."""
    prefix = name.partition("_")[0]
    return prefix if prefix in ("cpu", "cuda") else None


_loaded: dict[str, ModuleType] = {}


def load(name: str) -> ModuleType:
    """The backend's module. One that was loaded before is found without an import, so torch.compile can trace through."""
    if name not in _loaded:
        _loaded[name] = importlib.import_module(f"{__name__}.{name}")
    return _loaded[name]


def best(device: str) -> str:
    """The preferred backend for a device type."""
    return max((n for n in names() if device_of(n) in (None, device)), key=lambda n: load(n).RANK)


def serving(function: str, name: str) -> str:
    """Backend `name` if it has `function`, else the preferred one of the same device that has it."""
    if hasattr(load(name), function):
        return name
    able = [n for n in names() if device_of(n) in (None, device_of(name)) and hasattr(load(n), function)]
    return max(able, key=lambda n: load(n).RANK)
