"""Expert kernels at two published shapes: many tokens (D2DMoE, section 5 of its specification) and one token (LTE, 4.3).

D2DMoE: T = 256 x 197 tokens, d = 768, E = 24 experts of 128, ReLU, Bernoulli routing, beside the dense MLP and the dense
MLP narrowed to the same active width. LTE: the FFN of Llama-2-7B in 344 experts of 32, SwiGLU, one token. What is
timed is ExpertFFN's own forward pass: router, rule (`above`, its tau so that the wanted share passes), grouping, maps.
"""

from __future__ import annotations

import logging
import math

import torch
import torch.nn.functional as F

from sparsebench.bench.clock import ROTATED_BYTES, clock, summary_us
from sparsebench.bench.projections import relative_error
from sparsebench.kernels import masked_dense
from sparsebench.modules.expert_ffn import ExpertFFN, Router

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


@torch.no_grad()
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
    width = shape["width"]
    router = Router(
        normal(width or shape["experts"], d, scale=d**-0.5),
        normal(shape["experts"], width, scale=width**-0.5) if width else None,
    ).to(device, dtype if width else torch.float32)  # as the methods have it: LTE's in float32, D2DMoE's as the model
    ffns = []
    for _ in range(copies):
        maps = {"first": normal(f, d, scale=d**-0.5), "last": normal(f, d, scale=f**-0.5)}
        maps |= {"up": normal(f, d, scale=d**-0.5)} if shape["gated"] else {}
        ffns.append(
            ExpertFFN(maps, activation, shape["experts"], site="ffn", dense_macs={}, kernel=hardware.kernel_name)
        )
        ffns[-1].router, ffns[-1].rule, ffns[-1].mode = router, "above", "hard"
    first, last, up = ([getattr(ffn, name) for ffn in ffns] for name in ("first", "last", "up"))
    taus = {s: tau_for(router(x).flatten(), s) for s in SHARES}

    def sparse(i: int, share: float) -> torch.Tensor:
        ffns[i].threshold = taus[share]
        return ffns[i](x)

    def dense(i: int, count: int = f) -> torch.Tensor:
        hidden = masked_dense.expert_hidden(
            x, first[i][:count], activation, up=None if up[i] is None else up[i][:count]
        )
        return F.linear(hidden[2], last[i][:count].t())

    bodies = {"dense": dense}
    if device.type == "cuda":
        bodies["dense torch.compile"] = torch.compile(dense, dynamic=False)
    for s in SHARES:
        bodies[f"experts@{s}"] = lambda i, s=s: sparse(i, s)
        if tokens > 1 and s:
            bodies[f"narrow@{s}"] = lambda i, s=s: dense(i, round(s * f))
    times = {k: summary_us(v) for k, v in clock(bodies, copies, settings, device).items()}
    fastest = min((k for k in times if k.startswith("dense")), key=lambda k: times[k]["median_us"])
    whole = times["experts@1.0"]["median_us"]
    rows = []
    for s in SHARES:
        part = slice(0, 512)
        result, keep = sparse(0, s)[part], ffns[0].keep(x)
        measured, median = float(keep.float().mean()), times[f"experts@{s}"]["median_us"]
        reference = masked_dense.expert_ffn(
            x[part].float(), keep[part], first[0].float(), last[0].float(), activation,
            up=None if up[0] is None else up[0].float(),
        )  # fmt: skip
        rows.append({
            "executed": s, "measured": measured, "median_us": median,
            "speedup": times[fastest]["median_us"] / median, "proportional": whole * measured / median,
            "relative_error": relative_error(result, reference.flatten()) if s else float(result.abs().max()),
        })  # fmt: skip
        log.info("%s at %.3f of the experts: %.1f us, %.2fx of dense", name, s, median, rows[-1]["speedup"])
    return {"shape": name, **shape, "tokens": tokens, "kernel": ffns[0].kernel(tokens), "dense": fastest,
            "times": times, "rows": rows}  # fmt: skip


def tau_for(scores: torch.Tensor, share: float) -> torch.Tensor:
    """The tau with exactly round(share n) of n scores above its logit (up to ties), on the device."""
    kept = round(share * scores.numel())
    if kept in (0, scores.numel()):
        return torch.full((), -1.0 if kept else 1.0, device=scores.device)
    neighbours = scores.sort(descending=True).values[kept - 1 : kept + 1]
    return neighbours.double().mean().sigmoid().float()
