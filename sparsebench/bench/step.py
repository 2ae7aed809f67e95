"""The whole decode step at batch 1: transformers' own dense step, the fused step dense and at every sparsity, in turn."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from sparsebench import engines
from sparsebench.calibration.histograms import AbsHistogram, observe
from sparsebench.measure.clock import Contender, interleaved, summary
from sparsebench.modules import storage
from sparsebench.sites import find_blocks

log = logging.getLogger(__name__)
STEPS = 8  # to a sample of `in_turn`
MODELS = {  # shape and dtype of what the scripts for one GPU time, with random weights
    "llama2-7b": ({"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
                   "num_key_value_heads": 32, "vocab_size": 32000}, torch.float16),
    "llama3-8b": ({"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                   "num_key_value_heads": 8, "vocab_size": 128256}, torch.bfloat16),
}  # fmt: skip


def random_model(settings) -> nn.Module:
    """The model's architecture with random weights on the device."""
    config = settings.model.config()
    torch.manual_seed(settings.seed)
    with torch.device(settings.hardware.torch_device):
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=settings.hardware.torch_dtype)
    return module.eval().requires_grad_(False)


def thresholds(module: nn.Module, ids: torch.Tensor, sparsities: list[float]) -> dict[float, dict[str, float]]:
    """sparsity -> site path -> the quantile of |x| over one dense pass of `ids` [1, T], so each site drops its share."""
    blocks = find_blocks(module)
    histograms = {(b.index, s.group): AbsHistogram(ids.device) for b in blocks for s in b.sites.values()}
    first = {(b.index, s.group): s.path for b in reversed(blocks) for s in reversed(list(b.sites.values()))}
    observe(module, ids, {first[k]: h.add for k, h in histograms.items()}, 1)
    return {
        s: {
            site.path: histograms[b.index, site.group].quantile(s) if s else -1.0
            for b in blocks
            for site in b.sites.values()
        }
        for s in sparsities
    }


def set_thresholds(module: nn.Module, values: dict[str, float]) -> None:
    for path, value in values.items():
        module.get_submodule(path).threshold.fill_(value)


def time_step(settings) -> list[dict]:
    """One row per context and sparsity, every engine timed in turn with the others of its context.

    Dense is the faster of transformers' own step and the fused step with nothing skipped.
    """
    hardware, module = settings.hardware, random_model(settings)
    device = hardware.torch_device
    steps = 8 if device.type == "cuda" else 1  # in a row to a sample: the processor runs ahead as in real decoding
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(0, module.config.vocab_size, (1, max(settings.contexts)), generator=generator).to(device)
    limits = thresholds(module, ids[:, :512], sorted({0.0, *settings.sparsities}))
    dense = storage.sharing_copy(module)  # its decoder lays the weights out as transformers does
    engines.channel_major(module)
    if device.type == "cuda":
        from sparsebench.engines.tune_cuda import tune

        set_thresholds(module, limits[min(limits, key=lambda s: abs(s - 0.5))])
        tune(module, ids[:, : max(settings.contexts)])
    plain = "compiled" if device.type == "cuda" else "eager"
    rows = []
    for context in settings.contexts:
        contenders, parity = {}, {}

        def contender(decoder, values: dict[str, float] | None) -> Contender:
            def call(i: int) -> None:
                for b in range(steps):
                    at = (i * steps + b) % ids.shape[1]
                    decoder.step(ids[:, at : at + 1])

            def reset() -> None:
                decoder.rewind()
                if values is not None:
                    set_thresholds(module, values)

            for _ in range(3):
                reset()
                call(0)
            return Contender(call, reset)

        reference = engines.decoder(dense, ids[:, :context], steps + 1, hardware, plain)
        contenders[f"dense/{plain}"] = contender(reference, None)
        for s, values in limits.items():
            set_thresholds(module, values)
            decoder, errors, refused = engines.verified(
                module, ids[:, :context], steps + 1, hardware, "fused", ids[0, :4], keep_all=s == 0
            )
            if refused:
                raise ValueError(f"model: {refused}")
            parity[s] = errors.get("sparse", errors["dense"])
            contenders[f"fused@{s}"] = contender(decoder, values)
        samples, _ = interleaved(list(contenders.values()), settings.warmup, settings.samples, device)
        times = {name: summary([t / steps for t in each]) for name, each in zip(contenders, samples, strict=True)}
        timed = {f"dense/{plain}": times[f"dense/{plain}"], "dense/fused": times["fused@0.0"]}
        best = min(timed, key=lambda name: timed[name]["median_ms"])
        for s in settings.sparsities:
            mine = times[f"fused@{s}"]
            rows.append(
                {
                    "context": context, "sparsity": s, "parity_relative_error": parity[s],
                    "dense": best, "dense_engines": timed, "sparse": mine,
                    "tokens_per_s": 1e3 / mine["median_ms"], "dense_tokens_per_s": 1e3 / timed[best]["median_ms"],
                    "speedup": timed[best]["median_ms"] / mine["median_ms"],
                }
            )  # fmt: skip
            log.info("step, context %d, sparsity %.2f: %.1f tokens/s, %.2fx", context, s,
                     rows[-1]["tokens_per_s"], rows[-1]["speedup"])  # fmt: skip
    return rows


def contender(
    decoder: Any, ids: torch.Tensor, prepare: Callable[[], object] = lambda: None
) -> tuple[Callable, Callable]:
    """(reset, call) of a decoder for `in_turn`, warmed up: call(i) takes STEPS steps over ids [1, T] from place STEPS i on."""

    def call(i: int) -> None:
        for b in range(STEPS):
            at = (STEPS * i + b) % ids.shape[1]
            decoder.step(ids[:, at : at + 1])

    def reset() -> None:
        prepare()
        decoder.rewind()

    for _ in range(3):
        reset()
        call(0)
    return reset, call


def in_turn(contenders: dict[str, tuple[Callable, Callable]], rounds: int = 15) -> dict[str, float]:
    """Median milliseconds of a step by name, a sample of each in every round; two rounds before do not count."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + 2):
        for name, (reset, call) in contenders.items():
            reset()
            torch.cuda.synchronize()
            start = time.perf_counter()
            call(i)
            torch.cuda.synchronize()
            samples[name].append(1e3 * (time.perf_counter() - start) / STEPS)
    return {name: statistics.median(each[2:]) for name, each in samples.items()}
