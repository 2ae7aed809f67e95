"""Latency and memory, dense beside sparse. Knows nothing about methods.

How to read it: decode at batch 1 is bound by reading weights, prefill by arithmetic. Both models run through the same
engine with the same settings; samples alternate dense, sparse, dense, ... so that a drift of the machine's speed hits
both; inputs are on the device and compiled code is warm before the clock starts. Each decode step takes another token
of held-out text at one fixed context length. Samples are kept, the median is quoted.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from sparsebench.decode import Decoder
from sparsebench.sparsity import measured_modules

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


def parity(module: nn.Module, step: Callable[[], object]) -> float:
    """Largest relative error ||y - y_ref|| / ||y_ref|| of a fast kernel over all sparse modules in one decode step.

    Each module's own input is given to its kernel and to masked-dense. The input is the same for both, so rounding
    near a threshold can't grow from layer to layer. Raises ArithmeticError above the tolerance of the dtype.
    """
    errors: dict[str, float] = {}

    def compare(sparse, args, output):
        kernel, sparse.kernel_name = sparse.kernel_name, "masked_dense"
        reference = type(sparse).forward(sparse, *args).float()
        sparse.kernel_name = kernel
        norm = float(reference.norm())
        errors[sparse.site] = float((output.float() - reference).norm()) / norm if norm else float(output.float().norm())

    hooks = [m.register_forward_hook(compare) for _, m in measured_modules(module)]
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    if not errors:
        return 0.0
    worst = max(errors, key=lambda site: errors[site] if errors[site] == errors[site] else float("inf"))
    limit = TOLERANCE[next(module.parameters()).dtype]
    if not errors[worst] <= limit:
        raise ArithmeticError(f"the sparse kernel differs from masked-dense at {worst}: {errors[worst]:.2e} > {limit:.0e}")
    return errors[worst]


def break_even(dense_ms: float, nothing_skipped_ms: float, sparse_ms: float, sparsity: float) -> float | None:
    """Sparsity at which sparse and dense take equally long, on the line through (0, nothing skipped) and (s, sparse).

    0 where the sparse kernel is no slower than dense even when it skips nothing; None where the line never gets there.
    """
    if nothing_skipped_ms <= dense_ms:
        return 0.0
    if sparse_ms >= nothing_skipped_ms:
        return None
    point = sparsity * (nothing_skipped_ms - dense_ms) / (nothing_skipped_ms - sparse_ms)
    return point if point <= 1 else None


def weight_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*module.parameters(), *module.buffers()]}
    return sum(storages.values())


def peak_bytes(device: torch.device) -> int:
    """Most memory in use so far: of the device on CUDA, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def latency(dense: nn.Module, sparse: nn.Module, tokens: torch.Tensor, settings, hardware, sparsity: float) -> dict:
    """The record's latency section. tokens: held-out text, int64 [n], longer than context and prompt.

    Only decode can carry a speed-up, and only where a kernel that skips ran: the prompt is masked-dense.
    """
    device = hardware.torch_device
    tokens = tokens.to(device)
    sparse_modules = [m for _, m in measured_modules(sparse)]
    skips = bool(sparse_modules) and hardware.skips
    count = settings.warmup + settings.samples
    prompt, following = tokens[: settings.context][None], tokens[settings.context :]
    following = [following[i % len(following)].view(1, 1) for i in range(count)]

    start = time.perf_counter()
    eager = Decoder(sparse, prompt, 1, compiled=False)
    error = parity(sparse, lambda: eager.step(following[0]))
    decoders = [Decoder(m, prompt, 1, hardware.compiled) for m in (dense, sparse)]
    for decoder in decoders:  # compilation, kernel builds and graph capture happen in the first steps
        for _ in range(3):
            decoder.rewind()
            decoder.step(following[0])
    compile_seconds = time.perf_counter() - start

    def run(contenders):
        return interleaved(contenders, settings.warmup, settings.samples, device)

    steps = [Contender(lambda i, d=d: d.step(following[i]), d.rewind) for d in decoders]
    times, warmup_seconds = run(steps)
    decode = {"dense": summary(times[0]), "sparse": summary(times[1]), "context": settings.context}
    if skips:
        medians = [decode["dense"]["median_ms"], decode["sparse"]["median_ms"]]
        decode["speedup"] = medians[0] / medians[1]
        with all_kept(sparse):
            decode["nothing_skipped"] = summary(run(steps[1:])[0][0])
        decode["break_even_sparsity"] = break_even(
            medians[0], decode["nothing_skipped"]["median_ms"], medians[1], sparsity
        )

    def prefill(module):
        def call(_):
            with torch.no_grad():
                return module(input_ids=tokens[: settings.prompt][None], use_cache=False, logits_to_keep=1).logits

        return Contender(call)

    times, more_seconds = run([prefill(dense), prefill(sparse)])
    return {
        "kernel": hardware.kernel_name if sparse_modules else None,
        "device": str(device),
        "engine": "torch.compile(reduce-overhead)" if hardware.compiled else "eager",
        "parity_relative_error": error,
        "decode": decode,
        "prefill": {
            "dense": summary(times[0]), "sparse": summary(times[1]), "tokens": settings.prompt, "kernel": "masked_dense",
        },
        "compile_seconds": compile_seconds,
        "warmup_seconds": warmup_seconds + more_seconds,
    }  # fmt: skip
