"""Expert kernels at two published shapes: many tokens (D2DMoE, section 5 of its specification) and one token (LTE, 4.3).

D2DMoE: T = 256 x 197 tokens, d = 768, E = 24 experts of 128, ReLU, Bernoulli routing, beside the dense MLP and the dense
MLP narrowed to the same active width. LTE: the FFN of Llama-2-7B in 344 experts of 32, SwiGLU, one token. The router,
its rule and the grouping of tokens are inside the clock: router scores are shifted so that the wanted share passes.
"""

from __future__ import annotations

import logging
import math

import torch
import torch.nn.functional as F

from sparsebench import kernels
from sparsebench.bench.clock import ROTATED_BYTES, clock, summary_us
from sparsebench.bench.products import relative_error
from sparsebench.kernels import masked_dense

log = logging.getLogger(__name__)
SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
SHAPES = {
    "d2dmoe": {
        "tokens": 256 * 197,
        "d": 768,
        "experts": 24,
        "size": 128,
        "activation": "relu",
        "gated": False,
        "width": 128,
    },
    "lte": {"tokens": 1, "d": 4096, "experts": 344, "size": 32, "activation": "silu", "gated": True, "width": None},
}


def time_experts(settings) -> list[dict]:
    return [time_shape(name, shape, settings) for name, shape in SHAPES.items()]


def time_shape(name: str, shape: dict, settings) -> dict:
    """Times by share of executed (token, expert) pairs, router included; `proportional`: ideal over measured time.

    On a CPU the many-token shape is cut to 197 tokens.
    """
    hardware = settings.hardware
    device, dtype = hardware.torch_device, hardware.torch_dtype
    tokens = shape["tokens"] if device.type == "cuda" else min(197, shape["tokens"])
    d, f, activation = shape["d"], shape["experts"] * shape["size"], shape["activation"]
    copies = max(2, math.ceil(ROTATED_BYTES / (d * f * (3 if shape["gated"] else 2) * dtype.itemsize)))
    copies = copies if tokens == 1 else 1  # one pass over many tokens is bound by arithmetic
    generator = torch.Generator(device).manual_seed(settings.seed)

    def normal(*size, scale=1.0):
        return (torch.randn(*size, device=device, generator=generator) * scale).to(dtype)

    x = normal(tokens, d)
    first = [normal(f, d, scale=d**-0.5) for _ in range(copies)]
    up = [normal(f, d, scale=d**-0.5) for _ in range(copies)] if shape["gated"] else [None] * copies
    last = [normal(f, d, scale=f**-0.5) for _ in range(copies)]
    width = shape["width"]
    v1 = normal(width or shape["experts"], d, scale=d**-0.5)
    v1 = v1 if width else v1.float()  # as the methods have it: LTE's router in float32, D2DMoE's in the model's dtype
    v2 = normal(shape["experts"], width, scale=width**-0.5) if width else None

    def scores() -> torch.Tensor:
        inner = F.linear(x.to(v1.dtype), v1)
        return (inner if v2 is None else F.linear(inner.relu(), v2)).float()

    backend = next(b for b in kernels.chain(hardware.kernel_name) if hasattr(b, "expert_ffn"))
    limits = {s: limit_for(scores().flatten(), s) for s in SHARES}

    def dense(i: int, count: int = f) -> torch.Tensor:
        hidden = masked_dense.expert_hidden(
            x, first[i][:count], activation, up=None if up[i] is None else up[i][:count]
        )
        return F.linear(hidden[2], last[i][:count].t())

    bodies = {"dense": dense}
    if device.type == "cuda":
        bodies["dense torch.compile"] = torch.compile(dense, dynamic=False)
    for s, limit in limits.items():
        bodies[f"experts@{s}"] = lambda i, limit=limit: backend.expert_ffn(
            x, scores() > limit, first[i], last[i], activation, up=up[i]
        )
        if tokens > 1 and s:
            bodies[f"narrow@{s}"] = lambda i, s=s: dense(i, round(s * f))
    times = {k: summary_us(v) for k, v in clock(bodies, copies, settings, device).items()}
    fastest = min((k for k in times if k.startswith("dense")), key=lambda k: times[k]["median_us"])
    whole = times["experts@1.0"]["median_us"]
    rows = []
    for s, limit in limits.items():
        keep = scores() > limit
        measured, median = float(keep.float().mean()), times[f"experts@{s}"]["median_us"]
        part = slice(0, 512)
        reference = masked_dense.expert_ffn(
            x[part].float(), keep[part], first[0].float(), last[0].float(), activation,
            up=None if up[0] is None else up[0].float(),
        )  # fmt: skip
        found = backend.expert_ffn(x, keep, first[0], last[0], activation, up=up[0])[part]
        rows.append({
            "executed": s, "measured": measured, "median_us": median,
            "speedup": times[fastest]["median_us"] / median, "proportional": whole * measured / median,
            "relative_error": relative_error(found, reference.flatten()) if s else float(found.abs().max()),
        })  # fmt: skip
        log.info("%s at %.3f of the experts: %.1f us, %.2fx of dense", name, s, median, rows[-1]["speedup"])
    return {"shape": name, **shape, "tokens": tokens, "kernel": backend.__name__.rpartition(".")[2], "dense": fastest,
            "times": times, "rows": rows}  # fmt: skip


def limit_for(scores: torch.Tensor, share: float) -> torch.Tensor:
    """The t with exactly round(share n) of n scores above it (up to ties), on the device."""
    kept = round(share * scores.numel())
    if kept == 0:
        return torch.full((), math.inf, device=scores.device)
    if kept == scores.numel():
        return torch.full((), -math.inf, device=scores.device)
    return scores.sort(descending=True).values[kept].clone()


def table(found: list[dict]) -> list[str]:
    """The part's lines of Markdown."""
    lines = ["", "## Expert FFN, router inside the clock", ""]
    for part in found:
        dense = part["times"][part["dense"]]["median_us"]
        lines += [f"**{part['shape']}**: {part['tokens']} token(s), d = {part['d']}, {part['experts']} experts of "
                  f"{part['size']}, {part['kernel']}; dense {dense:.1f} us ({part['dense']}).", "",
                  "| executed | us | speed-up over dense | of proportional | relative error |", "|---|---|---|---|---|"]  # fmt: skip
        lines += [
            f"| {r['measured']:.1%} | {r['median_us']:.1f} | {r['speedup']:.2f}x | {r['proportional']:.0%} "
            f"| {r['relative_error']:.1e} |"
            for r in part["rows"]
        ]
        lines.append("")
    return lines
