"""Which tuning of the fused CUDA step's kernels is fastest for a model on this GPU: tried, timed, remembered."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import nn

from sparsebench.engines import prefilled, quantisation
from sparsebench.engines.fused_cuda import MAPS, Step, tuning_file
from sparsebench.kernels.cuda_gather import Tuning
from sparsebench.records import files
from sparsebench.sites import find_blocks

CANDIDATES = {
    kind: (
        Tuning(8, 4, 1, 4.0),
        Tuning(8, 4, 2, 2.0),
        Tuning(8, 8, 2, 2.0),
        Tuning(4, 8, 1, 4.0),
        Tuning(8, 8, 1, 2.0),
        Tuning(8, 4, 1, 2.0),
        Tuning(8, 4, 1, 3.0),
        Tuning(16, 4, 1, 2.0),
        Tuning(4, 4, 1, 8.0),
    )
    for kind in ("qkv", "o", "gate_up", "down")
} | {
    "attend": tuple(Tuning(warps, loads, 1) for warps in (4, 8, 16) for loads in (1, 2, 4)),
    "head": (Tuning(16, 8, 1, 1.0), Tuning(8, 8, 1, 2.0), Tuning(16, 4, 1, 2.0)),
}

PACKED_CANDIDATES = (  # of products with quantised weights; attention and head stay as they are
    Tuning(8, 8, 1, 1.0), Tuning(8, 8, 1, 2.0), Tuning(8, 4, 1, 2.0), Tuning(8, 4, 1, 4.0), Tuning(4, 8, 1, 2.0),
    Tuning(4, 8, 1, 4.0), Tuning(16, 4, 1, 1.0), Tuning(4, 16, 1, 2.0), Tuning(8, 8, 2, 1.0),
)  # fmt: skip


def candidates_for(module: nn.Module) -> dict[str, tuple[Tuning, ...]]:
    """What is tried, by kernel kind."""
    return CANDIDATES if quantisation(module, find_blocks(module)) is None else dict.fromkeys(MAPS, PACKED_CANDIDATES)


def tune(module: nn.Module, prompt: torch.Tensor, keep_all: bool = False) -> dict[str, Tuning]:
    """Try all candidates per kernel kind at the model's own thresholds, remember the fastest, and return them.

    keep_all: for a dense step. A kind's kernels of all layers run back to back in a graph, so the weights come from memory,
    not from cache.
    """
    device = torch.cuda.get_device_properties(prompt.device)
    cache, _ = prefilled(module, prompt, 8)
    best: dict[str, tuple[float, Tuning]] = {}
    for kind, candidates in candidates_for(module).items():
        for candidate in candidates:
            step = Step(module, cache, device.multi_processor_count, keep_all, {kind: candidate})
            step.position.fill_(prompt.shape[1])
            step.enqueue()  # leaves real values in the buffers
            step.position.fill_(prompt.shape[1])
            launches = [launch for launch in step.launches if launch.label.rpartition(".")[2] == kind]
            launches = launches * (8 if kind == "head" else 1)
            elapsed = graph_time(lambda step=step, launches=launches: [step.start(launch) for launch in launches])
            best[kind] = min(best.get(kind, (math.inf, candidate)), (elapsed, candidate), key=lambda pair: pair[0])
    chosen = {kind: tuning for kind, (_, tuning) in best.items()}
    content = json.dumps({kind: asdict(tuning) for kind, tuning in chosen.items()}, indent=1)
    files.write_atomic(tuning_file(module, device.name, keep_all), content.encode())
    return chosen


def graph_time(body: Callable[[], object], repeats: int = 10) -> float:
    """Median milliseconds of a replay of what `body` starts, captured in a CUDA graph."""
    body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    times = []
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])
