"""Where a decode step's time goes, dense and sparse, role by role: passes of their own, after the timed ones.

Each engine marks its own steps (engines/marks.py): a fused step from within on a CPU and by its kernels on a GPU, an eager
one by module, a compiled one by kinds of kernels. Marks cost time themselves, so the time of the marked steps is kept beside
them, with the share that no role accounts for: Python, launches, copies, what waits between kernels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
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
    """{engine, how, ms by role, step_ms, unattributed, steps}, or {engine, how, reason} where nothing can be told.

    On a CPU each call is marked by itself and medians are kept; on a GPU a profiler starts once for all calls.
    """
    about = {"engine": decoder.engine, "how": decoder.marked_by}

    def call(i: int) -> float:
        decoder.rewind()
        return timed(lambda: [decoder.step(token) for token in text.call(i)], device)

    before = [call(i) for i in range(text.untimed + 1)]
    count = max(LEAST, min(MOST, round(1e3 * SECONDS / before[-1])))
    numbers = range(len(before), len(before) + count)
    try:
        parts = [
            marked(decoder, call, together, text.block)
            for together in ([numbers] if device.type == "cuda" else [[i] for i in numbers])
        ]
    except ValueError as error:
        return about | {"reason": str(error)}
    finally:
        decoder.rewind()
    roles = {role for by, _ in parts for role in by}
    by = {role: statistics.median(each.get(role, 0.0) for each, _ in parts) for role in sorted(roles, key=place)}
    step_ms = statistics.median(ms for _, ms in parts)
    unattributed = max(0.0, 1 - sum(by.values()) / step_ms)
    return about | {"ms": by, "step_ms": step_ms, "unattributed": unattributed, "steps": count * text.block}


def marked(
    decoder: Any, call: Callable[[int], float], numbers: Sequence[int], steps: int
) -> tuple[dict[str, float], float]:
    """(ms of a step by role, ms of a step) over the calls with these numbers, of so many steps each."""
    spent: list[float] = []
    by = decoder.marked(lambda: spent.extend(map(call, numbers)), len(numbers) * steps)
    return by, sum(spent) / len(numbers) / steps


def place(role: str) -> int:
    """Where a role stands in a step."""
    return ORDER.index(role) if role in ORDER else len(ORDER)


ORDER = (
    "embed", "norm", "qkv", "attention", "o", "gate_up", "down", "ffn", "head", "products", "norms and elementwise", "copies",
)  # fmt: skip
