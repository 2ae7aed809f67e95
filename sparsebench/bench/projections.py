"""Single projections and the neuron-sparse FFN, dense against sparse, with errors, bandwidth and break-even."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sparsebench import engines, kernels
from sparsebench.bench.clock import ROTATED_BYTES, clock, draw, summary_us, threshold_for
from sparsebench.measure.clock import break_even

log = logging.getLogger(__name__)


def projections(config: Any) -> dict[str, tuple[int, int, str]]:
    """The projections of a block: label -> (outputs m, inputs n, group of the input). q, k, v together, as they are read."""
    d, f = config.hidden_size, config.intermediate_size
    heads, groups, head_dim = engines.heads(config)
    return {
        "o": (d, heads * head_dim, "attn_out"),
        "q,k,v": ((heads + 2 * groups) * head_dim, d, "attn_in"),
        "up": (f, d, "mlp_in"),
        "down": (d, f, "mlp_mid"),
    }


def sparse_bodies(x, weights, thresholds, hardware) -> dict[str, Callable[[int], object]]:
    """Our kernels on one input x [n] (float32), by `name@sparsity`: as the fused step runs it, and as a product alone."""
    device, bodies = x.device, {}
    low = x.to(weights[0].dtype).view(1, 1, -1)
    backend = kernels.load(hardware.kernel_name)
    if hardware.kernel_name == "cuda_gather":
        from sparsebench.engines.tune_cuda import CANDIDATES, graph_time

        out = torch.zeros(weights[0].shape[1], device=device)
        middle = thresholds.get(0.5, next(iter(thresholds.values())))
        best = min(
            CANDIDATES["qkv"],
            key=lambda tuning: graph_time(lambda: [backend.accumulate(x, w, out, middle, tuning) for w in weights], 5),
        )
        for s, t in thresholds.items():
            bodies[f"fused@{s}"] = lambda i, t=t: backend.accumulate(x, weights[i], out, t, best)
            bodies[f"alone@{s}"] = lambda i, t=t: backend.input_sparse_linear(
                low, weights[i].t(), threshold=t, tuning=best
            )
    else:
        if hardware.kernel_name == "cpu_numba":
            bodies |= numba_bodies(low, weights, thresholds, backend)
        for s, t in thresholds.items():
            bodies[f"alone@{s}"] = lambda i, t=t: backend.input_sparse_linear(low, weights[i].t(), threshold=t)
    return bodies


def numba_bodies(low, weights, thresholds, backend) -> dict[str, Callable[[int], object]]:
    """The compiled product called on arrays made ready, as the fused step calls it (one thread)."""
    n, m = weights[0].shape
    arrays, x, out = [backend.as_numpy(w) for w in weights], backend.as_numpy(low[0]), torch.empty_like(weights[0][:1])
    rest = (
        np.empty(n + 1, np.int64),
        np.empty((1, n + 1), np.float32),
        np.empty((1, m), np.float32),
        backend.as_numpy(out),
    )
    nothing = arrays[0][0, :0]

    def body(t: float) -> Callable[[int], object]:
        return lambda i: backend.linear(x, arrays[i], nothing, np.float32(t), backend.NO_SCALE, *rest)

    return {f"fused@{s}": body(float(t)) for s, t in thresholds.items()} if torch.get_num_threads() == 1 else {}


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    return float((result.float().flatten() - reference).norm() / reference.norm())


def time_projections(config: Any, settings, bandwidth: float) -> list[dict]:
    """One row per projection: dense and sparse times, errors against an fp32 masked reference, break-even sparsity."""
    hardware, rows = settings.hardware, []
    device, dtype = hardware.torch_device, hardware.torch_dtype
    generator = torch.Generator().manual_seed(settings.seed)
    for label, (m, n, group) in projections(config).items():
        size = m * n * dtype.itemsize
        copies = max(2, math.ceil(ROTATED_BYTES / size))
        stored = [torch.randn(n, m, device=device).to(dtype) for _ in range(copies)]  # channel contiguous
        dense = [w.t().contiguous() for w in stored]
        x = draw(n, group, settings, generator).to(dtype).float().to(device)
        low = x.to(dtype).view(1, -1)
        thresholds = {s: torch.tensor(threshold_for(x, s), device=device) for s in settings.sparsities}
        bodies = {
            "dense F.linear": lambda i, low=low, dense=dense: F.linear(low, dense[i]),
            "dense mv": lambda i, low=low, dense=dense: torch.mv(dense[i], low[0]),
        }
        if device.type == "cuda":
            compiled = torch.compile(F.linear, options={"coordinate_descent_tuning": True}, dynamic=False)
            bodies["dense torch.compile"] = lambda i, low=low, dense=dense, compiled=compiled: compiled(low, dense[i])
        ours = sparse_bodies(x, stored, thresholds, hardware)
        times = {name: summary_us(t) for name, t in clock(bodies | ours, copies, settings, device).items()}
        fastest = min((name for name in times if name.startswith("dense")), key=lambda name: times[name]["median_us"])
        row = {"projection": label, "m": m, "n": n, "group": group, "dense": fastest, "times": times, "sparse": {}}
        for name in ours:
            kind, _, s = name.partition("@")
            s = float(s)
            reference = stored[0].float().t() @ torch.where(x.abs() > thresholds[s], x, 0)
            row["sparse"][name] = {
                "kind": kind, "sparsity": s, "measured": float((x.abs() <= thresholds[s]).float().mean()),
                "speedup": times[fastest]["median_us"] / times[name]["median_us"],
                "bandwidth_gbs": size * (1 - s) / times[name]["median_us"] / 1e3,
                "of_read_bandwidth": size * (1 - s) / times[name]["median_us"] / 1e3 / bandwidth,
                "relative_error": check_error(kind, x, stored[0], thresholds[s], reference, hardware),
            }  # fmt: skip
        row["dense_bandwidth_gbs"] = size / times[fastest]["median_us"] / 1e3
        row["break_even"] = crossings(row)
        rows.append(row)
        log.info("%s %dx%d: %s", label, m, n, ", ".join(f"{k} {v['speedup']:.2f}x" for k, v in row["sparse"].items()))
        del stored, dense
    return rows


def check_error(kind: str, x, weight, threshold, reference, hardware) -> float:
    """The kernel's error on outputs that held garbage before."""
    backend = kernels.load(hardware.kernel_name)
    if kind == "fused" and hardware.kernel_name == "cuda_gather":
        out = torch.zeros(weight.shape[1], device=x.device)
        backend.accumulate(x, weight, out, threshold, backend.Tuning())
        return relative_error(out, reference)
    torch.empty(weight.shape[1], device=x.device, dtype=weight.dtype).fill_(
        float("nan")
    )  # poison what may be handed out
    low = x.to(weight.dtype).view(1, 1, -1)
    return relative_error(backend.input_sparse_linear(low, weight.t(), threshold=threshold), reference)


