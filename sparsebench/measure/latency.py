"""Latency and memory, dense beside sparse. Knows nothing about methods.

How to read it: decode at batch 1 is bound by reading weights, prefill by arithmetic. Every engine that can run the
untouched model is timed, and the fastest is the dense figure. All contenders take turns with the same settings, each
sample after untimed steps of the same contender (clock.py); inputs are on the device and compiled code is warm
before the clock starts. Dense and sparse models share their weights' memory: before a contender's turn they are laid as
it reads them (storage.py), outside the clock. Each decode step takes another token of held-out text, from a fixed context
length on. Samples are kept, the median is quoted.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparsebench import engines, kernels
from sparsebench.engines import check
from sparsebench.measure import breakdown, clock, energy, macs, memory, prompt_pass, quality
from sparsebench.measure.clock import Contender, interleaved, summary
from sparsebench.measure.sparsity import counting, model_wide, summarise
from sparsebench.modules import storage
from sparsebench.modules.base import MANY, SiteSparsity, measured_modules, sparse_modules
from sparsebench.modules.quant_sparse import quantised_maps, with_torch_products

log = logging.getLogger(__name__)

BLOCK = 8  # decode steps per sample on a GPU
CACHED = 512e6  # bytes of weights below which a processor's last cache may hold a model [choice]
SHARES = (0.0, 1 / 3, 2 / 3)  # of the thresholds at the operating point, for the break-even beside 1
CHECKED = 4  # decode steps for which an engine is compared with the model


@dataclass(kw_only=True)
class Timing:
    """What timing one dense and one sparse model gave."""

    latency: dict[str, Any]  # the record's section
    step_macs: float | None = None  # executed by a timed decode step
    skipping: set[str] = field(default_factory=set)  # sites of which a forward pass at batch 1 skipped work
    peaks: dict[str, dict[str, int]] = field(default_factory=dict)  # bytes by what ran, dense and sparse; CUDA only
    extra: dict[str, Any] = field(default_factory=dict)  # further findings, for the record


@contextmanager
def dial(module: nn.Module) -> Iterator[Callable[[float], None]]:
    """A function that sets every threshold to this share of its own; 0: to -1, the sparse kernels skip nothing."""
    saved = [(m.threshold, m.threshold.clone()) for _, m in measured_modules(module)]

    def turn(share: float) -> None:
        for threshold, own in saved:
            threshold.copy_(torch.where(own > 0, own * share, own)) if share else threshold.fill_(-1)

    try:
        yield turn
    finally:
        turn(1.0)


def skips(sparse: nn.Module) -> bool:
    """Whether one token's work is really skipped at every sparse module (masked-dense only simulates it)."""
    used = [module.kernel(1) for _, module in measured_modules(sparse)]
    return bool(used) and all(kernels.load(name).SKIPS for name in used)


def skips_forward(sparse: nn.Module) -> bool:
    """Whether a whole forward pass of one image or text skips work anywhere."""
    return any(kernels.load(module.kernel(MANY)).SKIPS for module in sparse_modules(sparse))


def skipping_sites(sparse: nn.Module) -> set[str]:
    """The maps of which a whole forward pass of one image or text skips work, by site name."""
    modules = [m for _, m in measured_modules(sparse) if kernels.load(m.kernel(MANY)).SKIPS]
    return {site for module in modules for site in module.covers}


def kernels_used(sparse: nn.Module, tokens: int) -> str | None:
    """The backends that serve a call of so many tokens, joined; None where nothing is sparse."""
    return ", ".join(sorted({module.kernel(tokens) for _, module in measured_modules(sparse)})) or None


