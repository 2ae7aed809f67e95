"""What a target that is not here would take for a decode step: an estimate, and called so wherever it is shown.

A step's roofline on a device is the larger of bytes / bandwidth and 2 MACs / arithmetic rate. On the present device,
whose two rates are measured in the same run, the ratio roofline / measured time is the efficiency of the dense and of
the sparse step. The target is assumed to reach the same efficiency of its own published peak rates:

    estimated time = roofline on the target / efficiency measured here

What it can't know: caches (an efficiency above 1 means that the model sat in one here), launch overheads, and whether
kernels of the same quality exist for the target. A CPU fitted to a GPU, or the reverse, is flagged for that reason.
"""

from __future__ import annotations

import torch

from sparsebench.measure.clock import Contender, interleaved, read_bandwidth

LABEL = "estimate, not a measurement"


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
        "sparse": (record.bytes["sparse"], record.macs["executed"]),
    }
    times, efficiency = {}, {}
    for name, (num_bytes, macs) in work.items():
        efficiency[name] = roofline_ms(num_bytes, macs, bandwidth_gbs, tflops) / decode[name]["median_ms"]
        peak = roofline_ms(num_bytes, macs, target.peak_bandwidth_gbs, target.peak_tflops)
        times[f"{name}_ms"] = peak / efficiency[name]
    cautions = [
        f"the {n} step ran faster than this device's memory: it was cached" for n, e in efficiency.items() if e > 1
    ]
    here = str(record.latency.get("device")).partition(":")[0]
    if here != target.device:
        cautions.append(
            f"fitted on a {here} device for a {target.device} target: its kernels and overheads are other ones"
        )
    env = record.env or {}
    return {
        "label": LABEL,
        "target": target.name,
        "target_peaks": {"bandwidth_gbs": target.peak_bandwidth_gbs, "tflops": target.peak_tflops},
        "decode": {**times, "speedup": times["dense_ms"] / times["sparse_ms"]},
        "fitted_on": {
            "device": env.get("gpu") or env.get("cpu"),
            "threads": env.get("threads"),
            "read_bandwidth_gbs": bandwidth_gbs,
            "tflops": tflops,
            "efficiency": efficiency,
        },
        "cautions": cautions,
    }
