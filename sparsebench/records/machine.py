"""The machine and its software: what makes a number comparable, read back instead of assumed.

`machine` is torch-free and part of a run's identity; `describe` is the fuller account kept in the record.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from sparsebench import ranks

COMPUTING = (
    "sparsebench", "torch", "torchvision", "transformers", "tokenizers", "accelerate", "safetensors", "datasets",
    "pyarrow", "numpy", "scipy", "scikit-learn", "pillow", "triton", "numba", "llvmlite", "lm-eval", "timm", "gguf",
)  # fmt: skip


@functools.cache
def cpu_name() -> str:
    """The processor's own name, e.g. `AMD EPYC 9654 96-Core Processor`."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """Names of the NVIDIA devices the driver shows, without initialising CUDA (a run forks after this)."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return []
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    names = [pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())]
    pynvml.nvmlShutdown()
    return names


@functools.cache
def versions() -> dict[str, str]:
    """Version of Python and of every installed package that shapes a number."""
    installed = {"python": platform.python_version()}
    for name in COMPUTING:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def cores() -> int:
    """Cores that this process may use (its affinity): as many threads as torch gets where hardware.threads is null."""
    allowed = psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else None
    return len(allowed) if allowed else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Devices, cores, processes of the run, package versions. No torch import."""
    return {
        "cpu": cpu_name(), "gpus": gpu_names(), "cores": cores(), "processes": ranks.count(), "versions": versions(),
    }  # fmt: skip


def git_commit() -> str | None:
    """Commit of the checkout the package runs from, with `+` when files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def describe(device: str) -> dict[str, Any]:
    """Everything about this process that a reader needs to judge its timings."""
    import torch

    account = {
        **machine(),
        "platform": platform.platform(),
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": git_commit(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": list(os.getloadavg()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if device == "cuda":
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        account |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "clock_sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "clock_memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "power_limit_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            "other_processes": max(len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) - 1, 0),
        }
        pynvml.nvmlShutdown()
    return account
