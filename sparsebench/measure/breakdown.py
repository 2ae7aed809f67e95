"""Where a decode step's time goes, dense and sparse, role by role: passes of their own, after the timed ones.

Each engine marks its own steps (engines/marks.py): a fused step from within on a CPU and by its kernels on a GPU, an eager
one by module, a compiled one by kinds of kernels. Marks cost time themselves, so the time of the marked steps is kept beside
them, with the share that no role accounts for: Python, launches, copies, what waits between kernels.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from sparsebench.measure.clock import timed

SECONDS = 0.2  # of marked steps of one engine, about [choice]
LEAST, MOST = 3, 30  # calls


def by_kernel(decoders: dict[str, Any], text: Any, device: torch.device) -> dict[str, Any]:
    """The record's section: for each of `decoders` (dense, sparse) its roles' ms, and the seconds that this took.

    text: latency.Text, whose calls the decoders take.
    """
    start = time.perf_counter()
    sides = {name: one_engine(decoder, text, device) for name, decoder in decoders.items()}
    return {**sides, "seconds": time.perf_counter() - start}


def one_engine(decoder: Any, text: Any, device: torch.device) -> dict[str, Any]:
    """Medians over calls: {engine, how, ms by role, step_ms, unattributed, steps}, or {engine, how, reason} where nothing can be told."""
    about = {"engine": decoder.engine, "how": decoder.marked_by}

    def call(i: int) -> float:
        decoder.rewind()
        return timed(lambda: [decoder.step(token) for token in text.call(i)], device)

    before = [call(i) for i in range(text.untimed + 1)]
    calls = max(LEAST, min(MOST, round(1e3 * SECONDS / before[-1])))
    together = (
        calls if device.type == "cuda" else 1
    )  # a profiler starts once; what else a processor does is no part of a median
    parts, spent = [], []
    try:
        for first in range(len(before), len(before) + calls, together):
            took: list[float] = []
            parts.append(
                decoder.marked(lambda: took.extend(map(call, range(first, first + together))), together * text.block)
            )
            spent.append(sum(took) / together / text.block)
    except ValueError as error:
        return about | {"reason": str(error)}
    finally:
        decoder.rewind()
    roles = sorted(
        {role for each in parts for role in each}, key=lambda role: ORDER.index(role) if role in ORDER else len(ORDER)
    )
    by = {role: statistics.median(each.get(role, 0.0) for each in parts) for role in roles}
    step_ms = statistics.median(spent)
    return about | {
        "ms": by, "step_ms": step_ms, "unattributed": max(0.0, 1 - sum(by.values()) / step_ms), "steps": calls * text.block,
    }  # fmt: skip


ORDER = (
    "embed",
    "norm",
    "qkv",
    "attention",
    "o",
    "gate_up",
    "down",
    "ffn",
    "head",
    "products",
    "norms and elementwise",
    "copies",
)
