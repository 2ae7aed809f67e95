"""`sparsebench-bench`: what sparsity does to the clock, for the shapes of one model with random weights.

Each projection, the FFN block and the whole decode step are timed dense and sparse in one process, in turn. Weights
rotate over copies that together pass the last cache, so they come from memory; thresholds are exact quantiles of the
input, so the sparsity is real; inputs follow published histograms of Llama-2-7B where given, a normal distribution
otherwise. Beside each time stands the bandwidth it means and the share of the read bandwidth measured in the same run.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from sparsebench import decode, env, kernels, record
from sparsebench.config import setting
from sparsebench.measure import Contender, break_even, interleaved, summary
from sparsebench.models.language import Loaded
from sparsebench.modules.input_sparse import InputSparseLinear

log = logging.getLogger(__name__)
ROTATED_BYTES = 320e6  # more than any last-level cache here


@dataclass(kw_only=True)
class Bench:
    """Settings of a benchmark run."""

    parts: list[str] = setting(choices=("projections", "ffn", "step"))
    sparsities: list[float] = setting(ge=0, lt=1)
    contexts: list[int] = setting(gt=1)
    samples: int = setting(ge=30)
    warmup: int = setting(ge=3)
    histograms: str | None
    histogram_layer: int = setting(ge=0)
    output: str
    seed: int = setting(ge=0)
    model: Any
    hardware: Any

    def problems(self) -> list[str]:
        found = self.hardware.problems(None)
        if self.model.architecture is None:
            found.append(f"model={self.model.name} has no architecture to time with random weights")
        if self.histograms is not None and not Path(self.histograms, "histograms").is_dir():
            found.append(f"histograms must be a folder with histograms/layer-N/..., got {self.histograms!r}")
        return found


# ---------------------------------------------------------------------------------------------------------------------
# Inputs and clocks


def draw(count: int, group: str, settings: Bench, generator: torch.Generator) -> torch.Tensor:
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
    bodies: dict[str, Callable[[int], object]], copies: int, settings: Bench, device: torch.device
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
        contenders = [  # each its own copy at a time, so that none finds what another left in a cache
            Contender(lambda i, body=body, k=k: body((i * len(bodies) + k) % copies))
            for k, body in enumerate(bodies.values())
        ]
        scale = 1e3
    times, _ = interleaved(contenders, settings.warmup, settings.samples, device)
    return {name: [t * scale for t in each] for name, each in zip(bodies, times, strict=True)}


def read_bandwidth(device: torch.device) -> float:
    """GB/s of reading memory: a sum over 1 GiB (256 MiB on a CPU), best of several."""
    values = torch.randn((1 << 28) if device.type == "cuda" else (1 << 26), device=device)
    times, _ = interleaved([Contender(lambda _: values.sum())], 3, 10, device)
    return values.numel() * 4 / min(times[0]) / 1e6


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def projections(config: Any) -> dict[str, tuple[int, int, str]]:
    """The projections of a block: label -> (outputs m, inputs n, group of the input). q, k, v together, as they are read."""
    d, f = config.hidden_size, config.intermediate_size
    heads, groups, head_dim = decode.heads(config)
    return {
        "o": (d, heads * head_dim, "attn_out"),
        "q,k,v": ((heads + 2 * groups) * head_dim, d, "attn_in"),
        "up": (f, d, "mlp_in"),
        "down": (d, f, "mlp_mid"),
    }


def sparse_bodies(x, weights, thresholds, hardware) -> dict[str, Callable[[int], object]]:
    """Our kernels on one input x [n] (float32), by `name@sparsity`: as the fused step runs it, and as a product alone."""
    device, found = x.device, {}
    low = x.to(weights[0].dtype).view(1, 1, -1)
    backend = kernels.load(hardware.kernel_name)
    if hardware.kernel_name == "cuda_gather":
        from sparsebench.decode.fused_cuda import CANDIDATES, graph_time

        out = torch.zeros(weights[0].shape[1], device=device)
        middle = thresholds.get(0.5, next(iter(thresholds.values())))
        best = min(
            CANDIDATES["qkv"],
            key=lambda tuning: graph_time(lambda: [backend.accumulate(x, w, out, middle, tuning) for w in weights], 5),
        )
        for s, t in thresholds.items():
            found[f"fused@{s}"] = lambda i, t=t: backend.accumulate(x, weights[i], out, t, best)
            found[f"alone@{s}"] = lambda i, t=t: backend.input_sparse_linear(
                low, weights[i].t(), threshold=t, tuning=best
            )
    else:
        if hardware.kernel_name == "cpu_numba":
            found |= numba_bodies(low, weights, thresholds, backend)
        for s, t in thresholds.items():
            found[f"alone@{s}"] = lambda i, t=t: backend.input_sparse_linear(low, weights[i].t(), threshold=t)
    return found


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


def relative_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found.float().flatten() - reference).norm() / reference.norm())


def time_projections(config: Any, settings: Bench, bandwidth: float) -> list[dict]:
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
        row["break_even_sparsity"] = crossing(row, times[fastest]["median_us"])
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


def crossing(row: dict, dense_us: float) -> dict[str, float | None]:
    """Break-even sparsity per kind of kernel, from its times at the smallest and the largest sparsity."""
    found = {}
    for kind in {v["kind"] for v in row["sparse"].values()}:
        mine = sorted(
            (v["sparsity"], row["times"][k]["median_us"]) for k, v in row["sparse"].items() if v["kind"] == kind
        )
        (low, first), (high, last) = mine[0], mine[-1]
        found[kind] = break_even(dense_us, first, last, high) if low == 0 else None
    return found


def summary_us(samples: list[float]) -> dict:
    return {k.replace("_ms", "_us"): v for k, v in summary(samples).items()}


def time_ffn(config: Any, settings: Bench, bandwidth: float) -> list[dict]:
    """The neuron-sparse FFN (exact ReLU skipping, its dense gate included) against the dense block."""
    hardware = settings.hardware
    device, dtype = hardware.torch_device, hardware.torch_dtype
    d, f = config.hidden_size, config.intermediate_size
    copies = max(2, math.ceil(ROTATED_BYTES / (3 * d * f * dtype.itemsize)))
    gate, up = ([torch.randn(f, d, device=device).to(dtype) / d**0.5 for _ in range(copies)] for _ in range(2))
    down = [(torch.randn(f, d, device=device).to(dtype) / f**0.5).t() for _ in range(copies)]  # neuron contiguous
    plain = [w.contiguous() for w in down]
    x = torch.randn(1, 1, d, device=device, generator=torch.Generator(device).manual_seed(settings.seed)).to(dtype)
    name = next(n for n in ("cpu_numba", "cuda_triton") if kernels.device_of(n) == device.type)
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


def random_model(settings: Bench) -> Loaded:
    """The model's architecture with random weights on the device."""
    config = settings.model.config()
    torch.manual_seed(settings.seed)
    with torch.device(settings.hardware.torch_device):
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=settings.hardware.torch_dtype)
    return Loaded(module.eval().requires_grad_(False), None, {})


