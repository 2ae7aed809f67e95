"""Few rows on a GPU: products, attention over kept heads, prefill, decode steps and verify steps at Llama-2-7B's shape.

    python scripts/bench_rows.py --out rows.jsonl [--seconds 170] [--layers 4] [--dtype float16]

Every figure is a line of JSON with the card's name: what was timed, dense and sparse, the error against masked-dense in
fp32, the union that was read. What does not fit the time is named in the last line. Exits with 1 where a check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from sparsebench import kernels
from sparsebench.engines import channel_major
from sparsebench.kernels import cuda_rows, masked_dense
from sparsebench.measure import clock, few_rows, latency, prompt_pass
from sparsebench.measure.clock import Contender, interleaved, summary
from sparsebench.modules.input_sparse import InputSparseLinear
from sparsebench.modules.masking import share_rules
from sparsebench.modules.storage import sharing_copy

SHAPES = {"q": (4096, 4096), "up": (11008, 4096), "down": (4096, 11008)}  # (m, n) of Llama-2-7B
BATCHES, CHUNKS = (1, 2, 4, 8, 16, 32, 64), (2, 4, 8)
SPARSITIES = (0.5, 0.9)
LIMIT = {torch.float16: 3e-3, torch.bfloat16: 2e-2}
COPIES = 4  # of a weight, so that it does not stay in the cache
WARMUP, SAMPLES = 3, 30


class Out:
    """The lines of JSON: printed, and added to a file."""

    def __init__(self, file: str | None, seconds: float):
        self.file, self.card = file, torch.cuda.get_device_name()
        self.end, self.failed, self.left_out = time.perf_counter() + seconds, 0, []

    def add(self, what: str, **figures: Any) -> None:
        line = json.dumps({"what": what, "card": self.card, **figures})
        print(line, flush=True)
        if self.file:
            with open(self.file, "a") as lines:
                lines.write(line + "\n")
        self.failed += figures.get("right") is False

    def time_for(self, what: str, seconds: float) -> bool:
        """Whether so many seconds are left; else it is named at the end."""
        if time.perf_counter() + seconds < self.end:
            return True
        self.left_out.append(what)
        return False


def graphs(bodies: dict[str, Any]) -> dict[str, list[float]]:
    """Microseconds of each body(i), captured over all weight copies in one CUDA graph and taken in turn."""
    contenders = {}
    for name, body in bodies.items():
        for i in range(COPIES):
            body(i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(COPIES):
                body(i)
        contenders[name] = Contender(lambda _, graph=graph: graph.replay())
    times, _ = interleaved(list(contenders.values()), WARMUP, SAMPLES, torch.device("cuda"))
    return {name: [1e3 * t / COPIES for t in each] for name, each in zip(contenders, times, strict=True)}


def micro(samples: list[float]) -> dict[str, float]:
    return {k.replace("_ms", "_us"): v for k, v in summary(samples).items() if k != "samples_ms"}


def products(out: Out, dtype: torch.dtype) -> None:
    """Input-sparse products of B rows against the best dense product of as many."""
    normal = torch.distributions.Normal(0, 1)
    limits = {s: normal.icdf(torch.tensor((1 + s) / 2)).cuda() for s in SPARSITIES}
    for site, (m, n) in SHAPES.items():
        weights = [torch.randn(n, m, device="cuda").div_(n**0.5).to(dtype).t() for _ in range(COPIES)]  # channel-major
        for batch in BATCHES:
            product(out, site, weights, torch.randn(batch, 1, n, device="cuda").to(dtype), limits)


def product(out: Out, site: str, weights: list[torch.Tensor], x: torch.Tensor, limits: dict) -> None:
    """One shape at one batch size. weights: [m, n] each, channel-major; x [B, 1, n]; limits: threshold by sparsity."""
    (m, n), rowwise, dtype = weights[0].shape, [w.contiguous() for w in weights], x.dtype
    name = kernels.name_of(kernels.serving("cuda_gather", x, weights[0]))
    simulated, run = not kernels.load(name).SKIPS, kernels.load(name).input_sparse_linear

    def sparse(limit: torch.Tensor) -> Any:
        return lambda i: run(x, weights[i], threshold=limit)

    bodies = {
        "dense, torch": lambda i: F.linear(x, rowwise[i]),
        "dense, torch, transposed": lambda i: F.linear(x, weights[i]),
    }
    bodies |= {} if simulated else {f"dense, {name}": sparse(torch.tensor(-1.0, device="cuda"))}
    taken = graphs(bodies | {f"sparse@{s}": sparse(limit) for s, limit in limits.items()})
    best = min((k for k in taken if k.startswith("dense")), key=lambda k: summary(taken[k])["median_ms"])
    for s, limit in limits.items():
        expected = masked_dense.input_sparse_linear(x.float(), weights[0].float(), threshold=limit)
        error = float((sparse(limit)(0).float() - expected).norm() / expected.norm())
        union = float(masked_dense.kept(x.float(), limit).flatten(0, 1).any(0).float().mean())
        pair = {} if simulated else clock.speedup(taken[best], taken[f"sparse@{s}"])
        out.add(
            "product", site=site, m=m, n=n, batch=len(x), sparsity=s, union_density=union, kernel=name,
            simulated=simulated, dense=micro(taken[best]), dense_kernel=best, sparse=micro(taken[f"sparse@{s}"]),
            **pair, error=error, right=error < LIMIT[dtype], dtype=str(dtype),
        )  # fmt: skip


def attention(out: Out, batch: int, dtype: torch.dtype, context: int = 2048) -> None:
    """Decode attention of B sequences over kept heads against torch's over all."""
    q = torch.randn(batch, 32, 128, device="cuda").to(dtype)
    cache = [torch.randn(2, batch, 32, context, 128, device="cuda", dtype=dtype) for _ in range(COPIES)]
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    keep = {d: torch.rand(batch, 32, device="cuda").argsort(-1) < round(32 * d) for d in (0.25, 0.5, 1.0)}

    def kept(d: float) -> Any:
        return lambda i: cuda_rows.selective_attention(q, *cache[i], keep[d], lengths, 128**-0.5)

    bodies = {"dense": lambda i: F.scaled_dot_product_attention(q.unsqueeze(2), *cache[i])}
    taken = graphs(bodies | {f"kept@{d}": kept(d) for d in keep})
    taken["dense"] = min((taken["dense"], taken["kept@1.0"]), key=lambda t: summary(t)["median_ms"])
    few = slice(0, 4)  # the reference takes fp32 copies
    for d in keep:
        wide = [t[few].float() for t in cache[0]]
        expected = masked_dense.selective_attention(q[few].float(), *wide, keep[d][few], lengths[few], 128**-0.5)
        error = float((kept(d)(0)[few].float() - expected).norm() / expected.norm())
        out.add(
            "attention", batch=batch, context=context, density=d, dense=micro(taken["dense"]),
            sparse=micro(taken[f"kept@{d}"]), **clock.speedup(taken["dense"], taken[f"kept@{d}"]), error=error,
            right=error < LIMIT[dtype], dtype=str(dtype),
        )  # fmt: skip


