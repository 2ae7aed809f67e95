"""The clock: contenders timed in turn, samples kept, the median quoted. Knows nothing of models."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, device work included."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000


@dataclass
class Contender:
    """Something to time: `call(i)` is inside the clock, `reset()` before it. `i` is the sample's index."""

    call: Callable[[int], object]
    reset: Callable[[], object] = lambda: None


def interleaved(contenders: list[Contender], warmup: int, samples: int, device: torch.device) -> tuple[list, float]:
    """Times in ms of each contender, taken in turn A B A B ..., and the seconds that the warm-up took."""
    found: list[list[float]] = [[] for _ in contenders]
    start, warmup_seconds = time.perf_counter(), 0.0
    for i in range(warmup + samples):
        if i == warmup:
            warmup_seconds = time.perf_counter() - start
        for contender, times in zip(contenders, found, strict=True):
            contender.reset()
            elapsed = timed(lambda c=contender, i=i: c.call(i), device)
            if i >= warmup:
                times.append(elapsed)
    return found, warmup_seconds


def summary(samples: list[float]) -> dict:
    """median, p10 and p90 of samples in ms, and the samples."""
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return {
        "median_ms": statistics.median(samples),
        "p10_ms": cuts[0],
        "p90_ms": cuts[-1],
        "samples_ms": [round(s, 6) for s in samples],
    }


def break_even(dense_ms: float, nothing_skipped_ms: float, sparse_ms: float, sparsity: float) -> float | None:
    """Sparsity at which sparse and dense take equally long, on the line through (0, nothing skipped) and (s, sparse).

    0 where the sparse kernel is no slower than dense even when it skips nothing; None where the line never gets there or
    the sparse one is slower all the same (a busy machine).
    """
    if nothing_skipped_ms <= dense_ms:
        return 0.0 if sparse_ms <= dense_ms else None
    if sparse_ms >= nothing_skipped_ms:
        return None
    point = sparsity * (nothing_skipped_ms - dense_ms) / (nothing_skipped_ms - sparse_ms)
    return point if point <= 1 else None


def read_bandwidth(device: torch.device) -> float:
    """GB/s of reading memory: a sum over 1 GiB (256 MiB on a CPU), best of several."""
    values = torch.randn((1 << 28) if device.type == "cuda" else (1 << 26), device=device)
    times, _ = interleaved([Contender(lambda _: values.sum())], 3, 10, device)
    return values.numel() * 4 / min(times[0]) / 1e6