def crossings(row: dict) -> dict[str, dict]:
    """Break-even sparsity per kind of kernel against the dense product, from its times at every sparsity."""
    curves: dict[str, dict[float, list[float]]] = {}
    for name, timing in row["sparse"].items():
        curves.setdefault(timing["kind"], {})[timing["sparsity"]] = row["times"][name]["samples_us"]
    dense = row["times"][row["dense"]]["samples_us"]
    sections = {kind: break_even(dense, curve) for kind, curve in curves.items()}
    return {kind: {k: v for k, v in each.items() if k != "points"} for kind, each in sections.items()}


def time_ffn(config: Any, settings, bandwidth: float) -> list[dict]:
    """The neuron-sparse FFN (exact ReLU skipping, its dense gate included) against the dense block."""
    hardware = settings.hardware
    device, dtype = hardware.torch_device, hardware.torch_dtype
    d, f = config.hidden_size, config.intermediate_size
    copies = max(2, math.ceil(ROTATED_BYTES / (3 * d * f * dtype.itemsize)))
    gate, up = ([torch.randn(f, d, device=device).to(dtype) / d**0.5 for _ in range(copies)] for _ in range(2))
    down = [(torch.randn(f, d, device=device).to(dtype) / f**0.5).t() for _ in range(copies)]  # neuron contiguous
    plain = [w.contiguous() for w in down]
    x = torch.randn(1, 1, d, device=device, generator=torch.Generator(device).manual_seed(settings.seed)).to(dtype)
    name = next(n for n in ("cpu_numba", "cuda_gather") if kernels.device_of(n) == device.type)
    backend = kernels.load(name)
    scores = torch.stack([F.linear(x, g).flatten().float() for g in gate])

    def dense(i: int) -> torch.Tensor:
        return F.linear(F.relu(F.linear(x, gate[i])) * F.linear(x, up[i]), plain[i])

    bodies, limits = {"dense": dense}, {}
    for s in settings.sparsities:
        limits[s] = limit = float(scores.flatten().quantile(s)) if s else -math.inf

        def sparse(i: int, limit: float = limit) -> torch.Tensor:
            score = F.linear(x, gate[i])
            return backend.neuron_sparse_ffn(x, torch.where(score > limit, score, 0), up[i], down[i])

        bodies[f"neuron@{s}"] = sparse
    times = {k: summary_us(t) for k, t in clock(bodies, copies, settings, device).items()}
    rows = []
    for s, limit in limits.items():
        score = F.linear(x, gate[0]).float()
        active = torch.where(score > limit, score, 0)
        read = d * f * dtype.itemsize * (1 + 2 * (1 - s))  # bytes: the gate whole, up and down where active
        reference = F.linear(active * F.linear(x.float(), up[0].float()), plain[0].float()).flatten()
        rows.append(
            {
                "kernel": name,
                "sparsity": s,
                "measured": float((active == 0).float().mean()),
                "dense": times["dense"],
                "sparse": times[f"neuron@{s}"],
                "speedup": times["dense"]["median_us"] / times[f"neuron@{s}"]["median_us"],
                "relative_error": relative_error(bodies[f"neuron@{s}"](0), reference),
                "of_read_bandwidth": read / times[f"neuron@{s}"]["median_us"] / 1e3 / bandwidth,
            }
        )
        log.info("neuron-sparse FFN at %.2f: %.2fx", s, rows[-1]["speedup"])
    return rows