def time_step(settings: Bench) -> list[dict]:
    """The whole decode step by context: transformers' own dense step, the fused step dense and at every sparsity.

    Thresholds are the quantiles of each block's tensors over one dense pass, so each site drops its share.
    """
    from sparsebench.calibrate import AbsHistogram, observe
    from sparsebench.models.sites import find_blocks

    hardware, module = settings.hardware, random_model(settings).module
    device = hardware.torch_device
    generator = torch.Generator().manual_seed(settings.seed)
    longest = max(settings.contexts)
    ids = torch.randint(0, module.config.vocab_size, (1, longest), generator=generator).to(device)
    blocks = find_blocks(module)
    histograms = {(b.index, s.group): AbsHistogram(device) for b in blocks for s in b.sites.values()}
    first = {(b.index, s.group): s.path for b in reversed(blocks) for s in reversed(list(b.sites.values()))}
    observe(module, ids[:, :512], {first[k]: h.add for k, h in histograms.items()}, 1)
    plain = "compiled" if device.type == "cuda" else "eager"
    rows, steps = [], 8 if device.type == "cuda" else 1
    times: dict[tuple[int, str], list[float]] = {}
    for context in settings.contexts:  # dense first: the fused step changes how the weights are stored
        reference = decode.decoder(module, ids[:, :context], steps + 1, hardware, plain)
        times[context, f"dense/{plain}"] = run_steps(reference, ids, steps, settings, device)
        del reference
    decode.channel_major(module)
    fused_module = decode.fused(hardware)
    if hasattr(fused_module, "tune"):
        set_thresholds(module, blocks, histograms, 0.5)
        fused_module.tune(module, ids[:, : min(settings.contexts)])
    for context in settings.contexts:
        for s in settings.sparsities:
            set_thresholds(module, blocks, histograms, s)
            decoder = decode.decoder(module, ids[:, :context], steps + 1, hardware, "fused")
            errors = decoder.parity(ids[:, :1])
            times[context, f"sparse@{s}"] = run_steps(decoder, ids, steps, settings, device)
            rows.append({"context": context, "sparsity": s, "parity_relative_error": max(errors.values())})
            del decoder
    for row in rows:
        context, s = row["context"], row["sparsity"]
        dense = {name: summary(t) for (c, name), t in times.items() if c == context and "dense" in name}
        dense["dense/fused"] = summary(times.get((context, "sparse@0.0"), times[context, f"sparse@{s}"]))
        fastest = min(dense, key=lambda name: dense[name]["median_ms"])
        mine = summary(times[context, f"sparse@{s}"])
        row |= {
            "dense": fastest, "dense_engines": dense, "sparse": mine, "tokens_per_s": 1e3 / mine["median_ms"],
            "dense_tokens_per_s": 1e3 / dense[fastest]["median_ms"],
            "speedup": dense[fastest]["median_ms"] / mine["median_ms"],
        }  # fmt: skip
        log.info(
            "step, context %d, sparsity %.2f: %.1f tokens/s, %.2fx", context, s, row["tokens_per_s"], row["speedup"]
        )
    return rows


