"""What an exact choice of the largest k costs over thresholds in the fused CUDA step, all ways in turn in one process.

    python scripts/bench_top_k.py <folder> [--model llama2-7b llama3-8b] [--layers 32] [--seconds 150]

Shapes of Llama-2-7B (fp16) and Llama-3-8B (bf16) with random weights. Each step is checked kernel by kernel against
masked-dense first. Ways: `threshold`; `top-k`, chosen inside each product's kernel while the rows of a guess are fetched;
`no guess`, the same without that; `before`, chosen by a kernel of its own; `scaled`, |x| c with another c at every map
(WINA); `merged`, thresholds with attention merged by its last CTA. One JSON file per model, with the card's name.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers

from sparsebench import engines
from sparsebench.bench.step import MODELS, STEPS, contender, in_turn, set_thresholds, thresholds
from sparsebench.engines import fused_cuda
from sparsebench.kernels import _nvrtc
from sparsebench.kernels.cuda_gather import Tuning
from sparsebench.measure.clock import read_bandwidth
from sparsebench.sites import find_blocks

SPARSITIES, CONTEXT = (0.5, 0.65), 128
WAYS = {  # name -> (rule, what is tried)
    "threshold": ("threshold", {}), "merged": ("threshold", {"merges": True}), "top-k": ("top_k", {}),
    "no guess": ("top_k", {"ahead": 0}), "wide guess": ("top_k", {"ahead": 256}), "before": ("top_k", {"choose": "before"}),
    "scaled": ("scaled", {}),
}  # fmt: skip
START = time.perf_counter()
HELD = []  # scales whose addresses stand in captured graphs


def log(*words) -> None:
    print(f"{time.perf_counter() - START:6.1f} s", *words, flush=True)


def random_model(name: str, layers: int) -> torch.nn.Module:
    sizes, dtype = MODELS[name]
    torch.manual_seed(0)
    with torch.device("cuda"):
        config = transformers.LlamaConfig(**sizes, num_hidden_layers=layers, max_position_embeddings=4096)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


@contextmanager
def tried(**values):
    """What a step tries, while it is made."""
    before = {name: getattr(fused_cuda.Step, name) for name in values}
    for name, value in values.items():
        setattr(fused_cuda.Step, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(fused_cuda.Step, name, value)


def set_rule(module: torch.nn.Module, rule: str, limits: dict[str, float], sparsity: float) -> None:
    """The rule of every map: a threshold, the largest k, or the largest k by |x| c with a c of its own."""
    for block in find_blocks(module):
        for site in block.sites.values():
            linear = module.get_submodule(site.path)
            n = linear.weight.shape[1]
            linear.top_k = None if rule == "threshold" else int(n * (1 - sparsity))
            linear.scale = torch.rand(n, device="cuda") + 0.5 if rule == "scaled" else None
            HELD.append(linear.scale)
            linear.threshold.fill_(limits[site.path] if rule == "threshold" else 0.0)


def checked(decoder, ids: torch.Tensor) -> float:
    """The largest relative error of a kernel. Raises AssertionError where more than three channels were chosen otherwise.

    Two scores within a rounding of each other may change places between fp32 here and fp32 in torch.
    """
    for i in range(2):
        errors = decoder.parity(ids[:, i : i + 1])
        over = {name: error for name, error in errors.items() if not error < 1e-3}
        assert len(over) <= 3 and max(errors.values()) < 0.1, over
    return max(e for e in errors.values() if e < 1e-3)


def compile_all(module: torch.nn.Module, prompt: torch.Tensor) -> None:
    """Every variant of the kernels that will be asked for, side by side."""
    cache, _ = engines.prefilled(module, prompt, 8)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    step = fused_cuda.Step(module, cache, processors)
    tunings = {*fused_cuda.DEFAULTS.values(), Tuning(warps=8)}
    extras = [{}, *({"TOPK": 1, "AHEAD": ahead} for ahead in (0, 128, 256))]
    _nvrtc.compile_together(
        fused_cuda.SOURCE, torch.cuda.current_device(), [step.defines(t) | extra for t in tunings for extra in extras]
    )


def measure(name: str, layers: int, folder: Path, deadline: float) -> None:
    module = random_model(name, layers)
    ids = torch.randint(0, module.config.vocab_size, (1, 512), generator=torch.Generator().manual_seed(0)).cuda()
    limits = thresholds(module, ids, [0.0, *SPARSITIES])
    engines.channel_major(module)
    prompt = ids[:, :CONTEXT]
    compile_all(module, prompt)
    log(name, "kernels compiled")
    set_thresholds(module, limits[0.0])
    contenders = {"dense": contender(fused_cuda.Decoder(module, prompt, STEPS + 1, keep_all=True), ids, lambda: None)}
    errors, left_out = {}, []
    for sparsity in SPARSITIES:
        for way, (rule, values) in WAYS.items():
            if time.perf_counter() > deadline:
                left_out.append(f"{way}@{sparsity}")
                continue
            set_rule(module, rule, limits[sparsity], sparsity)
            with tried(**values):
                decoder = fused_cuda.Decoder(module, prompt, STEPS + 1)
            errors[f"{way}@{sparsity}"] = checked(decoder, ids)
            now = dict.fromkeys(limits[sparsity], 0.0) if rule != "threshold" else limits[sparsity]
            contenders[f"{way}@{sparsity}"] = contender(decoder, ids, lambda now=now: set_thresholds(module, now))
    log(name, "checked:", {k: f"{v:.1e}" for k, v in errors.items()}, "left out:", left_out)
    times = in_turn(contenders)
    over = {
        f"{way}@{s}": times[f"{way}@{s}"] / times[f"threshold@{s}"] - 1
        for s in SPARSITIES
        for way in WAYS
        if way != "threshold" and f"{way}@{s}" in times
    }
    content = {
        "gpu": torch.cuda.get_device_name(), "model": name, "layers": layers, "dtype": str(MODELS[name][1]),
        "context": CONTEXT, "read_bandwidth_gbs": read_bandwidth(torch.device("cuda")), "milliseconds": times,
        "relative_errors": errors, "over_thresholds": over, "left_out": left_out,
    }  # fmt: skip
    (folder / f"{name}-top-k.json").write_text(json.dumps(content, indent=1))
    log(name, {k: round(v, 3) for k, v in times.items()})
    log(name, "over thresholds:", {k: f"{100 * v:+.1f} %" for k, v in over.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=150)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    log(torch.cuda.get_device_name())
    with torch.no_grad():
        for name in given.model:
            measure(name, given.layers, given.folder, START + given.seconds)
            HELD.clear()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
