"""Memory of weights and the peak of a run."""

from __future__ import annotations

import resource
import sys

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