def latency(dense: nn.Module, sparse: nn.Module, tokens: torch.Tensor, settings, hardware, unquantised=None) -> Timing:
    """Decode and prefill of a language model. tokens: held-out text, int64 [n], longer than context and prompt.

    Only where a kernel that skips ran is there a speed-up; most methods' prompts are masked-dense. A kernel that packs
    its input does so inside the clock.

    unquantised: the dense model before its weights were quantised, timed beside the others; None where they were not.
    """
    device = hardware.torch_device
    tokens = tokens.to(device)
    prompt = tokens[: settings.prompt][None]
    start = time.perf_counter()
    contenders, refused = prompt_pass.prefills({"dense": dense, "sparse": sparse}, prompt, hardware)
    compile_seconds = time.perf_counter() - start
    eager = {side: contenders[f"{side}/eager"].laid for side in ("dense", "sparse")}
    storage.lay(sparse)
    skipping, parity = any(kernels.load(m.kernel(settings.prompt)).SKIPS for m in sparse_modules(sparse)), {}
    if skipping:
        errors = check.parity(sparse, lambda: eager["sparse"](0))
        parity = {"parity_relative_error": check.check_parity(errors, next(sparse.parameters()).dtype)}
    peaks = memory.peaks({"dense": dense, "sparse": sparse}, eager, device)
    with clock.watching(threads_of(device)) as load:
        decode, executed, about, timed = decode_latency(dense, sparse, tokens, settings, hardware, unquantised)
        times, more_seconds = interleaved(list(contenders.values()), settings.warmup, settings.samples, device)
    about["warmup_seconds"] += more_seconds
    about["compile_seconds"] += compile_seconds
    text = Text.of(tokens, settings.context, dense)
    if settings.by_kernel:  # when everything is timed: a profiler that was here may leave launches slower
        decode["by_kernel"] = breakdown.by_kernel(timed, text, device)
    if settings.energy:
        steps = {side: contender(each, text) for side, each in timed.items()}
        cards = len({parameter.device for parameter in dense.parameters()})
        about["energy"] = energy.measure(steps, text.block, "token", device, cards)
    storage.lay(sparse)  # what follows asks which kernels serve it
    section = {
        "kernel": kernels_used(sparse, 1), "device": str(device), "decode": decode,
        "prefill": prompt_pass.of_prompt(dict(zip(contenders, times, strict=True)), skipping) | parity | {
            "tokens": settings.prompt, "refused": refused,
            "kernel": kernels_used(sparse, settings.prompt if skipping else MANY) or "masked_dense",
        },
    } | about  # fmt: skip
    section |= clock.noise({"dense decode": decode["dense"], "sparse decode": decode["sparse"]}, load)
    return Timing(latency=section, step_macs=executed, peaks={"prefill": peaks} if peaks else {})


