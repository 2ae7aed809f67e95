"""What a target that is not here would take for a decode step: an estimate, and called so wherever it is shown.

Where the target is of the same kind as the present device and the sparse step was timed at three sparsities or more, what
differs between the two is modelled. A line through the measured points,

    time = fixed + bytes / bandwidth,

splits a step into what it costs anyway (launches, synchronisation, norms: taken to be the same there) and what reading
costs (the kernel's share of the present device's read bandwidth, taken to be its share of the target's). The dense step
has one point only: it gets the same fixed cost if it runs in the same engine, and else counts as reading throughout. No
step is faster than its products at the target's arithmetic rate.

Otherwise each step keeps its efficiency, the larger of bytes / bandwidth and 2 MACs / arithmetic rate over the measured
time. If the same rate bounds both steps, here and there, the speed-up is then the local one by construction, and the record
says so (`equals_local_ratio`).

What neither can know: caches (an efficiency above 1 means that the model sat in one here), and whether kernels of the same
quality exist for the target. A CPU fitted to a GPU, or the reverse, is flagged for that reason.
"""

from __future__ import annotations

import math

import torch

from sparsebench.measure.clock import Contender, interleaved, read_bandwidth
from sparsebench.measure.limit import sparse_bytes

LABEL = "estimate, not a measurement"
SAME_RATIO = "equals the local ratio: what bounds both steps here bounds both there"


def rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(GB/s of reading memory, TFLOP/s of a matrix product), measured on the present device."""
    return read_bandwidth(device), arithmetic_rate(device, dtype)


def arithmetic_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a square matrix product, best of several."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times, _ = interleaved([Contender(lambda _: a @ b)], 2, 5, device)
    return 2 * size**3 / min(times[0]) / 1e9


def roofline_ms(num_bytes: float, macs: float, bandwidth_gbs: float, tflops: float) -> float:
    """The least time of a step in ms: bytes and arithmetic each at their peak rate, overlapped."""
    return max(num_bytes / bandwidth_gbs / 1e6, 2 * macs / tflops / 1e9)


def line(points: list[dict]) -> tuple[float, float] | None:
    """(fixed ms, GB/s) of the least-squares line time = fixed + bytes / bandwidth; None where the points give none.

    points: `bytes` and `median_ms` of a step at three or more sparsities. A fixed cost below 0 counts as 0.
    """
    if len({point["bytes"] for point in points}) < 3:
        return None
    mean_bytes = sum(p["bytes"] for p in points) / len(points)
    mean_ms = sum(p["median_ms"] for p in points) / len(points)
    square = sum((p["bytes"] - mean_bytes) ** 2 for p in points)
    slope = sum((p["bytes"] - mean_bytes) * (p["median_ms"] - mean_ms) for p in points) / square
    if slope <= 0:
        return None
    fixed = mean_ms - slope * mean_bytes
    if fixed < 0:
        fixed, slope = 0.0, sum(p["median_ms"] * p["bytes"] for p in points) / sum(p["bytes"] ** 2 for p in points)
    return fixed, 1 / slope / 1e6


def predict(target, record, bandwidth_gbs: float, tflops: float) -> dict:
    """The record's `estimate` section for the decode step of `target`.

    target: Hardware with its peak rates. record: with macs, bytes and a measured decode latency. bandwidth_gbs, tflops:
    the present device's, measured. Raises ValueError where the record holds no decode latency.
    """
    decode = (record.latency or {}).get("decode")
    if not decode:
        raise ValueError("hardware.estimate needs a measured decode step, and this kind of model has none")
    work = {
        "dense": (record.bytes["dense"], record.macs["dense"]),
        "sparse": (sparse_bytes(decode, record.bytes), record.macs["executed"]),
    }
    here = str(record.latency.get("device")).partition(":")[0]
    fitted = line((decode.get("break_even") or {}).get("points", [])) if here == target.device else None
    rates_here, rates_there = (bandwidth_gbs, tflops), (target.peak_bandwidth_gbs, target.peak_tflops)
    efficiency = {name: roofline_ms(*each, *rates_here) / decode[name]["median_ms"] for name, each in work.items()}
    if fitted:
        times, basis = split_times(work, decode, fitted, rates_here, rates_there)
    else:
        times = {f"{name}_ms": roofline_ms(*each, *rates_there) / efficiency[name] for name, each in work.items()}
        basis = {"model": "each step keeps its efficiency"}
    speedup = times["dense_ms"] / times["sparse_ms"]
    local = decode["dense"]["median_ms"] / decode["sparse"]["median_ms"]
    same = math.isclose(speedup, local, rel_tol=1e-9)
    env = record.env or {}
    return {
        "label": LABEL,
        "target": target.name,
        "target_peaks": {"bandwidth_gbs": target.peak_bandwidth_gbs, "tflops": target.peak_tflops},
        "decode": {**times, "speedup": speedup},
        "equals_local_ratio": same,
        "basis": basis,
        "fitted_on": {
            "device": env.get("gpu") or env.get("cpu"),
            "threads": env.get("threads"),
            "read_bandwidth_gbs": bandwidth_gbs,
            "tflops": tflops,
            "efficiency": efficiency,
        },
        "cautions": ([SAME_RATIO] if same else []) + cautions(efficiency, here, target, record.latency),
    }


def split_times(
    work: dict[str, tuple], decode: dict, fitted: tuple[float, float], here: tuple, there: tuple
) -> tuple[dict[str, float], dict]:
    """(times in ms on the target, what they rest on) where a step splits into a fixed cost and reading."""
    fixed, bandwidth = fitted
    gain, same_engine = there[0] / here[0], decode["dense_engine"] == decode["sparse_engine"]
    of_dense = min(fixed, decode["dense"]["median_ms"]) if same_engine else 0.0
    reading = {
        "dense": (of_dense, decode["dense"]["median_ms"] - of_dense),
        "sparse": (fixed, work["sparse"][0] / bandwidth / 1e6),
    }
    times = {
        f"{name}_ms": max(start + ms / gain, 2 * work[name][1] / there[1] / 1e9)
        for name, (start, ms) in reading.items()
    }
    basis = {
        "model": "a fixed cost that stays and reading that scales",
        "fixed_ms": {"dense": of_dense, "sparse": fixed},
        "kernel_bandwidth_gbs": bandwidth,
        "points": len(decode["break_even"]["points"]),
    }
    return times, basis


def cautions(efficiency: dict[str, float], here: str, target, latency: dict) -> list[str]:
    """What speaks against the estimate."""
    against = [
        f"the {n} step ran faster than this device's memory: it was cached" for n, e in efficiency.items() if e > 1
    ]
    if here != target.device:
        against.append(
            f"fitted on a {here} device for a {target.device} target: its kernels and overheads are other ones"
        )
    if latency.get("noisy"):
        against.append("the times it rests on are noisy")
    return against
