"""Latency and memory, dense beside sparse. Knows nothing about methods.

How to read it: decode at batch 1 is bound by reading weights, prefill by arithmetic. Dense and sparse run with the same
settings; samples alternate dense, sparse, dense, ... so that a drift of the machine's speed hits both; inputs are on
the device and compiled code is warm before the clock starts. Each decode step takes another token of held-out text,
from a fixed context length on. Samples are kept, the median is quoted.
"""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from sparsebench import decode, evaluate, kernels, macs
from sparsebench.sparsity import counting, measured_modules, model_wide, summarise

BLOCK = 8  # decode steps per sample on a GPU
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}  # relative, per projection


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, device work included."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000


@dataclass
class Contender:
    """Something to time: `call(i)` is inside the clock, `reset()` before it. `i` is the sample's index."""

    call: Callable[[int], object]
    reset: Callable[[], object] = lambda: None


def interleaved(contenders: list[Contender], warmup: int, samples: int, device: torch.device) -> tuple[list, float]:
    """Times in ms of each contender, taken in turn A B A B ..., and the seconds that the warm-up took."""
    found: list[list[float]] = [[] for _ in contenders]
    start, warmup_seconds = time.perf_counter(), 0.0
    for i in range(warmup + samples):
        if i == warmup:
            warmup_seconds = time.perf_counter() - start
        for contender, times in zip(contenders, found, strict=True):
            contender.reset()
            elapsed = timed(lambda c=contender, i=i: c.call(i), device)
            if i >= warmup:
                times.append(elapsed)
    return found, warmup_seconds


def summary(samples: list[float]) -> dict:
    """median, p10 and p90 of samples in ms, and the samples."""
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return {
        "median_ms": statistics.median(samples),
        "p10_ms": cuts[0],
        "p90_ms": cuts[-1],
        "samples_ms": [round(s, 6) for s in samples],
    }


@contextmanager
def all_kept(module: nn.Module) -> Iterator[None]:
    """Every threshold at -1: the sparse kernels run but skip nothing. For the break-even sparsity."""
    saved = [(m, m.threshold.clone()) for _, m in measured_modules(module)]
    for sparse, _ in saved:
        sparse.threshold.fill_(-1)
    try:
        yield
    finally:
        for sparse, threshold in saved:
            sparse.threshold.copy_(threshold)


def parity(module: nn.Module, step: Callable[[], object]) -> dict[str, float]:
    """Relative error ||y - y_ref|| / ||y_ref|| of the kernel at every sparse module over one decode step.

    Each module's own input is given to its kernel and to masked-dense, so rounding near a threshold can't grow from
    layer to layer.
    """
    errors: dict[str, float] = {}

    def compare(sparse, args, output):
        chosen, sparse.kernel_name = sparse.kernel_name, "masked_dense"
        reference = type(sparse).forward(sparse, *args).float()
        sparse.kernel_name = chosen
        norm = float(reference.norm())
        errors[sparse.site] = float((output.float() - reference).norm()) / (norm or 1.0)

    hooks = [m.register_forward_hook(compare) for _, m in measured_modules(module)]
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    return errors


def check_parity(errors: dict[str, float], dtype: torch.dtype) -> float:
    """The largest error. Raises ArithmeticError above the tolerance of the dtype, naming where (NaN never passes)."""
    if not errors:
        return 0.0
    worst = max(errors, key=lambda name: errors[name] if math.isfinite(errors[name]) else math.inf)
    if not errors[worst] <= TOLERANCE[dtype]:
        raise ArithmeticError(
            f"the sparse kernel differs from masked-dense at {worst}: {errors[worst]:.2e} > {TOLERANCE[dtype]:.0e}"
        )
    return errors[worst]


def break_even(dense_ms: float, nothing_skipped_ms: float, sparse_ms: float, sparsity: float) -> float | None:
    """Sparsity at which sparse and dense take equally long, on the line through (0, nothing skipped) and (s, sparse).

    0 where the sparse kernel is no slower than dense even when it skips nothing; None where the line never gets there or
    the sparse one is slower all the same (a busy machine).
    """
    if nothing_skipped_ms <= dense_ms:
        return 0.0 if sparse_ms <= dense_ms else None
    if sparse_ms >= nothing_skipped_ms:
        return None
    point = sparsity * (nothing_skipped_ms - dense_ms) / (nothing_skipped_ms - sparse_ms)
    return point if point <= 1 else None


def skips(sparse: nn.Module, hardware) -> bool:
    """Whether one token's work is really skipped at every sparse module (masked-dense only simulates it)."""
    ran = [getattr(m, "ran", hardware.kernel_name) for _, m in measured_modules(sparse)]
    return bool(ran) and all(kernels.load(name).SKIPS for name in ran)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*module.parameters(), *module.buffers()]
    }
    return sum(storages.values())


