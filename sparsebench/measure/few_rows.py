"""Decode of few rows, dense beside sparse: batches of independent texts, and verify steps of speculative decoding.

A product of few rows is bound by reading weights, as decode at batch 1; it can skip only what every row drops. So each
batch size and the verify step are timed with the texts' own masks, and the union of kept units is counted on the very
steps that are timed. Dense is the fastest of what there is at that size: the untouched model eager, compiled (CUDA), and
our own kernels with nothing skipped. Where no kernel serves so many rows the figure is marked as simulated.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsebench import engines, kernels
from sparsebench.engines import Decoder, check, speculative
from sparsebench.measure import clock, latency, macs, unions
from sparsebench.measure.clock import interleaved, summary
from sparsebench.modules import storage
from sparsebench.modules.base import SiteSparsity, measured_modules
from sparsebench.modules.tokens import rows_apart

log = logging.getLogger(__name__)

DRAFT_TEXTS, DRAFT_TOKENS = 4, 32  # continued with drafts, for the acceptance [choice]


@dataclass
class Rows:
    """Prompts int64 [B, C] of different texts and the tokens [B, n] that follow; `width` of them to a step.

    The interface of latency.Text. stride: tokens between the beginnings of two rows; below C + n the texts overlap.
    """

    prompt: torch.Tensor
    following: torch.Tensor
    stride: int
    width: int = 1
    block: int = 1
    untimed: int = 1

    @classmethod
    def of(cls, tokens: torch.Tensor, rows: int, context: int, width: int, like: latency.Text) -> Rows:
        """`rows` texts out of tokens [n]. Raises ValueError where there are too few for a text of their own each."""
        length = min(context + len(like.following), max(context + 2 * width, len(tokens) // rows))
        stride = (len(tokens) - length) // max(1, rows - 1)
        if (rows > 1 and stride < 1) or length < context + width:
            raise ValueError(
                f"measure.batches: {rows} different texts of {context + width} tokens need more text than the "
                f"{len(tokens)} tokens of the test split"
            )
        cut = torch.stack([tokens[i * stride : i * stride + length] for i in range(rows)])
        return cls(cut[:, :context], cut[:, context:], stride, width, like.block, like.untimed)

    def call(self, i: int) -> list[torch.Tensor]:
        """The steps [B, width] of call i; the texts begin again where they end."""
        places = self.following.shape[1] - self.width + 1
        starts = [n * self.width % places for n in range(i * self.block, (i + 1) * self.block)]
        return [self.following[:, start : start + self.width] for start in starts]


def dropping(sparse: nn.Module) -> list:
    """The sparse modules that drop something: a map that its method left dense, stored for a fused step, does not."""
    return [module for _, module in measured_modules(sparse) if float(module.threshold) >= 0]


def serving(sparse: nn.Module, rows: int, width: int = 1) -> set[str]:
    """The backends that serve `rows` tokens, `width` of each text; attention over kept heads takes one of each."""
    return {
        "masked_dense" if module.unit == "heads" and width > 1 else module.kernel_of_rows(rows)
        for module in dropping(sparse)
    }


def skips(sparse: nn.Module, rows: int, width: int = 1) -> bool:
    """Whether that many rows really skip at every sparse module."""
    used = serving(sparse, rows, width)
    return bool(used) and all(kernels.load(name).SKIPS for name in used)


def named(backends: set[str]) -> str | None:
    """Backends for the record; None where nothing is sparse."""
    return ", ".join(sorted(backends)) or None


def apart(call: Any) -> Any:
    """`call` with every token judged on its own: a verify step."""

    def run(i: int) -> None:
        with rows_apart():
            call(i)

    return run


def contenders(dense: nn.Module, sparse: nn.Module, text: Rows, hardware: Any, turn: Any) -> tuple[dict, Decoder, dict]:
    """(contenders by name, the eager sparse decoder, why some are missing); checks the kernels against masked-dense."""
    room, rows = text.block * text.width, text.prompt.shape[0] * text.width
    compiled = [True] if engines.compiles(hardware) and hardware.engine != "eager" else []
    real, ran, refused, eager = hardware.skips and skips(sparse, rows, text.width), {}, {}, None
    for side, module in (("dense", dense), ("sparse", sparse)):
        for fast in (False, *compiled):
            name = f"{side}/{'compiled' if fast else 'eager'}"
            try:
                decoder = Decoder(module, text.prompt, room, compiled=fast)
                with rows_apart():
                    latency.warm(decoder, text)
            except (RuntimeError, ValueError) as error:  # no compiler, no memory
                if not fast:
                    raise
                refused[name] = str(error).strip().partition("\n")[0]
                log.warning("%s is not timed (%s)", name, refused[name])
                continue
            ran[name] = latency.contender(decoder, text, lambda: turn(1.0))
            if side == "sparse":
                eager = eager or decoder
                if real:
                    ran[f"dense/{decoder.engine}, all kept"] = latency.contender(decoder, text, lambda: turn(0.0))
    if real:
        eager.rewind()
        with rows_apart():
            errors = check.parity(sparse, lambda: eager.step(text.call(0)[0]))
        check.check_parity(errors, hardware.torch_dtype)
    for each in ran.values():
        each.call = apart(each.call)
    return ran, eager, refused


def timed(dense: nn.Module, sparse: nn.Module, text: Rows, settings: Any, hardware: Any) -> dict[str, Any]:
    """One row of the record: both sides at this many rows, in turn."""
    rows = text.prompt.shape[0] * text.width
    if hardware.torch_device.type == "cuda":
        torch.compiler.reset()  # else every size counts towards the limit of recompilations of one forward
    storage.lay(sparse)
    with latency.dial(sparse) as turn:
        every, _, refused = contenders(dense, sparse, text, hardware, turn)
        times, _ = interleaved(list(every.values()), settings.warmup, settings.samples, hardware.torch_device)
    storage.lay(sparse)  # what follows asks which kernels serve it
    taken = {name: [t / text.block for t in each] for name, each in zip(every, times, strict=True)}
    engines = {name: summary(each) for name, each in taken.items()}
    best = {
        side: min((n for n in engines if n.startswith(side)), key=lambda n: engines[n]["median_ms"])
        for side in ("dense", "sparse")
    }
    real = hardware.skips and skips(sparse, rows, text.width)
    pair = {
        f"{side}_{end}": engines[name][f"{what}_ms"]
        for side, name in best.items()
        for end, what in (("ms", "median"), ("p10_ms", "p10"), ("p90_ms", "p90"))
    }
    pair |= {f"{side}_engine": name.partition("/")[2] for side, name in best.items()}
    pair |= {"kernel": named(serving(sparse, rows, text.width)), "simulated": not real, "refused": refused}
    pair |= {"engines": {name: each["median_ms"] for name, each in engines.items()}}
    return pair | (clock.speedup(taken[best["dense"]], taken[best["sparse"]]) if real else {})


def weights_of(dense: nn.Module) -> dict[str, int]:
    """Weights of every block map, by site."""
    return {site: int(cost.dense_macs) for site, cost in macs.dense_sites(dense).items()}


def union_of_rows(dense: nn.Module, sparse: nn.Module, text: Rows, sizes: list[int], settings: Any) -> dict[str, Any]:
    """Unions by size, over the steps that are timed, rows taken in nested groups of each size."""
    groups = unions.Groups(sizes)
    decoder = Decoder(sparse, text.prompt, text.block * text.width, compiled=False)
    calls = clock.timed_calls(settings.warmup, settings.samples, text.untimed)[: -(-settings.samples // text.block)]
    with unions.counting(sparse, groups) as counters, rows_apart():
        for i in calls if counters else []:
            decoder.rewind()
            for step in text.call(i):
                groups.of_rows(step.numel())
                decoder.step(step)
    return unions.summarise(sparse, counters, weights_of(dense))


def batches(
    dense: nn.Module, sparse: nn.Module, tokens: torch.Tensor, decode: dict, settings: Any, hardware: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows of the record by batch size, unions by batch size).

    decode: the section of batch 1, which is its row. Where one of the rows can't be timed (memory), it says why.
    """
    sizes = sorted(set(settings.batches))
    like = latency.Text.of(tokens, settings.context, dense)
    widest = Rows.of(tokens, max(sizes), settings.context, 1, like)
    figures = union_of_rows(dense, sparse, widest, sizes, settings)
    section = []
    for batch in sizes:
        if batch == 1:
            row = of_decode(decode, named(serving(sparse, 1)), "speedup" in decode)
        else:
            row = timed(dense, sparse, Rows.of(tokens, batch, settings.context, 1, like), settings, hardware)
        density = 1 - figures[str(batch)]["sparsity"] if str(batch) in figures else 1.0
        read = step_bytes(dense, sparse, figures, batch, settings.context) if figures else {}
        section.append({"batch": batch, "context": settings.context, "union_density": density} | read | row)
    paying = [row["batch"] for row in section if row.get("speedup", 0) > 1]
    about = {"largest_batch_that_pays": max(paying, default=None), "stride": widest.stride, "by_size": figures}
    return section, about | {"definition": "share of (step, unit) pairs that no row keeps; rows are different texts"}


