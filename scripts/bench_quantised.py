"""Quantised weights x sparsity on this GPU: checks the kernels, then times products and decode steps, all in one process.

    python scripts/bench_quantised.py <folder> [--model llama2-7b llama3-8b] [--bits 8 4] [--seconds 230]

Shapes of Llama-2-7B (fp16) and Llama-3-8B (bf16) with random weights: 4 of 32 layers and an eighth of the head, so that
the head's share of a step is that of the whole model. Dense quantised products are torch's
own (int8pack, int4pack), the gpt-fast form that torch.compile fuses (int8), torchao's where it is installed, and ours with
nothing skipped; beside them dense products in 16 bits. One JSON file per figure: `<model>-<what>-int<bits>.json`, each with
the card's name; a baseline that could not be had says why. What no longer fits into --seconds is left out and says so.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

from sparsebench import engines
from sparsebench.bench.clock import threshold_for
from sparsebench.bench.step import MODELS, contender, in_turn, set_thresholds, thresholds
from sparsebench.engines import fused_cuda, tune_cuda
from sparsebench.kernels import _nvrtc, cuda_gather, cuda_packed
from sparsebench.kernels._packed import Packed, quantised
from sparsebench.measure.clock import read_bandwidth
from sparsebench.models.quantised import quantise
from sparsebench.modules.input_sparse import replace
from sparsebench.modules.quant_sparse import QuantLinear, TorchQuantLinear, with_torch_products
from sparsebench.sites import find_blocks

SPARSITIES = (0.25, 0.5, 0.65)
GROUP, LAYERS, CONTEXT, ROTATED = 128, 4, 128, 320e6
START = time.perf_counter()


def log(*words) -> None:
    print(f"{time.perf_counter() - START:6.1f} s", *words, flush=True)


class Sheet:
    """One figure's JSON, written after every line."""

    def __init__(self, folder: Path, name: str, **about):
        self.path = folder / f"{name}.json"
        self.content = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            **about,
            "rows": [],
            "left_out": {},
        }

    def add(self, row: dict) -> None:
        self.content["rows"].append(row)
        self.write()

    def write(self) -> None:
        self.path.write_text(json.dumps(self.content, indent=1))


# ---------------------------------------------------------------------------------------------------------------------
# Products


def graph_of(body: Callable[[int], object], copies: int):
    """A CUDA graph of `body` over all weight copies; it keeps `body`, whose tensors it reads by address."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(copies):
            body(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            body(i)
    graph.body = body
    return graph


def timed(graphs: dict[str, object], copies: int, rounds: int = 15) -> dict[str, float]:
    """Median microseconds per call, all graphs in turn."""
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds + 2):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples[name].append(1e3 * start.elapsed_time(end) / copies)
    return {name: statistics.median(each[2:]) for name, each in samples.items()}


def torch_bodies(weights: list[Packed], low: torch.Tensor) -> dict[str, Callable[[], Callable[[int], object]]]:
    """Makers of dense quantised products that are not ours, by name; a maker raises where there is none."""

    def own():
        maps = [TorchQuantLinear(QuantLinear(p, None)) for p in weights]
        return lambda i: maps[i](low)

    def fused_cast():
        """gpt-fast's int8: torch.compile puts the cast into the product."""
        maps = [(p.levels().t().contiguous(), p.scale.flatten().to(low.dtype)) for p in weights]
        product = torch.compile(
            lambda x, q, s: F.linear(x, q.to(x.dtype)) * s, dynamic=False, options={"coordinate_descent_tuning": True}
        )
        return lambda i: product(low, *maps[i])

    def torchao():
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        maps = []
        for p in weights:
            m, n = p.shape
            linear = torch.nn.Linear(n, m, bias=False, device="cuda", dtype=torch.bfloat16)
            linear.weight.data.copy_(p.dequantised())
            config = Int8WeightOnlyConfig() if p.bits == 8 else Int4WeightOnlyConfig(group_size=GROUP, version=1)
            quantize_(linear, config)
            maps.append(torch.compile(linear, dynamic=False))
        x = low.bfloat16()
        return lambda i: maps[i](x)

    makers = {"torch": own} | ({"gpt-fast int8": fused_cast} if weights[0].bits == 8 else {})
    return makers | ({"torchao": torchao} if importlib.util.find_spec("torchao") else {})


