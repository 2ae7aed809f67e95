"""Which experts a model's tokens are routed to: how evenly, how many a batch hits, and whether sparsity changed the choice.

A pair is a token and an expert that its router chose. Routing is a knife's edge: a small change of a hidden state can
swap the last experts of the k for others, in every later layer. `flipped` is the share of (token, layer) whose set of
experts differs from the dense model's under the same text; it stands beside quality, which sees only the sum of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsebench.data.text import batches
from sparsebench.measure.macs import Outside
from sparsebench.modules.base import Cost, SiteSparsity
from sparsebench.modules.sparse_experts import PairCounter
from sparsebench.sites import expert_modules

SEQUENCES = 8  # of the test split, for routing [choice]: enough to see the experts, small enough to keep every choice
BATCHES = (1, 4, 16, 64)


@dataclass
class Routing:
    """The experts that each token of some sequences was sent to, by layer with experts."""

    num_experts: int
    chosen: list[torch.Tensor]  # int64 [tokens, k] each, sorted

    def flipped(self, dense: Routing) -> float:
        """Share of (token, layer) whose set differs from the dense model's."""
        changed = [(a != b).any(-1) for a, b in zip(self.chosen, dense.chosen, strict=True)]
        return float(torch.cat(changed).double().mean())

    def tokens_per_expert(self) -> torch.Tensor:
        """int64 [layers, E]."""
        return torch.stack([torch.bincount(c.flatten(), minlength=self.num_experts) for c in self.chosen])

    def hit(self, batch: int) -> float | None:
        """Experts hit by `batch` tokens from far apart, mean over groups and layers; None with fewer tokens than that."""
        counts = []
        for chosen in self.chosen:
            groups = len(chosen) // batch
            for start in range(groups):
                counts.append(chosen[start::groups][:batch].unique().numel())
        return sum(counts) / len(counts) if counts else None


def experts_hit(num_experts: int, per_token: int, batch: int) -> float:
    """Experts that `batch` tokens hit with uniform routing: E (1 - (1 - k/E)^B)."""
    return num_experts * (1 - (1 - per_token / num_experts) ** batch)


@contextmanager
def choices(module: nn.Module) -> Iterator[list[list[torch.Tensor]]]:
    """A list by layer with experts that gets the chosen experts [N, k] of every call while the context lasts."""
    seen: list[list[torch.Tensor]] = []
    with ExitStack() as hooks:
        for _, experts in expert_modules(module):
            layer: list[torch.Tensor] = []
            seen.append(layer)
            hooks.enter_context(
                experts.register_forward_pre_hook(
                    lambda _, args, layer=layer: layer.append(args[1].sort(-1).values.cpu())
                )
            )
        yield seen


def routing(module: nn.Module, sequences: torch.Tensor, batch_size: int) -> Routing | None:
    """Of the first sequences [N, T] without padding; None for a model without experts."""
    experts = expert_modules(module)
    if not experts:
        return None
    with choices(module) as seen, torch.no_grad():
        for batch in batches(sequences[:SEQUENCES], batch_size, module):
            module.base_model(input_ids=batch, use_cache=False)
    return Routing(experts[0][1].num_experts, [torch.cat(layer) for layer in seen])


def three(values: torch.Tensor) -> list[float]:
    """[least, median, most]."""
    values = values.double()
    return [float(values.min()), float(values.quantile(0.5)), float(values.max())]


def by_expert(counters: dict[str, Any]) -> dict[str, Any]:
    """Sparsity of single experts, by the site that counts: [least, median, most] over experts with pairs, and how many had
    none (they count nowhere). Each expert weighs the same here, unlike in `sparsity`, where each pair does."""
    out = {}
    for site, counter in counters.items():
        if isinstance(counter, PairCounter) and counter.sparse_tokens:
            run = counter.pairs > 0
            share = 1 - counter.kept_by_expert[run].double() / (counter.pairs[run] * counter.kept.numel())
            out[site] = {"sparsity": three(share), "never_run": int((~run).sum())}
    return out


def describe(dense: Routing, sparse: Routing) -> dict[str, Any]:
    """`extra.routing` of a record, as far as routing decides it."""
    load, per_token = dense.tokens_per_expert(), dense.chosen[0].shape[1]
    return {
        "flipped": sparse.flipped(dense),
        "tokens": len(dense.chosen[0]),
        "tokens_per_expert": three(load),
        "never_run": int((load == 0).sum()),
        "experts_hit": {
            str(b): {"uniform": experts_hit(dense.num_experts, per_token, b), "measured": dense.hit(b)} for b in BATCHES
        },
        "definition": "flipped: share of (token, layer) whose set of experts differs from the dense model's; "
        "tokens_per_expert: least, median, most over layers and experts",
    }


def bound(dense: dict[str, Cost], sparse: dict[str, Cost], outside: Outside) -> dict[str, float]:
    """The experts' share q of the bytes of a decode step, and the speed-up that reading fewer of them alone can give."""
    inside = {name for name in dense if ".experts." in name}
    whole = sum(c.dense_bytes for c in dense.values()) + outside.bytes
    experts = sum(dense[name].dense_bytes for name in inside)
    saved = sum(dense[name].dense_bytes - sparse[name].sparse_bytes for name in inside)
    return {"experts_share_of_bytes": experts / whole, "bound": whole / (whole - saved)}


def model_wide_of_stored(dense: dict[str, Cost], measured: dict[str, SiteSparsity], stored: dict[str, int]) -> float:
    """Sparsity over all stored parameters of the blocks; `sparsity.model_wide` is over those that a token passes.

    stored: parameters of each map of experts by site name.
    """
    weights = {name: stored.get(name, int(cost.dense_macs)) for name, cost in dense.items()}
    dropped = sum(weights[name] * site.sparsity for name, site in measured.items() if name in weights)
    return dropped / sum(weights.values())