def step_bytes(
    dense: nn.Module, sparse: nn.Module, figures: dict[str, dict], batch: int, context: int
) -> dict[str, float]:
    """Bytes that one step of `batch` sequences reads, dense and where kernels skip: weights once, a cache each.

    figures: of `unions.summarise`. A weight row is read if any row needs it; a dropped head saves its own sequence's cache.
    """
    plain = macs.dense_sites(dense)
    alone, together = (figures.get(str(size), {}).get("per_site", {}) for size in (1, batch))

    def seen(shares: dict[str, float]) -> dict[str, SiteSparsity]:
        named = {name: (site, w) for site, m in measured_modules(sparse) for name, w in m.covers.items()}
        return {n: SiteSparsity(shares[s], shares[s], w, 1, 0) for n, (s, w) in named.items() if s in shares}

    weights = plain | macs.site_costs(sparse, seen(together))
    whole, kept = macs.outside_blocks(dense, context), macs.outside_blocks(sparse, context, seen(alone))
    return {
        "dense_bytes": sum(c.dense_bytes for c in plain.values()) + whole.head_bytes + batch * whole.cache_bytes,
        "sparse_bytes": sum(c.sparse_bytes for c in weights.values()) + kept.head_bytes + batch * kept.cache_bytes,
    }


def of_decode(decode: dict, kernel: str | None, real: bool) -> dict[str, Any]:
    """The row of batch 1, from the decode section."""
    row: dict[str, Any] = {}
    for side in ("dense", "sparse"):
        row |= {
            f"{side}_ms": decode[side]["median_ms"], f"{side}_p10_ms": decode[side]["p10_ms"],
            f"{side}_p90_ms": decode[side]["p90_ms"], f"{side}_engine": decode[f"{side}_engine"],
        }  # fmt: skip
    row |= {"kernel": kernel, "simulated": not real}
    return row | {k: decode[k] for k in ("speedup", "speedup_p10", "speedup_p90") if k in decode}