def set_thresholds(module, blocks, histograms, sparsity: float) -> None:
    for block in blocks:
        for site in block.sites.values():
            linear: InputSparseLinear = module.get_submodule(site.path)
            linear.threshold.fill_(histograms[block.index, site.group].quantile(sparsity) if sparsity else -1.0)


def run_steps(decoder, ids: torch.Tensor, steps: int, settings: Bench, device: torch.device) -> list[float]:
    """Milliseconds per step, `steps` in a row to a sample."""

    def call(i: int) -> None:
        for b in range(steps):
            at = (i * steps + b) % ids.shape[1]
            decoder.step(ids[:, at : at + 1])

    for _ in range(3):
        decoder.rewind()
        call(0)
    times, _ = interleaved([Contender(call, decoder.rewind)], settings.warmup, settings.samples, device)
    return [t / steps for t in times[0]]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def run(settings: Bench, configuration: dict) -> Path:
    """All parts, written as they are finished: record, table and plot in the output folder."""
    from sparsebench import bench_report

    hardware = settings.hardware
    hardware.prepare()
    settings.model.weights = "random"
    config = settings.model.config()
    bandwidth = read_bandwidth(hardware.torch_device)
    found = {
        "schema_version": 1, "kind": "bench", "model": settings.model.name, "weights": "random", "config": configuration,
        "input": (settings.histograms and "published Llama-2-7B histograms") or "normal distribution",
        "env": env.describe(hardware.torch_device.type) | {"hardware": hardware.read_back()},
        "read_bandwidth_gbs": bandwidth,
    }  # fmt: skip
    folder = Path(settings.output)
    parts = {
        "projections": lambda: time_projections(config, settings, bandwidth),
        "ffn": lambda: time_ffn(config, settings, bandwidth),
        "step": lambda: time_step(settings),
    }
    for part in settings.parts:
        log.info("timing %s", part)
        found[part] = parts[part]()
        record.write_atomic(folder / "result.json", json.dumps(record.plain(found), indent=1).encode())
    (folder / "table.md").write_text(bench_report.table(found))
    bench_report.plot(found, folder / "speedup.png")
    return folder


def main() -> None:
    """Entry point of the console script."""
    import hydra

    from sparsebench import config as checks

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    def task(composed) -> None:
        configuration = checks.to_dict(composed)
        configuration.pop("dataset")  # models name one, timing needs none
        problems: list[str] = []
        settings = checks.build(configuration, "", problems, Bench)
        problems += settings.problems() if settings is not None else []
        if problems:
            for line in problems:
                print(f"error: {line}", file=sys.stderr)
            sys.exit(2)
        folder = run(settings, configuration)
        print((folder / "table.md").read_text())
        print(json.dumps({"record": str(folder / "result.json"), "plot": str(folder / "speedup.png")}))

    hydra.main(version_base="1.3", config_path=f"pkg://{checks.CONFIG_MODULE}", config_name="bench")(task)()
