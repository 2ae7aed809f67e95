"""A hardware target: which device, dtype, threads and kernel, set in one place and read back.

A new target is one YAML in conf/hardware/; it needs a file in kernels/ only if it has a kernel of its own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from sparsebench import cache, kernels, ranks
from sparsebench.config import NAME_PATTERN, setting
from sparsebench.records import machine

cache.provide_compilers()  # before a kernel imports one

ENGINES = ("auto", "eager", "compiled", "fused")  # of decode: see sparsebench/engines
OPTIONS = "hardware=auto, hardware=cpu"  # targets that every machine has
THREADS_BESIDE_A_GPU = 8  # more only get into the way of other runs on the same host
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(kw_only=True)
class Hardware:
    """Settings of a target; after `prepare` also what was found: `torch_device`, `torch_dtype`, `kernel_name`."""

    name: str = setting(**NAME_PATTERN)
    device: str = setting(choices=("auto", "cpu", "cuda"))
    requires: str | None
    dtype: str = setting(choices=("auto", *DTYPES))
    devices: int = setting(gt=0, default=1)
    threads: int | None = setting(gt=0)
    kernel: str = setting(choices=("auto", *kernels.names()))
    engine: str = setting(choices=ENGINES)
    peak_bandwidth_gbs: float | None = setting(gt=0)
    peak_tflops: float | None = setting(gt=0)
    estimate: bool
    torch_device: torch.device = field(init=False, default=torch.device("cpu"))
    torch_devices: list[torch.device] = field(init=False, default_factory=lambda: [torch.device("cpu")])
    torch_dtype: torch.dtype = field(init=False, default=torch.float32)
    kernel_name: str = field(init=False, default="masked_dense")

    @property
    def present_device(self) -> str:
        """`cpu` or `cuda`: what `auto` stands for on this machine; an estimated target is measured on what is here."""
        if self.device == "auto" or self.estimate:
            return "cuda" if machine.gpu_names() else "cpu"
        return self.device

    def problems(self, settings: Any) -> list[str]:
        gpus = machine.gpu_names()
        problems = []
        if self.estimate:
            if self.peak_bandwidth_gbs is None or self.peak_tflops is None:
                problems.append(
                    f"hardware.estimate=true needs hardware.peak_bandwidth_gbs and hardware.peak_tflops, which {self.name} leaves null"
                )
            if settings is None or not settings.measure.latency:
                problems.append(
                    "hardware.estimate=true needs a run with measure.latency=true: it starts from measured times"
                )
        elif self.device == "cuda" and not gpus:
            overridden = self.name in ("auto", "cpu")  # options that fit every machine: the device was given by itself
            given = "hardware.device=cuda" if overridden else f"hardware={self.name}"
            here = f"hardware.estimate=true, {OPTIONS}" if self.peak_tflops and not overridden else OPTIONS
            hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
            why = "this machine has none that torch can use"
            why = why if hidden is None else f"CUDA_VISIBLE_DEVICES={hidden!r} leaves none"
            problems.append(f"{given} needs an NVIDIA GPU, {why}; here: {here}")
        elif self.requires and not any(self.requires in gpu for gpu in gpus):
            problems.append(
                f"hardware={self.name} needs a device named {self.requires!r}, this machine has "
                f"{', '.join(gpus) or 'no GPU'}; here: {'hardware=cuda, ' if gpus else ''}{OPTIONS}"
            )
        fitting = [gpu for gpu in gpus if self.estimate or not self.requires or self.requires in gpu]
        if self.devices > 1 and self.present_device == "cpu" and not problems:
            problems.append(f"hardware.devices must be 1 on a CPU, got {self.devices}")
        elif self.devices > 1 and self.present_device == "cuda" and len(fitting) < self.devices and not problems:
            problems.append(self.too_few(len(fitting)))
        elif self.devices > 1 and ranks.count() > 1:
            problems.append(f"hardware.devices must be 1 where {ranks.count()} processes train, got {self.devices}")
        if self.kernel != "auto":
            device = kernels.device_of(self.kernel)
            if device not in (None, self.present_device):
                problems.append(f"hardware.kernel={self.kernel} runs on {device}, got device {self.present_device}")
        cores = psutil.cpu_count()
        if self.threads and cores and self.threads > cores:
            problems.append(f"hardware.threads must be at most the {cores} cores of this machine, got {self.threads}")
        return problems

    def prepare(self) -> None:
        """Set threads, device, dtype and kernel for this process."""
        cache.check_compiled()
        self.torch_device = torch.device(self.present_device)
        self.torch_devices = [self.torch_device]
        if self.torch_device.type == "cuda" and ranks.count() == 1:  # else each takes its own (ranks.py)
            chosen = self.chosen([torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())])
            torch.cuda.set_device(chosen[0])
            if self.devices > 1:
                self.torch_devices = [torch.device("cuda", i) for i in chosen]
                self.torch_device = self.torch_devices[0]
        automatic = "bfloat16" if self.torch_device.type == "cuda" else "float32"
        self.torch_dtype = DTYPES[automatic if self.dtype == "auto" else self.dtype]
        cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count()
        most = THREADS_BESIDE_A_GPU if self.torch_device.type == "cuda" else cores
        torch.set_num_threads(self.threads or min(cores, most))
        self.kernel_name = kernels.best(self.torch_device.type) if self.kernel == "auto" else self.kernel
        kernels.load(self.kernel_name).prepare(torch.get_num_threads())

    def chosen(self, names: list[str]) -> list[int]:
        """The numbers of the devices to use among those that torch sees: the first ones of the kind that is required."""
        fitting = [i for i, name in enumerate(names) if self.estimate or not self.requires or self.requires in name]
        if not fitting:
            raise ValueError(
                f"hardware={self.name} needs a device named {self.requires!r}, torch sees {names or 'none'}"
            )
        if len(fitting) < self.devices:
            raise ValueError(self.too_few(len(fitting)))
        return fitting[: self.devices]

    def too_few(self, there: int) -> str:
        """The line about more devices than there are."""
        kind = f" named {self.requires!r}" if self.requires and not self.estimate else ""
        return f"hardware.devices must be at most {there}, the GPUs of this machine{kind}, got {self.devices}"

    @property
    def skips(self) -> bool:
        """Whether the kernel really skips work (masked-dense only simulates it)."""
        return kernels.load(self.kernel_name).SKIPS

    def read_back(self) -> dict:
        """What is in force now, for the record."""
        return {
            "device": str(self.torch_device),
            "devices": self.devices,
            "dtype": str(self.torch_dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "kernel": self.kernel_name,
            "engine": self.engine,
        }
