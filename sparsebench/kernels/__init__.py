"""Backends: one file each, all with the same functions. `masked_dense` is the meaning, the others are ways to run it.

A file called `cpu_*` or `cuda_*` runs on that device only, any other runs everywhere. It has
    RANK                    larger is preferred when hardware.kernel=auto
    SKIPS                   whether work is really skipped (False = a simulation, so no speed-up may be claimed)
    prepare(threads)        set up thread pools and the like, once per process
    SELECTS                 whether its input_sparse_linear chooses the largest k itself (`top_k`); absent: it does not
    unsupported(...)        the reason why a call can't be served, or None (unsupported_<function> for one function)
and the functions `input_sparse_linear`, ... as far as it serves them.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import torch


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


_chains: dict[str, tuple[ModuleType, ...]] = {}


def chain(name: str) -> tuple[ModuleType, ...]:
    """A backend and those of lower rank that run beside it, best first; masked_dense ends it and serves everything."""
    if name not in _chains:
        first = load(name)
        others = [load(n) for n in names() if device_of(n) in (None, device_of(name))]
        lower = sorted((b for b in others if b.RANK < first.RANK), key=lambda b: -b.RANK)
        _chains[name] = (first, *lower)
    return _chains[name]


def serving(
    name: str, x: torch.Tensor, weight: torch.Tensor, function: str = "input_sparse_linear", *others: torch.Tensor
) -> ModuleType:
    """The first backend of `chain(name)` that has `function` and serves x [..., n] with weight [m, n].

    `unsupported_<function>` of a backend answers for that function, `unsupported` for those without one of their own.
    others: further weights that it asks for (expert_ffn: the last map).
    """
    for backend in chain(name):
        if not hasattr(backend, function):
            continue
        if getattr(backend, f"unsupported_{function}", backend.unsupported)(x, weight, *others) is None:
            return backend
    raise ValueError(
        f"no kernel serves input {tuple(x.shape)} {x.dtype} with weight {tuple(weight.shape)} {weight.dtype}"
    )


def providing(name: str, function: str) -> ModuleType:
    """The first backend of `chain(name)` that has `function`."""
    return next(backend for backend in chain(name) if hasattr(backend, function))


def ran(
    name: str, weight: torch.Tensor, function: str = "input_sparse_linear", *others: torch.Tensor, rows: int = 1
) -> str:
    """The name of the backend that serves one token, or `rows`."""
    x = torch.empty(1, rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    return name_of(serving(name, x, weight, function, *others))


def name_of(backend: ModuleType) -> str:
    """The name of a backend as `hardware.kernel` and records give it."""
    return backend.__name__.rpartition(".")[2]


def best(device: str) -> str:
    """The preferred backend for a device type."""
    return max((n for n in names() if device_of(n) in (None, device)), key=lambda n: load(n).RANK)
