"""Memory of weights, and peaks: of one call on a GPU, of the whole process on a CPU."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

import torch
from torch import nn


def weight_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*module.parameters(), *module.buffers()]
    }
    return sum(storages.values())


def peak_bytes(device: torch.device) -> int:
    """Most memory in use so far: of the device on CUDA, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def restart_peak(device: torch.device) -> int:
    """`peak_bytes` up to here; on CUDA it is counted anew from here on (a process's on a CPU can't be)."""
    before = peak_bytes(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return before


def peaks(
    modules: dict[str, nn.Module], calls: dict[str, Callable[[int], object]], device: torch.device
) -> tuple[dict[str, int], int]:
    """(bytes that each model's call needs by name, most bytes of the device in use on the way); ({}, 0) on a CPU.

    A model needs its own weights and what its call allocates on top; other models that lie in memory are left out. A
    CPU's only peak is that of the process, which is no model's: see `peak_bytes`.
    """
    if device.type != "cuda":
        return {}, 0
    needed, highest = {}, 0
    for name, call in calls.items():
        call(0)  # what is allocated once and kept
        torch.cuda.synchronize()
        highest = max(highest, restart_peak(device))
        resident = torch.cuda.memory_allocated()
        call(0)
        torch.cuda.synchronize()
        highest = max(highest, torch.cuda.max_memory_allocated())
        needed[name] = weight_bytes(modules[name]) + torch.cuda.max_memory_allocated() - resident
    return needed, highest