def products(folder: Path, name: str, bits: int, deadline: float) -> None:
    """Per projection: errors against fp32 on the dequantised weights, microseconds dense and sparse."""
    sizes, dtype = MODELS[name]
    d, f, groups = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_key_value_heads"]
    shapes = {"q": (d, d), "k": (groups * d // sizes["num_attention_heads"], d), "up": (f, d), "down": (d, f)}
    sheet = Sheet(folder, f"{name}-products-int{bits}", model=name, bits=bits, group=GROUP, dtype=str(dtype))
    for label, (m, n) in shapes.items():
        if time.perf_counter() > deadline:
            sheet.content["left_out"][label] = "no time left"
            continue
        torch.manual_seed(0)
        copies = max(2, int(ROTATED / (m * n * bits / 8)) if label != "k" else 8)
        copies = min(copies, 40)
        full = torch.randn(m, n, device="cuda", dtype=dtype) * n**-0.5
        first = quantised(full, bits, GROUP)
        aside = (first.scale, None, first.shape, bits, first.group, "input", dtype)
        weights = [first] + [Packed(first.q.clone(), *aside) for _ in range(copies - 1)]
        x = torch.randn(n, device="cuda")
        low, exact = x.to(dtype).view(1, -1), first.dequantised(torch.float32)
        plain = [full] + [full.clone() for _ in range(min(copies, 8) - 1)]
        limits = {s: torch.tensor(threshold_for(x, s), device="cuda") for s in (0.0, *SPARSITIES)}
        out = torch.zeros(m, device="cuda")
        errors = {}
        for dense in (True, False):
            for s, limit in {0.0: limits[0.0]}.items() if dense else limits.items():
                out.zero_()
                cuda_packed.accumulate(x, first, out, limit, cuda_packed.TUNINGS[bits], dense)
                expected = exact @ torch.where(x.abs() > limit, x, 0)
                errors[f"{'dense' if dense else 'sparse'}@{s}"] = float((out - expected).norm() / expected.norm())
        assert max(errors.values()) < 1e-4, (label, errors)

        def ours(s, tuning, dense=False, weights=weights, x=x, out=out, limits=limits):
            return lambda i: cuda_packed.accumulate(x, weights[i], out, limits[s], tuning, dense)

        chosen = {}
        for key, s, dense in (("dense", 0.0, True), ("sparse", 0.5, False)):
            tried = {t: graph_of(ours(s, t, dense), copies) for t in tune_cuda.PACKED_CANDIDATES}
            times = timed(tried, copies, 5)
            chosen[key] = min(times, key=times.get)
        graphs = {"16 bits": graph_of(lambda i, low=low, plain=plain: F.linear(low, plain[i % len(plain)]), copies)}
        for maker, make in torch_bodies(weights, low).items():
            try:
                graphs[maker] = graph_of(make(), copies)
            except (ValueError, RuntimeError, ImportError) as error:  # not in this torch, or not for this shape
                sheet.content["left_out"][f"{label}: {maker}"] = str(error).partition("\n")[0][:200]
        graphs["ours dense"] = graph_of(ours(0.0, chosen["dense"], True), copies)
        graphs |= {f"ours@{s}": graph_of(ours(s, chosen["sparse"]), copies) for s in SPARSITIES}
        times = timed(graphs, copies)
        dense = {k: v for k, v in times.items() if k != "16 bits" and "@" not in k}
        best = min(dense, key=dense.get)
        row = {
            "projection": label, "m": m, "n": n, "copies": copies, "errors": errors, "microseconds": times,
            "dense": best, "bytes": first.bytes, "tunings": {k: str(v) for k, v in chosen.items()},
            "speedup": {s: times[best] / times[f"ours@{s}"] for s in SPARSITIES},
        }  # fmt: skip
        sheet.add(row)
        log(name, f"int{bits}", label, {k: round(v, 1) for k, v in times.items()}, "dense:", best,
            {s: round(v, 2) for s, v in row["speedup"].items()})  # fmt: skip
    sheet.write()


# ---------------------------------------------------------------------------------------------------------------------
# Decode steps


def random_model(name: str) -> torch.nn.Module:
    sizes, dtype = MODELS[name]
    sizes = sizes | {"vocab_size": sizes["vocab_size"] * LAYERS // 32}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=LAYERS, max_position_embeddings=4096)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


class Fast8(torch.nn.Module):
    """gpt-fast's int8 map: torch.compile puts the cast into the product."""

    def __init__(self, packed: Packed):
        super().__init__()
        self.register_buffer("q", packed.levels().t().contiguous())
        self.register_buffer("s", packed.scale.flatten().to(packed.dtype))

    def forward(self, x):
        return F.linear(x, self.q.to(x.dtype)) * self.s


def gpt_fast(module: torch.nn.Module) -> None:
    for block in find_blocks(module):
        for path in [site.path for site in block.sites.values()]:
            replace(module, path, Fast8(module.get_submodule(path).packed))


def compile_all(bits: int, step_defines: Callable, tunings) -> None:
    """Every variant of the kernels that will be asked for, compiled side by side."""
    variants = [step_defines(t) | extra for t in tunings for extra in ({}, {"DENSE": 1})]
    _nvrtc.compile_together(cuda_gather.SOURCE, torch.cuda.current_device(), variants)


def steps(folder: Path, name: str, bits: int, deadline: float) -> None:
    """The decode step of a few layers: transformers compiled with quantised products, ours dense and sparse, 16 bits."""
    sheet = Sheet(folder, f"{name}-step-int{bits}", model=name, bits=bits, group=GROUP, layers=LAYERS, context=CONTEXT,
                  dtype=str(MODELS[name][1]), read_bandwidth_gbs=read_bandwidth(torch.device("cuda")))  # fmt: skip
    module = random_model(name)
    ids = torch.randint(0, module.config.vocab_size, (1, 512), generator=torch.Generator().manual_seed(0)).cuda()
    full = copy.deepcopy(module)
    quantise(module, f"int{bits}", GROUP, "input", "masked_dense")
    limits = thresholds(module, ids, [0.0, *SPARSITIES])
    theirs, ours = copy.deepcopy(module), copy.deepcopy(module)
    engines.channel_major(ours)
    prompt = ids[:, :CONTEXT]
    cache, _ = engines.prefilled(ours, prompt, 8)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    needed = {*tune_cuda.PACKED_CANDIDATES, *fused_cuda.DEFAULTS.values(), cuda_gather.Tuning(warps=8)}
    compile_all(bits, fused_cuda.Step(ours, cache, processors).defines, needed)
    log(name, f"int{bits}", "kernels compiled")
    set_thresholds(ours, limits[0.5])
    chosen = {"sparse": tune_cuda.tune(ours, prompt), "dense": tune_cuda.tune(ours, prompt, keep_all=True)}
    sheet.content["tunings"] = {k: {kind: str(t) for kind, t in v.items()} for k, v in chosen.items()}
    log(name, f"int{bits}", "tuned", sheet.content["tunings"])
    contenders, parity = {}, {}
    dense = fused_cuda.Decoder(ours, prompt, 9, keep_all=True)
    parity["dense"] = max(dense.parity(ids[:, :1]).values())
    contenders["ours dense"] = contender(dense, ids)
    for s in SPARSITIES:
        set_thresholds(ours, limits[s])
        decoder = fused_cuda.Decoder(ours, prompt, 9)
        parity[f"ours@{s}"] = max(decoder.parity(ids[:, :1]).values())
        contenders[f"ours@{s}"] = contender(decoder, ids, lambda s=s: set_thresholds(ours, limits[s]))
    log(name, f"int{bits}", "largest relative error of a kernel:", parity)
    assert max(parity.values()) < 1e-4, parity
    wide = copy.deepcopy(full)
    engines.channel_major(wide)
    contenders["16 bits, ours dense"] = contender(fused_cuda.Decoder(wide, prompt, 9, keep_all=True), ids)
    set_thresholds(wide, limits[0.5])
    contenders["16 bits, ours@0.5"] = contender(fused_cuda.Decoder(wide, prompt, 9), ids)
    makers = {"torch": with_torch_products} | ({"gpt-fast int8": gpt_fast} if bits == 8 else {})
    for maker, change in makers.items():
        if time.perf_counter() > deadline:
            sheet.content["left_out"][maker] = "no time left"
            continue
        try:
            model = copy.deepcopy(theirs)
            change(model)
            torch._dynamo.reset()
            contenders[maker] = contender(engines.Decoder(model, prompt, 9, compiled=True), ids)
            log(name, f"int{bits}", maker, "compiled")
        except (ValueError, RuntimeError) as error:
            sheet.content["left_out"][maker] = str(error).partition("\n")[0][:200]
            log(name, f"int{bits}", maker, "left out:", sheet.content["left_out"][maker])
    times = in_turn(contenders)
    quantised_dense = [k for k in times if "16 bits" not in k and "@" not in k]
    best = min(quantised_dense, key=times.get)
    stored = sum(module.get_submodule(s.path).packed.bytes for b in find_blocks(module) for s in b.sites.values())
    head = module.get_output_embeddings().weight
    sheet.add({
        "milliseconds": times, "parity": parity, "dense": best, "block_bytes": stored,
        "head_bytes": head.numel() * head.element_size(),
        "speedup_over_dense_quantised": {s: times[best] / times[f"ours@{s}"] for s in SPARSITIES},
        "speedup_over_16_bits": {s: times["16 bits, ours dense"] / times[f"ours@{s}"] for s in SPARSITIES},
    })  # fmt: skip
    log(name, f"int{bits}", {k: round(v, 3) for k, v in times.items()}, "dense:", best,
        {s: round(times[best] / times[f"ours@{s}"], 2) for s in SPARSITIES})  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--bits", nargs="+", type=int, choices=(8, 4), default=[8, 4])
    parser.add_argument("--parts", nargs="+", choices=("products", "steps"), default=["products", "steps"])
    parser.add_argument("--seconds", type=float, default=230)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    deadline = START + given.seconds
    log(torch.cuda.get_device_name())
    defines = {"HEAD_DIM": 64, "GROUP": 1, "SPLITS": 1}
    variants = [
        {"WARPS": t.warps, "LOADS": t.loads, "WIDE": t.wide, **defines, "BITS": bits, **wide, **dense}
        for t in {*tune_cuda.PACKED_CANDIDATES, *cuda_packed.TUNINGS.values()}
        for bits in given.bits
        for wide in ([{}] if "llama2-7b" in given.model else []) + ([{"BF16": 1}] if "llama3-8b" in given.model else [])
        for dense in ({}, {"DENSE": 1})
    ]
    if "products" in given.parts:
        _nvrtc.compile_together(cuda_gather.SOURCE, torch.cuda.current_device(), variants)
        log(f"{len(variants)} variants of the products compiled")
    with torch.no_grad():
        for name in given.model:
            for bits in given.bits:
                for part in given.parts:
                    if time.perf_counter() > deadline:
                        log(name, f"int{bits}", part, "left out: no time left")
                        continue
                    (products if part == "products" else steps)(given.folder, name, bits, deadline)
    log("done")


if __name__ == "__main__":
    main()
