"""The machine and its software: what makes a number comparable, read back instead of assumed.

`machine` is torch-free and part of a run's identity; `describe` is the fuller account kept in the record.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
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
    """Names of the NVIDIA devices that torch can use here, in the driver's order, without initialising CUDA (a run forks
    after this) and without torch. None of what CUDA_VISIBLE_DEVICES hides, and none for a torch without CUDA."""
    if not torch_has_cuda():
        return []
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        uuids = [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]
        names = {uuid: pynvml.nvmlDeviceGetName(handle) for uuid, handle in zip(uuids, handles, strict=True)}
        chosen = visible(os.environ.get("CUDA_VISIBLE_DEVICES"), uuids)
        return [names.get(each) or pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByUUID(each)) for each in chosen]
    except pynvml.NVMLError:  # a device that fell off the bus, an instance (MIG) that is not there
        return []
    finally:
        pynvml.nvmlShutdown()


def visible(variable: str | None, uuids: list[str]) -> list[str]:
    """The UUIDs that CUDA_VISIBLE_DEVICES leaves of all, in its order, by CUDA's own rules: the list ends at the first entry
    that names no device; UUIDs may be cut short; one that is named twice makes none visible."""
    if variable is None:
        return uuids
    chosen: list[str] = []
    for word in map(str.strip, variable.split(",")):
        if word.startswith("MIG-"):
            chosen.append(word)
            continue
        if word.startswith("GPU-"):
            matches = [uuid for uuid in uuids if uuid.startswith(word)]
        else:
            matches = [uuids[int(word)]] if word.isdecimal() and int(word) < len(uuids) else []
        if len(matches) != 1:
            break
        chosen += matches
    return chosen if len(set(chosen)) == len(chosen) else []


@functools.cache
def torch_has_cuda() -> bool:
    """Whether the installed torch was built for CUDA, read from its version file: importing torch takes seconds."""
    spec = find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else Path("version.py")
    try:
        return not re.search(r"^cuda\b[^=\n]*=\s*None", file.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return True


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
    return account | (gpu() if device == "cuda" else {})


def gpu() -> dict[str, Any]:
    """The device that torch computes on: NVML is asked by its UUID, since its numbers are not torch's."""
    import torch

    about = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {"gpu": about.name, "cuda": torch.version.cuda} | driver_account(str(getattr(about, "uuid", "")))


def driver_account(uuid: str) -> dict[str, Any]:
    """Clocks, power limit and other processes of one device; null where the driver does not tell."""
    import pynvml

    def told(ask: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return ask(*arguments)
        except pynvml.NVMLError:
            return None

    def of_device(ask: Callable[..., Any], *arguments: Any) -> Any:
        return None if handle is None else told(ask, handle, *arguments)

    if told(lambda: pynvml.nvmlInit() or True) is None:
        return {}
    handle = told(pynvml.nvmlDeviceGetHandleByUUID, f"GPU-{uuid}")
    if handle is None:  # an instance of a divided device: its clocks are those of the whole
        instance = told(pynvml.nvmlDeviceGetHandleByUUID, f"MIG-{uuid}")
        handle = None if instance is None else told(pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, instance)
    limit = of_device(pynvml.nvmlDeviceGetEnforcedPowerLimit)
    processes = of_device(pynvml.nvmlDeviceGetComputeRunningProcesses)
    account = {
        "driver": told(pynvml.nvmlSystemGetDriverVersion),
        "clock_sm_mhz": of_device(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
        "clock_memory_mhz": of_device(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_MEM),
        "power_limit_w": None if limit is None else limit / 1000,
        "other_processes": None if processes is None else max(len(processes) - 1, 0),
    }
    pynvml.nvmlShutdown()
    return account
