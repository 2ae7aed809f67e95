"""Latency and memory, dense beside sparse. Knows nothing about methods.

How to read it: decode at batch 1 is bound by reading weights, prefill by arithmetic. Dense and sparse run with the same
settings; samples alternate dense, sparse, dense, ... so that a drift of the machine's speed hits both; inputs are on
the device and compiled code is warm before the clock starts. Each decode step takes another token of held-out text,
from a fixed context length on. Samples are kept, the median is quoted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import nn

from sparsebench import engines, kernels
from sparsebench.engines.check import all_kept
from sparsebench.measure import macs, quality
from sparsebench.measure.clock import Contender, break_even, interleaved, summary
from sparsebench.measure.sparsity import counting, model_wide, summarise
from sparsebench.modules.base import MANY, measured_modules, sparse_modules

BLOCK = 8  # decode steps per sample on a GPU
CHECKED = 4  # decode steps for which an engine is compared with the model


def skips(sparse: nn.Module) -> bool:
    """Whether one token's work is really skipped at every sparse module (masked-dense only simulates it)."""
    used = [module.kernel(1) for _, module in measured_modules(sparse)]
    return bool(used) and all(kernels.load(name).SKIPS for name in used)


def skips_forward(sparse: nn.Module) -> bool:
    """Whether a whole forward pass of one image or text skips work anywhere."""
    return any(kernels.load(module.kernel(MANY)).SKIPS for module in sparse_modules(sparse))


def kernels_used(sparse: nn.Module, tokens: int) -> str | None:
    """The backends that serve a call of so many tokens, joined; None where nothing is sparse."""
    return ", ".join(sorted({module.kernel(tokens) for _, module in measured_modules(sparse)})) or None


def latency(dense: nn.Module, sparse: nn.Module, tokens: torch.Tensor, settings, hardware, sparsity: float) -> dict:
    """The record's latency section. tokens: held-out text, int64 [n], longer than context and prompt.

    Dense is the fastest dense step there is: the untouched model in transformers and, where the sparse model runs in a
    fused step, that step with nothing skipped; all are kept under `engines`. Only decode can carry a speed-up, and only
    where a kernel that skips ran: the prompt is masked-dense.
    """
    device = hardware.torch_device
    tokens = tokens.to(device)
    skipping = skips(sparse)
    decode, error, compile_seconds, warmup_seconds = decode_latency(dense, sparse, tokens, settings, hardware, skipping)
    if skipping:
        decode["break_even_sparsity"] = break_even(
            decode["dense"]["median_ms"],
            decode["nothing_skipped"]["median_ms"],
            decode["sparse"]["median_ms"],
            sparsity or decode["sparsity"],  # prompt=none: no scored token was sparse
        )

    def prefill(module):
        def call(_):
            with torch.no_grad():
                return module(input_ids=tokens[: settings.prompt][None], use_cache=False, logits_to_keep=1).logits

        return Contender(call)

    times, more_seconds = interleaved([prefill(dense), prefill(sparse)], settings.warmup, settings.samples, device)
    return {
        "kernel": kernels_used(sparse, 1),
        "device": str(device),
        "parity_relative_error": error,
        "decode": decode,
        "prefill": {
            "dense": summary(times[0]), "sparse": summary(times[1]), "tokens": settings.prompt,
            "kernel": kernels_used(sparse, MANY) or "masked_dense",
        },
        "compile_seconds": compile_seconds,
        "warmup_seconds": warmup_seconds + more_seconds,
    }  # fmt: skip


def forward_latency(dense: nn.Module, sparse: nn.Module, inputs: dict[int, object], settings, hardware) -> dict:
    """The latency section of a classifier: whole forward passes at each batch size, eager, dense and sparse in turn.

    inputs: batch size -> inputs on the device. A speed-up is claimed only where a kernel that skips ran.
    """
    device = hardware.torch_device
    counted = any(True for _ in measured_modules(sparse))
    skipping = hardware.skips and skips_forward(sparse)

    def forward(module, batch) -> Contender:
        def call(_):
            with torch.no_grad():
                return quality.logits(module, batch)

        return Contender(call)

    found, seconds = {}, 0.0
    for size, batch in inputs.items():
        times, warmup = interleaved(
            [forward(dense, batch), forward(sparse, batch)], settings.warmup, settings.samples, device
        )
        pair = {"dense": summary(times[0]), "sparse": summary(times[1]), "batch": size}
        used = skipping and size == 1  # the kernels that skip serve one example at a time
        pair |= {"kernel": hardware.kernel_name if used else "masked_dense" if counted else None}
        if used:
            pair["speedup"] = pair["dense"]["median_ms"] / pair["sparse"]["median_ms"]
        found[str(size)], seconds = pair, seconds + warmup
    return {
        "kernel": hardware.kernel_name if counted else None, "device": str(device), "forward": found,
        "compile_seconds": 0.0, "warmup_seconds": seconds,
    }  # fmt: skip


