"""Inputs with exact sparsity and the clocks of the benchmark: weights rotate past the cache, samples are taken in turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch

from sparsebench.measure.clock import Contender, interleaved, summary

ROTATED_BYTES = 320e6  # more than any last-level cache here


def draw(count: int, group: str, settings, generator: torch.Generator) -> torch.Tensor:
    """float32 [count] distributed like a block's tensor (attn_in, attn_out, mlp_in, mlp_mid)."""
    if settings.histograms is None:
        return torch.randn(count, generator=generator)
    from sparsebench.methods.teal import OFFICIAL

    part, tensor = OFFICIAL[group]
    file = Path(settings.histograms, "histograms", f"layer-{settings.histogram_layer}", part, "histograms.pt")
    content = torch.load(file, weights_only=True, map_location="cpu")
    counts, centers = content[tensor].double(), content[f"{tensor}_centers"].double()
    chosen = torch.multinomial(counts / counts.sum(), count, replacement=True, generator=generator)
    width = float((centers[-2] - centers[1]) / (len(centers) - 3))
    return (centers[chosen] + width * (torch.rand(count, generator=generator) - 0.5)).float()


def threshold_for(x: torch.Tensor, sparsity: float) -> float:
    """The t that drops exactly round(sparsity * n) values of x; -1 drops none."""
    dropped = round(sparsity * x.numel())
    return float(x.abs().flatten().kthvalue(dropped).values) if dropped else -1.0


def clock(
    bodies: dict[str, Callable[[int], object]], copies: int, settings, device: torch.device
) -> dict[str, list[float]]:
    """Microseconds per call of every body, samples taken in turn; `body(i)` works on weight copy i.

    On a GPU a sample is the replay of a CUDA graph over all copies, divided by their number.
    """
    if device.type == "cuda":
        graphs = {}
        for name, body in bodies.items():
            body(0)
            torch.cuda.synchronize()
            graphs[name] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[name]):
                for i in range(copies):
                    body(i)
        contenders = [Contender(lambda _, graph=graph: graph.replay()) for graph in graphs.values()]
        scale = 1e3 / copies
    else:
        for body in bodies.values():
            body(0)
        turn = itertools.count()  # of all calls, so that each reads the copy that left the cache longest ago
        contenders = [Contender(lambda _, body=body: body(next(turn) % copies)) for body in bodies.values()]
        scale = 1e3
    times, _ = interleaved(contenders, settings.warmup, settings.samples, device)
    return {name: [t * scale for t in each] for name, each in zip(bodies, times, strict=True)}


def summary_us(samples: list[float]) -> dict:
    return {k.replace("_ms", "_us"): v for k, v in summary(samples).items()}
