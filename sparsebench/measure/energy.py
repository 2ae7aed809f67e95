"""Joules per decoded token (or per example), dense and sparse, from counters of the hardware; nothing where there are none.

On an NVIDIA GPU the driver counts the energy of the whole card, on a CPU the kernel's powercap folder (RAPL) that of its
packages and memory, usually for root alone. Both count whatever the machine does, idle power included: nothing is taken off.
Counters tick seldom (a card's every 20 to 100 ms), so the steps run without a break and the figure is taken from one tick to
another.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from sparsebench.measure.clock import Contender

POWERCAP = Path("/sys/class/powercap")
SECONDS, TURNS = 1.5, 2  # of each turn, and turns of each model: dense, sparse, sparse, dense [choice]
BETWEEN = 0.02  # seconds of steps between two looks at a counter
PATIENCE = 5.0  # seconds without a tick after which a counter counts as standing still


class Counter(Protocol):
    """Energy since some moment."""

    source: str

    def joules(self) -> float:
        """Raises OSError where it can't be read any more."""


class Card:
    """The energy counter of the GPU that torch computes on. Raises OSError where there is none."""

    def __init__(self, uuid: str):
        import pynvml

        self.nvml = pynvml
        try:
            pynvml.nvmlInit()
            self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except pynvml.NVMLError as error:  # also a part (MIG) of a card: the counter is that of the whole
            raise OSError(f"NVML knows no whole card of this name ({error})") from None
        self.source = "NVML, the whole card"
        self.joules()

    def joules(self) -> float:
        try:
            return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3
        except self.nvml.NVMLError as error:
            raise OSError(f"NVML counts no energy on this card ({error})") from None


class Packages:
    """The energy counters of a CPU's packages and of its memory, each from where it stood when it was read last.

    folder: of the kernel's powercap. Raises OSError where nothing is there or it can't be read.
    """

    def __init__(self, folder: Path):
        zones = sorted(folder.glob("intel-rapl:*")) if folder.is_dir() else []
        names = {zone: (zone / "name").read_text().strip() for zone in zones if (zone / "name").is_file()}
        self.zones = [
            z for z, name in names.items() if name.startswith("package") or name == "dram"
        ]  # no part of one twice
        if not self.zones:
            raise OSError(f"no counter of a package in {folder}")
        self.ranges = {zone: int((zone / "max_energy_range_uj").read_text()) for zone in self.zones}
        self.last = {zone: self.microjoules(zone) for zone in self.zones}
        self.total = 0
        self.source = f"RAPL, {', '.join(names[zone] for zone in self.zones)}"

    def microjoules(self, zone: Path) -> int:
        try:
            return int((zone / "energy_uj").read_text())
        except PermissionError:
            raise OSError(f"{zone / 'energy_uj'} may not be read by this user") from None

    def joules(self) -> float:
        """Since this was made; a counter that began again at 0 is followed."""
        for zone in self.zones:
            now = self.microjoules(zone)
            self.total += (now - self.last[zone]) % (self.ranges[zone] + 1)
            self.last[zone] = now
        return self.total / 1e6


def counter(device: torch.device) -> Counter:
    """The counter of a device. Raises OSError, in words, where there is none."""
    if device.type != "cuda":
        return Packages(POWERCAP)
    return Card(str(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", "")))


def between_ticks(call: Callable[[], object], meter: Counter, seconds: float) -> tuple[float, float, int]:
    """(joules, seconds, calls) from one tick of the counter to another at least `seconds` later, calls all the while.

    Raises OSError where the counter stands still.
    """
    calls, first = 0, None
    last, ticked = meter.joules(), time.perf_counter()
    while True:
        until = time.perf_counter() + BETWEEN
        while time.perf_counter() < until:
            call()
            calls += 1
        now, value = time.perf_counter(), meter.joules()
        if value == last:
            if now - ticked > PATIENCE:
                raise OSError(f"the counter stood still for {PATIENCE:g} s")
            continue
        last, ticked = value, now
        if first is None:
            first = value, now, calls
        elif now - first[1] >= seconds:
            return value - first[0], now - first[1], calls - first[2]


def measure(
    contenders: dict[str, Contender], units: int, per: str, device: torch.device, cards: int = 1
) -> dict[str, Any]:
    """The record's section: joules per token (or example) and mean watts of each contender, dense and sparse.

    units: tokens or examples of a call; per: their name. Where no counter can be read each side is None and `reason` says why.
    cards: how many devices hold the model.
    """
    nothing: dict[str, Any] = {**dict.fromkeys(contenders), "per": per, "source": None}
    try:
        if cards > 1:
            raise OSError(f"the counter is of one card, the model lies on {cards}")
        meter = counter(device)
        sums = dict.fromkeys(contenders, (0.0, 0.0, 0))
        for turn in range(TURNS):
            for name in list(contenders)[:: -1 if turn % 2 else 1]:
                taken = between_ticks(repeated(contenders[name], device), meter, SECONDS)
                sums[name] = tuple(a + b for a, b in zip(sums[name], taken, strict=True))  # type: ignore[assignment]
    except OSError as error:
        return nothing | {"reason": str(error)}
    sides = {
        name: {"joules": joules / (calls * units), "watts": joules / seconds, "seconds": seconds, per: calls * units}
        for name, (joules, seconds, calls) in sums.items()
    }
    return nothing | sides | {"source": meter.source, "reason": None}


def repeated(contender: Contender, device: torch.device) -> Callable[[], None]:
    """The contender's calls one after the other, each finished before the next."""
    numbers = itertools.count()

    def call() -> None:
        contender.reset()
        contender.call(next(numbers))
        if device.type == "cuda":
            torch.cuda.synchronize()

    return call
