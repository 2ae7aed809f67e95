"""The bytes limit of the machine at hand: no decode step is faster than its bytes at the speed at which memory is read.

The read bandwidth is measured in the same run. A share above 1 means that the model (or a part of it) was read from a cache,
or that the engine reads faster than the plain sum that the bandwidth was measured with.
"""

from __future__ import annotations

from typing import Any

import torch

from sparsebench.measure import clock


def sparse_bytes(decode: dict[str, Any], traffic: dict[str, Any]) -> float:
    """Bytes that the timed sparse step read: of its own tokens where they were counted. traffic: the record's `bytes`."""
    points = (decode.get("break_even") or {}).get("points", [])
    return next((p["bytes"] for p in points if p["sparsity"] == decode["sparsity"]), traffic["sparse"])


def of_decode(decode: dict[str, Any], traffic: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The record's section: bytes of a dense and a sparse step, the least time for each, and which share of it was reached.

    decode: latency's section; where no kernel skipped, the sparse step read all bytes and has no figures here.
    """
    bandwidth = clock.read_bandwidth(device)
    read = {"dense": traffic["dense"]} | ({"sparse": sparse_bytes(decode, traffic)} if "speedup" in decode else {})
    least = {side: count / bandwidth / 1e6 for side, count in read.items()}
    section: dict[str, Any] = {
        "read_bandwidth_gbs": bandwidth,
        "bytes": read,
        "ms": least,
        "share": {side: ms / decode[side]["median_ms"] for side, ms in least.items()},
    }
    if "speedup" in decode:
        section |= {"speedup": read["dense"] / read["sparse"]}
    return section
