"""The clock: contenders timed in turn, samples kept, the median quoted, and whether the figures can be trusted.

Order must not decide who wins. A contender finds in the caches what ran before it, so each timed call follows untimed
calls of the same contender, and the order of contenders is turned by one place every round and runs backwards in every
second, so that nobody always follows the same other. Knows nothing of models.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from sparsebench.records import progress

NOISY_SPREAD = 0.25  # (p90 - p10) / median above which a median says little [choice]
RESAMPLES = 200  # of the rounds, for the spread of a break-even sparsity


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, device work included."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        stream = torch.cuda.current_stream()
        start.record(stream)
        call()
        end.record(stream)  # of a model on several devices, too: its last copy is one that this stream waits for
        end.synchronize()
        torch.cuda.set_device(stream.device)  # where the call has left another one current
        return start.elapsed_time(end)
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000


@dataclass
class Contender:
    """Something to time: `call(i)` is inside the clock, `reset()` before it. `i` counts the contender's calls.

    untimed: calls before each timed one. One is enough where every call reads the same; where each reads another part,
    as sparse steps do, it takes several until the caches hold what they hold in use.
    """

    call: Callable[[int], object]
    reset: Callable[[], object] = lambda: None
    untimed: int = 1

    def laid(self, i: int) -> object:
        """The call after its reset."""
        self.reset()
        return self.call(i)


def timed_calls(warmup: int, samples: int, untimed: int = 1) -> range:
    """The indices of the calls that `interleaved` times."""
    return range(warmup + untimed, warmup + samples * (untimed + 1), untimed + 1)


def interleaved(contenders: list[Contender], warmup: int, samples: int, device: torch.device) -> tuple[list, float]:
    """Times in ms of each contender, and the seconds that the warm-up took.

    Every round takes one sample of each. The samples of a round are neighbours in time, so they may be compared in pairs.
    """
    samples_ms: list[list[float]] = [[] for _ in contenders]
    start = time.perf_counter()
    for i in range(warmup):
        for contender in contenders:
            contender.reset()
            timed(lambda c=contender, i=i: c.call(i), device)
    warmup_seconds = time.perf_counter() - start
    for number in progress.shown(range(samples), samples):
        turns = [(number + place) % len(contenders) for place in range(len(contenders))]
        for turn in turns[:: -1 if number % 2 else 1]:
            samples_ms[turn].append(sample(contenders[turn], warmup, number, device))
    return samples_ms, warmup_seconds


def sample(contender: Contender, warmup: int, number: int, device: torch.device) -> float:
    """Milliseconds of one timed call, after the untimed ones."""
    index = timed_calls(warmup, number + 1, contender.untimed)[number]
    for before in range(index - contender.untimed, index):
        contender.reset()
        contender.call(before)
    contender.reset()
    return timed(lambda: contender.call(index), device)


def summary(samples: list[float]) -> dict:
    """median, p10 and p90 of samples in ms, and the samples."""
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return {
        "median_ms": statistics.median(samples),
        "p10_ms": cuts[0],
        "p90_ms": cuts[-1],
        "samples_ms": [round(s, 6) for s in samples],
    }


def fastest(engines_timed: dict[str, dict], sides: Sequence[str] = ("dense", "sparse")) -> dict[str, Any]:
    """The fastest engine of each side, and all of them; summaries by `side/engine`."""
    section: dict[str, Any] = {"engines": engines_timed}
    for side in sides:
        names = [name for name in engines_timed if name.startswith(side)]
        best = min(names, key=lambda name: engines_timed[name]["median_ms"])
        section |= {side: engines_timed[best], f"{side}_engine": best.partition("/")[2]}
    return section


def speedup(dense: list[float], sparse: list[float]) -> dict[str, float]:
    """median(dense) / median(sparse), and p10 and p90 of the ratios of the single rounds."""
    cuts = statistics.quantiles([d / s for d, s in zip(dense, sparse, strict=True)], n=10, method="inclusive")
    return {
        "speedup": statistics.median(dense) / statistics.median(sparse),
        "speedup_p10": cuts[0],
        "speedup_p90": cuts[-1],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Whether the figures can be trusted


@dataclass
class Load:
    """What else the machine did while something was timed."""

    cores: int
    threads: int  # of this process
    average: float | None = None  # load average over the last minute, at the end
    others: float | None = None  # cores that other processes kept busy, mean over the block


@contextmanager
def watching(threads: int) -> Iterator[Load]:
    """Measure the load of the machine by others while the block runs. threads: those the timed code may use."""
    load, process = Load(psutil.cpu_count() or 1, threads), psutil.Process()
    start, busy, own = time.perf_counter(), busy_seconds(), sum(process.cpu_times()[:4])
    yield load
    seconds = time.perf_counter() - start
    foreign = busy_seconds() - busy - (sum(process.cpu_times()[:4]) - own)
    load.average, load.others = os.getloadavg()[0], max(0.0, foreign / seconds)


def busy_seconds() -> float:
    """Processor seconds of all processes together since the machine started."""
    return sum(getattr(psutil.cpu_times(), name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))


def noise(summaries: dict[str, dict], load: Load) -> dict:
    """{noisy, reasons, ...}: whether spread or load make the figures worthless, and what was seen.

    summaries: what was timed, by name. Noisy is a spread (p90 - p10) / median above NOISY_SPREAD, other processes on
    more cores than the timed code leaves free, or a load average above the number of cores.
    """
    reasons = []
    for name, each in summaries.items():
        spread = (each["p90_ms"] - each["p10_ms"]) / each["median_ms"]
        if spread > NOISY_SPREAD:
            reasons.append(f"{name}: (p90 - p10) / median is {spread:.0%}, above {NOISY_SPREAD:.0%}")
    free = load.cores - load.threads
    if load.others is not None and load.others > max(free, 0) + 0.1:  # a tenth of a core is the system's own
        reasons.append(f"other processes kept {load.others:.1f} cores busy, {free} of {load.cores} were free")
    if load.average is not None and load.average > load.cores:
        reasons.append(f"load average {load.average:.1f} on {load.cores} cores")
    seen = {"cores": load.cores, "threads": load.threads, "load_average": load.average, "other_cores": load.others}
    return {"noisy": bool(reasons), "reasons": reasons, "load": seen}


# ---------------------------------------------------------------------------------------------------------------------
# Break-even


def crossing(dense: float, points: list[tuple[float, float]]) -> float | None:
    """The sparsity from which on the sparse time is no longer above `dense`, by interpolation between measured points.

    points: (sparsity, time). None where the sparsest point is slower than dense; the least sparsity where none is.
    """
    points = sorted(points)
    slower = [i for i, (_, time_) in enumerate(points) if time_ > dense]
    if not slower:
        return points[0][0]
    last = slower[-1]
    if last == len(points) - 1:
        return None
    (low, before), (high, after) = points[last : last + 2]
    return low + (high - low) * (before - dense) / (before - after)


def break_even(dense: list[float], curve: dict[float, list[float]]) -> dict:
    """Where sparse begins to be faster than dense, from samples of the same rounds.

    dense: times of a dense step; curve: measured sparsity -> times of the sparse step. Returns `sparsity` with p10 and
    p90 over resampled rounds (None: not reached), the measured `points`, and `reason` where no figure can be given:
    fewer than three sparsities that differ by a point, or nothing measured at which sparse is as fast as dense.
    """
    points = [
        {"sparsity": s, **{k: v for k, v in summary(times).items() if k != "samples_ms"}}
        for s, times in sorted(curve.items())
    ]
    section = {"sparsity": None, "p10": None, "p90": None, "reason": None, "points": points}
    if len({round(s, 2) for s in curve}) < 3:
        return section | {"reason": f"needs three measured sparsities, got {len({round(s, 2) for s in curve})}"}
    section["sparsity"] = crossing(statistics.median(dense), [(p["sparsity"], p["median_ms"]) for p in points])
    if section["sparsity"] is None:
        section["reason"] = f"slower than dense at every measured sparsity up to {max(curve):.1%}"
    generator, rounds, crossings = random.Random(0), range(len(dense)), []
    for _ in range(RESAMPLES):
        chosen = generator.choices(rounds, k=len(dense))
        pairs = [(s, statistics.median(times[i] for i in chosen)) for s, times in curve.items()]
        point = crossing(statistics.median(dense[i] for i in chosen), pairs)
        crossings.append(2.0 if point is None else point)  # beyond every sparsity
    ordered, tenth = sorted(crossings), RESAMPLES // 10
    return section | {n: p if p <= 1 else None for n, p in (("p10", ordered[tenth]), ("p90", ordered[-tenth - 1]))}


def read_bandwidth(device: torch.device) -> float:
    """GB/s of reading memory: a sum over 1 GiB (256 MiB on a CPU), best of several; over less where a GPU is nearly full."""
    count = 1 << 26
    if device.type == "cuda":
        count = min(1 << 28, torch.cuda.mem_get_info()[0] // 16)  # a quarter of the free bytes, as float32
    values = torch.ones(count, device=device)
    times, _ = interleaved([Contender(lambda _: values.sum())], 3, 10, device)
    return values.numel() * 4 / min(times[0]) / 1e6