# ---------------------------------------------------------------------------------------------------------------------
# Verify steps


def tokens_per_call(rate: float, chunk: int) -> float:
    """Tokens that a verify call of `chunk` tokens gives where each draft is right with this chance, independently."""
    return sum(rate**i for i in range(chunk))


def rate_for(tokens: float, chunk: int) -> float | None:
    """The acceptance rate that gives so many tokens per call; 0 where one token is enough, None beyond `chunk`."""
    if tokens <= 1:
        return 0.0
    if tokens > chunk:
        return None
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens_per_call(middle, chunk) < tokens else (low, middle)
    return high


def drafted(module: nn.Module, tokens: torch.Tensor, settings: Any) -> dict[str, Any]:
    """What prompt-lookup drafts are worth on the run's own text: some texts continued greedily."""
    stride = max(1, (len(tokens) - settings.context) // DRAFT_TEXTS)
    total = speculative.Drafts()
    for start in range(0, min(len(tokens) - settings.context, stride * DRAFT_TEXTS - 1), stride):
        prompt = tokens[start : start + settings.context][None]
        total.add(speculative.speculate(module, prompt, DRAFT_TOKENS, settings.chunk)[1])
    return {
        "tokens_per_call": total.written / total.calls, "proposed": total.proposed, "accepted": total.accepted,
        "acceptance": total.accepted / total.proposed if total.proposed else None, "calls": total.calls,
    }  # fmt: skip


def verify(
    dense: nn.Module, sparse: nn.Module, tokens: torch.Tensor, decode: dict, settings: Any, hardware: Any
) -> dict[str, Any]:
    """A verify step of `measure.chunk` tokens of one text: timed, its union, and the acceptance that pays.

    The call holds the last token and chunk - 1 drafts. Teacher-forced text stands in for the drafts while it is timed.
    `needed`: tokens per call above which speculation beats one-token decode of the same model; of `pair`, of the faster.
    """
    like = latency.Text.of(tokens, settings.context, dense)
    text = Rows.of(tokens, 1, settings.context, settings.chunk, like)
    row = timed(dense, sparse, text, settings, hardware)
    figures = union_of_rows(dense, sparse, text, [settings.chunk], settings)
    one = {side: decode[side]["median_ms"] for side in ("dense", "sparse")}
    one["pair"] = min(one.values())
    best = {side: row[f"{side}_ms"] for side in ("dense", "sparse")}
    best["pair"] = best["sparse"]
    needed = {side: best[side] / one[side] for side in one}
    section = {
        "chunk": settings.chunk, "context": settings.context, **row,
        "union_density": 1 - figures[str(settings.chunk)]["sparsity"] if figures else 1.0,
        "needed_tokens_per_call": needed,
        "needed_acceptance": {side: rate_for(tokens, settings.chunk) for side, tokens in needed.items()},
    }  # fmt: skip
    try:
        section["drafts"] = {side: drafted(m, tokens, settings) for side, m in (("dense", dense), ("sparse", sparse))}
    except ValueError as error:
        return section | {"drafts": None, "drafts_reason": str(error)}
    measured = {side: section["drafts"]["sparse" if side == "pair" else side]["tokens_per_call"] for side in needed}
    return section | {"pays": {side: measured[side] > needed[side] for side in needed}}
