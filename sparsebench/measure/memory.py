"""Memory of weights, and peaks: of one call on a GPU, of the whole process on a CPU."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def weight_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*module.parameters(), *module.buffers()]
    }
    return sum(storages.values())


class Most:
    """Most bytes of the device in use, kept where torch's own counter starts anew."""

    run = phase = 0


def peak_bytes(device: torch.device) -> int:
    """Most memory in use so far: of the device on CUDA (all devices together), of the process on a CPU."""
    note(device)
    return Most.run


def note(device: torch.device) -> int:
    """Most memory in use since the last call, on CUDA; a process's on a CPU can't be counted anew."""
    if device.type == "cuda":
        devices = range(torch.cuda.device_count())
        peak = sum(torch.cuda.max_memory_allocated(i) for i in devices)
        for i in devices:
            torch.cuda.reset_peak_memory_stats(i)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    Most.run, Most.phase = max(Most.run, peak), max(Most.phase, peak)
    return peak


def phase_peak(device: torch.device) -> int:
    """Most memory in use since the last call of this function."""
    note(device)
    peak, Most.phase = Most.phase, 0
    return peak


def of_run(device: torch.device, model_bytes: int, cache_bytes: int) -> dict[str, Any]:
    """The record's figures on the peak: how much of it is the dense model with its cache, and how much came on top.

    A process holds Python and its libraries beside the model, so on a CPU the ratio says something of large models only.
    """
    peak = peak_bytes(device)
    return {
        "peak_bytes": peak, "peak_of": "device" if device.type == "cuda" else "process", "cache_bytes": cache_bytes,
        "peak_ratio": peak / (model_bytes + cache_bytes),
    }  # fmt: skip


def restart(device: torch.device) -> None:
    """A new run: its peaks are counted from here."""
    if device.type == "cuda":
        torch.cuda.init()  # before it torch has no counters
    note(device)
    Most.run = Most.phase = 0


def peaks(
    modules: dict[str, nn.Module], calls: dict[str, Callable[[int], object]], device: torch.device
) -> dict[str, int]:
    """Bytes that each model's call needs, by name; {} on a CPU.

    A model needs its own weights and what its call allocates on top; other models that lie in memory are left out. A
    CPU's only peak is that of the process, which is no model's: see `peak_bytes`.
    """
    needed: dict[str, int] = {}
    for name, call in calls.items() if device.type == "cuda" else ():
        call(0)  # what is allocated once and kept
        torch.cuda.synchronize()
        note(device)
        resident = sum(torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count()))
        call(0)
        torch.cuda.synchronize()
        needed[name] = weight_bytes(modules[name]) + note(device) - resident
    return needed