def threads_of(device: torch.device) -> int:
    """Processor threads that the timed code uses."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def forward_latency(dense: nn.Module, sparse: nn.Module, inputs: dict[int, object], settings, hardware) -> Timing:
    """Whole forward passes of a classifier at each batch size, eager.

    inputs: batch size -> inputs on the device. A speed-up is claimed only where a kernel that skips ran.
    """
    device = hardware.torch_device
    counted = any(True for _ in measured_modules(sparse))
    skipping = hardware.skips and skips_forward(sparse)

    def forward(module, batch) -> Contender:
        def call(_):
            with torch.no_grad():
                return quality.logits(module, batch)

        return Contender(call, functools.partial(storage.put, storage.lie(module)))

    both = {"dense": dense, "sparse": sparse}
    batch = inputs[max(inputs)]
    calls = {name: forward(module, batch).laid for name, module in both.items()}
    peaks = memory.peaks(both, calls, device)
    sizes, seconds = {}, 0.0
    with clock.watching(threads_of(device)) as load:
        for size, batch in inputs.items():
            contenders = [forward(module, batch) for module in both.values()]
            times, warmup = interleaved(contenders, settings.warmup, settings.samples, device)
            pair = {"dense": summary(times[0]), "sparse": summary(times[1]), "batch": size, "dense_engine": "eager"}
            used = skipping and size == 1  # the kernels that skip serve one example at a time
            pair |= {"kernel": hardware.kernel_name if used else "masked_dense" if counted else None}
            sizes[str(size)], seconds = pair | (clock.speedup(*times) if used else {}), seconds + warmup
    section = {
        "kernel": hardware.kernel_name if counted else None, "device": str(device), "forward": sizes,
        "compile_seconds": 0.0, "warmup_seconds": seconds,
    }  # fmt: skip
    if settings.energy:
        calls = {side: forward(module, inputs[1]) for side, module in both.items()}
        section["energy"] = energy.measure(calls, 1, "example", device)
    storage.lay(sparse)
    one = sizes["1"]
    section |= clock.noise({"dense forward": one["dense"], "sparse forward": one["sparse"]}, load)
    named = {f"forward, batch {max(inputs)}": peaks} if peaks else {}
    sites = skipping_sites(sparse) if skipping else set()
    return Timing(latency=section, skipping=sites, peaks=named)


# ---------------------------------------------------------------------------------------------------------------------
# Decode


@dataclass
class Text:
    """A prompt int64 [1, C] for the cache and the tokens [n] that follow it, `block` of them to a call.

    Each timed call follows `untimed` others. A model that fits a cache finds in it, when it decodes, what its last steps
    have read, which are other channels at each token: so BLOCK steps come first.
    """

    prompt: torch.Tensor
    following: torch.Tensor
    block: int = 1
    untimed: int = 1

    @classmethod
    def of(cls, tokens: torch.Tensor, context: int, module: nn.Module) -> Text:
        """The text for a model on the device of `tokens` [n]."""
        if tokens.device.type == "cuda":
            return cls(tokens[:context][None], tokens[context:], block=BLOCK)
        untimed = BLOCK if memory.weight_bytes(module) < CACHED else 1
        return cls(tokens[:context][None], tokens[context:], untimed=untimed)

    def call(self, i: int) -> list[torch.Tensor]:
        """The tokens [1, 1] of call i; the text begins again where it ends."""
        places = range(i * self.block, (i + 1) * self.block)
        return [self.following[place % len(self.following)].view(1, 1) for place in places]


def checked(module, text: Text, hardware, engine: str, keep_all: bool = False):
    """(decoder, relative error by what was compared, why an engine was refused by its name).

    The only place where decoders to be timed are made.
    """
    steps = torch.stack([text.call(i)[0].view(()) for i in range(CHECKED)])
    decoder, errors, why = engines.verified(module, text.prompt, text.block, hardware, engine, steps, keep_all)
    return decoder, errors, {engine: why} if why else {}


def warm(decoder, text: Text) -> None:
    """Take the first steps, in which an engine compiles or captures."""
    for token in (text.call(i)[0] for i in range(3)):
        decoder.rewind()
        decoder.step(token)


def dense_decoders(dense: nn.Module, text: Text, hardware) -> tuple[dict[str, Any], dict[str, str]]:
    """Every way to take a step of the untouched model, by engine, and why others could not be had.

    A quantised model runs by torch's own quantised products as well, if torch has them for its weights.
    """
    decoders, refused = {}, {}
    own = engines.dense_engines(dense, hardware)
    ways = {engine: engine for engine in own}
    if quantised_maps(dense):
        ways |= {f"{engine}, torch's products": engine for engine in own if engine != "fused"}
    for way, engine in ways.items():
        try:
            module = dense if way in ("eager", "compiled") else storage.sharing_copy(dense)
            if way != engine:
                with_torch_products(module)
            decoder, _, why = checked(module, text, hardware, engine, keep_all=engine == "fused")
            warm(decoder, text)
        except (
            RuntimeError,
            ArithmeticError,
            ValueError,
        ) as error:  # no compiler, no memory, or not the model's own step
            if way == "eager":
                raise
            why, decoder = {engine: str(error).strip().partition("\n")[0]}, None
            log.warning("dense decode: no %s step (%s)", way, why[engine])
        if decoder is not None and decoder.engine == engine:
            decoders[way] = decoder
        refused |= dict.fromkeys([way] if why else [], "; ".join(why.values()))
    return decoders, refused


def count(sparse: nn.Module, decoder, runs: list[list[torch.Tensor]]) -> dict[str, SiteSparsity]:
    """What decoding skips, by site; each list of tokens in `runs` follows the decoder's prompt."""
    with counting(sparse) as counters:
        for run in runs:
            decoder.rewind()
            for token in run:
                decoder.step(token)
    return summarise(sparse, counters)


@dataclass
class Step:
    """What one decode step does, from counts over the tokens that are timed."""

    sparsity: float  # model-wide
    macs: float  # executed
    bytes: float  # of weights and cache read where the kernel skips


def describe(dense: nn.Module, sparse: nn.Module, measured: dict[str, SiteSparsity], context: int, skips: bool) -> Step:
    """Sparsity, MACs and bytes of a step in which `measured` was counted."""
    dense_costs, outside = macs.dense_sites(dense), macs.outside_blocks(sparse, context, measured if skips else None)
    costs = dense_costs | macs.site_costs(sparse, measured)
    weights = {site: int(cost.dense_macs) for site, cost in dense_costs.items()}
    shares = dict.fromkeys(weights, 0.0) | {site: each.sparsity for site, each in measured.items()}
    executed = macs.executed(dense_costs, costs, outside, skips)
    return Step(model_wide(shares, weights), executed, macs.read_bytes(costs, outside))


def sparse_decoder(sparse: nn.Module, text: Text, hardware) -> tuple[Any, Any, dict[str, float], dict[str, str]]:
    """(decoder to be timed, eager decoder for counting, errors against the model, why other engines were refused).

    Raises ArithmeticError where a kernel differs from masked-dense or no engine is the model.
    """
    decoder, errors, why = checked(sparse, text, hardware, engines.choose(sparse, hardware))
    eager = engines.decoder(sparse, text.prompt, text.block, hardware, "eager")
    warm(decoder, text)
    return decoder, eager, errors, why