def peak_bytes(device: torch.device) -> int:
    """Most memory in use so far: of the device on CUDA, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def restart_peak(device: torch.device) -> int:
    """`peak_bytes` up to here; on CUDA it is counted anew from here on (a process's on a CPU can't be)."""
    before = peak_bytes(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return before


def latency(dense: nn.Module, sparse: nn.Module, tokens: torch.Tensor, settings, hardware, sparsity: float) -> dict:
    """The record's latency section. tokens: held-out text, int64 [n], longer than context and prompt.

    Dense is the fastest dense step there is: the untouched model in transformers and, where the sparse model runs in a
    fused step, that step with nothing skipped; all are kept under `engines`. Only decode can carry a speed-up, and only
    where a kernel that skips ran: the prompt is masked-dense.
    """
    device = hardware.torch_device
    tokens = tokens.to(device)
    sparse_modules = [m for _, m in measured_modules(sparse)]
    skipping = skips(sparse, hardware)
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
        "kernel": ", ".join(sorted({getattr(m, "ran", hardware.kernel_name) for m in sparse_modules})) or None,
        "device": str(device),
        "parity_relative_error": error,
        "decode": decode,
        "prefill": {
            "dense": summary(times[0]), "sparse": summary(times[1]), "tokens": settings.prompt,
            "kernel": ", ".join(sorted({getattr(m, "ran_many", "masked_dense") for m in sparse_modules})) or "masked_dense",
        },
        "compile_seconds": compile_seconds,
        "warmup_seconds": warmup_seconds + more_seconds,
    }  # fmt: skip


def forward_latency(dense: nn.Module, sparse: nn.Module, inputs: dict[int, object], settings, hardware) -> dict:
    """The latency section of a classifier: whole forward passes at each batch size, eager, dense and sparse in turn.

    inputs: batch size -> inputs on the device. A speed-up is claimed only where a kernel that skips ran.
    """
    device = hardware.torch_device
    sparse_modules = [m for _, m in measured_modules(sparse)]
    skips = hardware.skips and any(getattr(m, "skips", False) for m in sparse.modules())

    def forward(module, batch) -> Contender:
        def call(_):
            with torch.no_grad():
                return evaluate.logits(module, batch)

        return Contender(call)

    found, seconds = {}, 0.0
    for size, batch in inputs.items():
        times, warmup = interleaved(
            [forward(dense, batch), forward(sparse, batch)], settings.warmup, settings.samples, device
        )
        pair = {"dense": summary(times[0]), "sparse": summary(times[1]), "batch": size}
        used = skips and size == 1  # the kernels that skip serve one example at a time
        pair |= {"kernel": hardware.kernel_name if used else "masked_dense" if sparse_modules else None}
        if used:
            pair["speedup"] = pair["dense"]["median_ms"] / pair["sparse"]["median_ms"]
        found[str(size)], seconds = pair, seconds + warmup
    return {
        "kernel": hardware.kernel_name if sparse_modules else None, "device": str(device), "forward": found,
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
    """(decode section, worst parity error, seconds of building and compiling, seconds of warm-up).

    A sample is BLOCK steps in a row on a GPU, so that the processor can run ahead as it does in real decoding.
    """
    device, dtype = hardware.torch_device, hardware.torch_dtype
    block = BLOCK if device.type == "cuda" else 1
    prompt, following = tokens[: settings.context][None], tokens[settings.context :]

    def token(i: int) -> torch.Tensor:
        return following[i % len(following)].view(1, 1)

    start = time.perf_counter()
    engine = decode.choose(sparse, hardware)
    plain = "compiled" if device.type == "cuda" and hardware.engine != "eager" else "eager"
    decoders = {f"dense/{plain}": decode.decoder(dense, prompt, block, hardware, plain)}
    decoders[f"sparse/{engine}"] = sparse_decoder = decode.decoder(sparse, prompt, block, hardware, engine)
    if engine == "fused":
        decoders["dense/fused"] = decode.decoder(sparse, prompt, block, hardware, engine, keep_all=True)
        errors = sparse_decoder.parity(token(0))
    else:
        eager = decode.decoder(sparse, prompt, block, hardware, "eager")
        errors = parity(sparse, lambda: eager.step(token(0)))
    error = check_parity(errors, dtype)
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
        "context": settings.context, "steps_per_sample": block, "engines": found,
    }  # fmt: skip
    eager = decode.decoder(sparse, prompt, block, hardware, "eager")
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