def decode_sparsity(dense: nn.Module, sparse: nn.Module, decoder, tokens: Iterator[list[torch.Tensor]]) -> float:
    """Model-wide share of weights that decoding skips, counted; each list of `tokens` follows the decoder's prompt."""
    with counting(sparse) as counters:
        for run in tokens:
            decoder.rewind()
            for token in run:
                decoder.step(token)
    weights = {site: int(cost.dense_macs) for site, cost in macs.dense_sites(dense).items()}
    found = {site: share.sparsity for site, share in summarise(sparse, counters).items()}
    return model_wide(dict.fromkeys(weights, 0.0) | found, weights)


def decode_latency(dense, sparse, tokens, settings, hardware, skipping: bool) -> tuple[dict, float, float, float]:
    """(decode section, relative error of the sparse step against the model, seconds of building and compiling, seconds of warm-up).

    A sample is BLOCK steps in a row on a GPU, so that the processor can run ahead as it does in real decoding.
    """
    device = hardware.torch_device
    block = BLOCK if device.type == "cuda" else 1
    prompt, following = tokens[: settings.context][None], tokens[settings.context :]

    def token(i: int) -> torch.Tensor:
        return following[i % len(following)].view(1, 1)

    start = time.perf_counter()

    def verified(module, name, keep_all=False):
        steps = torch.stack([token(i).view(()) for i in range(CHECKED)])
        return engines.verified(module, prompt, block, hardware, name, steps, keep_all)

    plain = "compiled" if device.type == "cuda" and hardware.engine != "eager" else "eager"
    dense_decoder, _, dense_refused = verified(dense, plain)
    sparse_decoder, errors, refused = verified(sparse, engines.choose(sparse, hardware))
    engine = sparse_decoder.engine
    decoders = {f"dense/{dense_decoder.engine}": dense_decoder, f"sparse/{engine}": sparse_decoder}
    if engine == "fused":
        decoders["dense/fused"] = verified(sparse, engine, keep_all=True)[0]
    error = errors.get("sparse", errors["dense"])
    for each in decoders.values():  # what is compiled or captured at its first steps
        for i in range(3):
            each.rewind()
            each.step(token(i))
    compile_seconds = time.perf_counter() - start

    def contender(decoder) -> Contender:
        def steps(i: int) -> None:
            for b in range(block):
                decoder.step(token(i * block + b))

        return Contender(steps, decoder.rewind)

    times, warmup_seconds = interleaved(
        [contender(d) for d in decoders.values()], settings.warmup, settings.samples, device
    )
    found = {name: summary([t / block for t in each]) for name, each in zip(decoders, times, strict=True)}
    fastest = min((name for name in found if name.startswith("dense")), key=lambda name: found[name]["median_ms"])
    section = {
        "dense": found[fastest], "dense_engine": fastest.partition("/")[2],
        "sparse": found[f"sparse/{engine}"], "sparse_engine": engine,
        "parity": errors, "engine_refused": refused or dense_refused,
        "context": settings.context, "steps_per_sample": block, "engines": found,
    }  # fmt: skip
    eager = engines.decoder(sparse, prompt, block, hardware, "eager")
    runs = ([token(i * block + b) for b in range(block)] for i in range(-(-settings.samples // block)))
    section["sparsity"] = decode_sparsity(dense, sparse, eager, runs)
    if skipping:
        section["speedup"] = section["dense"]["median_ms"] / section["sparse"]["median_ms"]
        section["nothing_skipped"] = found.get("dense/fused")
        if section["nothing_skipped"] is None:
            with all_kept(sparse):
                alone, _ = interleaved([contender(sparse_decoder)], settings.warmup, settings.samples, device)
            section["nothing_skipped"] = summary([t / block for t in alone[0]])
    return section, error, compile_seconds, warmup_seconds