def contender(decoder, text: Text, prepare: Callable[[], object] = lambda: None) -> Contender:
    """A decoder's steps from the end of the prompt; `prepare` comes before each call, outside the clock."""

    def steps(i: int) -> None:
        for token in text.call(i):
            decoder.step(token)

    return Contender(steps, lambda: (prepare(), decoder.rewind()), text.untimed)


def decode_latency(
    dense, sparse, tokens, settings, hardware, unquantised=None
) -> tuple[dict, float, dict, dict[str, Any]]:
    """(decode section, executed MACs of a step, parity error and seconds of compiling and warm-up, the two decoders timed).

    A sample is BLOCK steps in a row on a GPU, so that the processor can run ahead as it does in real decoding. Where the
    kernel skips, the sparse engine is timed with lower thresholds as well, for the break-even.
    """
    storage.lay(sparse)
    device, skipping = hardware.torch_device, skips(sparse)
    text = Text.of(tokens, settings.context, dense)
    start = time.perf_counter()
    decoders, refused = dense_decoders(dense, text, hardware)
    decoder, eager, errors, why = sparse_decoder(sparse, text, hardware)
    before = {} if unquantised is None else dense_decoders(unquantised, text, hardware)[0]
    compile_seconds = time.perf_counter() - start

    calls = clock.timed_calls(settings.warmup, settings.samples, text.untimed)[: -(-settings.samples // text.block)]
    contenders = {f"dense/{engine}": contender(each, text) for engine, each in decoders.items()}
    contenders |= {f"unquantised/{engine}": contender(each, text) for engine, each in before.items()}
    with dial(sparse) as turn:
        steps: dict[float, Step] = {}  # by share of the thresholds, the operating point first
        for share in (1.0, *SHARES) if skipping else (1.0,):
            turn(share)
            measured = count(sparse, eager, [text.call(i) for i in calls])
            step = describe(dense, sparse, measured, settings.context, skipping)
            if all(step.sparsity != other.sparsity for other in steps.values()):  # not every threshold moves something
                steps[share] = step
        contenders |= {share: contender(decoder, text, lambda share=share: turn(share)) for share in steps}
        times, warmup_seconds = interleaved(list(contenders.values()), settings.warmup, settings.samples, device)
    times = {name: [t / text.block for t in each] for name, each in zip(contenders, times, strict=True)}
    curve = [(step, times.pop(share)) for share, step in steps.items()]
    whole = {name: times.pop(name) for name in [*times] if name.startswith("unquantised/")}
    section = {
        **sides(times, curve[0][1], decoder.engine), "sparsity": steps[1.0].sparsity, "context": settings.context,
        "steps_per_sample": text.block, "untimed_steps": text.block * text.untimed, "refused": refused | why,
        "parity": errors,
    }  # fmt: skip
    if unquantised is not None:
        best = clock.fastest({name: summary(each) for name, each in whole.items()}, ["unquantised"])
        section["unquantised"] = best["unquantised"] | {
            "engine": best["unquantised_engine"], "dtype": str(next(unquantised.parameters()).dtype).removeprefix("torch.")
        }  # fmt: skip
    if skipping:
        dense_times = times[f"dense/{section['dense_engine']}"]
        section |= clock.speedup(dense_times, curve[0][1]) | {"break_even": break_even(dense_times, curve)}
    about = {
        "parity_relative_error": errors.get("sparse", errors["dense"]),
        "compile_seconds": compile_seconds,
        "warmup_seconds": warmup_seconds,
    }
    return section, steps[1.0].macs, about, {"dense": decoders[section["dense_engine"]], "sparse": decoder}


def sides(dense: dict[str, list[float]], sparse: list[float], engine: str) -> dict[str, Any]:
    """The fastest dense engine beside the sparse one, and all engines. dense: times by `dense/<engine>`."""
    return clock.fastest({name: summary(each) for name, each in (dense | {f"sparse/{engine}": sparse}).items()})


def break_even(dense: list[float], curve: list[tuple[Step, list[float]]]) -> dict[str, Any]:
    """clock.break_even of the measured steps, with the bytes that each read."""
    section = clock.break_even(dense, {step.sparsity: times for step, times in curve})
    traffic = {step.sparsity: step.bytes for step, _ in curve}
    for point in section["points"]:
        point["bytes"] = traffic[point["sparsity"]]
    return section