def models(dtype: torch.dtype, layers: int) -> Iterator[tuple[float, Any, Any]]:
    """(sparsity, dense, sparse) models of Llama-2-7B's shape with random weights, thresholds from one pass."""
    shape = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=layers
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        dense = transformers.AutoModelForCausalLM.from_config(shape, dtype=dtype).eval().requires_grad_(False)
    sparse = sharing_copy(dense)
    channel_major(sparse)
    maps = [m for m in sparse.modules() if isinstance(m, InputSparseLinear)]
    for each in maps:
        each.kernel_name = "cuda_gather"
        kernels.chain("cuda_gather")
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, args: seen.update({m.site: args[0].abs().float().flatten()[: 1 << 22]}))
        for m in maps
    ]
    with torch.no_grad():
        sparse(input_ids=torch.randint(0, 32000, (1, 128), device="cuda"), use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    for s in SPARSITIES:
        for each in maps:
            each.threshold = seen[each.site].kthvalue(int(s * len(seen[each.site]))).values.clone()
        share_rules(sparse, InputSparseLinear)
        yield s, dense, sparse


def steps(out: Out, dtype: torch.dtype, layers: int) -> None:
    """Prefill of 128 tokens; decode steps of B texts and verify steps, compiled by both sides."""
    hardware = SimpleNamespace(
        torch_device=torch.device("cuda"),
        devices=1,
        skips=True,
        engine="auto",
        torch_dtype=dtype,
        kernel_name="cuda_gather",
    )
    settings = SimpleNamespace(samples=SAMPLES, warmup=WARMUP, context=128)
    ids = torch.randint(0, 32000, (64 * 256,), generator=torch.Generator().manual_seed(1)).cuda()
    for s, dense, sparse in models(dtype, layers):
        about = {"layers": layers, "sparsity": s, "dtype": str(dtype)}
        if s == SPARSITIES[0] and out.time_for("prefill", 40):
            ran, refused = prompt_pass.prefills({"dense": dense, "sparse": sparse}, ids[None, :128], hardware)
            times, _ = interleaved(list(ran.values()), WARMUP, SAMPLES, hardware.torch_device)
            figures = clock.fastest({n: summary(t) for n, t in zip(ran, times, strict=True)})
            engines = {name: each["median_ms"] for name, each in figures["engines"].items()}
            out.add("prefill", tokens=128, simulated=True, engines_ms=engines, refused=refused, **about,
                    dense_ms=figures["dense"]["median_ms"], sparse_ms=figures["sparse"]["median_ms"])  # fmt: skip
        like = latency.Text(ids[None, :128], ids[128:256], block=latency.BLOCK)
        wanted = [("verify", 1, k) for k in reversed(CHUNKS)] + [("decode", b, 1) for b in (4, 8, 2, 16, 64, 32)]
        for what, batch, width in wanted if s == SPARSITIES[0] else wanted[:5]:
            name = f"{what} at {batch * width} rows, sparsity {s}"
            if not out.time_for(name, 25):
                continue
            text = few_rows.Rows.of(ids, batch, 128, width, like)
            try:
                row = few_rows.timed(dense, sparse, text, settings, hardware)
            except ArithmeticError as error:
                out.add(what, batch=batch, chunk=width, right=False, error=str(error), **about)
                continue
            union = few_rows.union_of_rows(dense, sparse, text, [batch * width], settings)[str(batch * width)]
            out.add(what, batch=batch, chunk=width, right=True, union_density=1 - union["sparsity"], **row, **about)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out")
    parser.add_argument("--seconds", type=float, default=170)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    given = parser.parse_args()
    out, dtype = Out(given.out, given.seconds), getattr(torch, given.dtype)
    with torch.no_grad():
        products(out, dtype)
        for batch in (1, 8, 64):
            attention(out, batch, dtype)
            torch.cuda.empty_cache()
        steps(out, dtype, given.layers)
    out.add("end", failed=out.failed, left_out=out.left_out)
    return int(out.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
