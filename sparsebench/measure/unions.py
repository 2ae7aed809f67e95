"""Unions of what several tokens keep: rows of a batch (independent texts) or chunks of consecutive tokens.

A product of several tokens reads a weight row if any of them keeps its channel, so what it skips is what *all* drop.
Figures per group of L tokens (docs/methods/chunk.md, docs/methods/polar.md):
    sparsity   share of (group, unit) pairs that no token of the group keeps: union or chunk-level sparsity, CLS_L
    tokens     share of (token, unit) pairs dropped, over the very tokens of these groups: TLS
    excess     sparsity / tokens^L: 1 where the tokens' masks are independent (sums over sites of both)
    reuse      mean over neighbours of |S_t and S_t+1| / |S_t|;  jaccard: of |S_t and S_t+1| / |S_t or S_t+1|
Chunks are aligned inside a document; tails are dropped and counted. Masks are merged on the fly and never stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sparsebench.data.text import batches
from sparsebench.measure.sparsity import model_wide
from sparsebench.modules.base import Counter, measured_modules
from sparsebench.records.progress import shown


class Groups:
    """Which tokens of the present call belong together; one object for all counters of a model.

    members: size -> int64 [G, size], places among the call's tokens taken row by row; neighbours: int64 [P, 2].
    """

    def __init__(self, sizes: list[int]):
        self.sizes = sorted({1, *sizes})
        self.members: dict[int, torch.Tensor] = {}
        self.neighbours = torch.empty(0, 2, dtype=torch.int64)
        self.tails = dict.fromkeys(self.sizes, 0)  # tokens in no group of that size

    def of_rows(self, rows: int) -> None:
        """A call of one token for each of so many independent rows: nested groups of rows."""
        for size in self.sizes:
            whole = rows // size * size
            self.members[size] = torch.arange(whole).view(-1, size)
            self.tails[size] += rows - whole

    def of_chunks(self, documents: torch.Tensor) -> None:
        """A call of consecutive tokens; documents int64 [B, T]: whose document each is of, below 0 on padding."""
        flat = documents.flatten()
        starts = torch.ones_like(documents, dtype=torch.bool)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        first = torch.where(starts.flatten(), torch.arange(len(flat)), 0).cummax(0).values
        places, real = torch.arange(len(flat)), flat >= 0
        run = torch.cumsum(starts.flatten(), 0) - 1
        length = torch.bincount(run)[run]  # tokens of each token's piece of document
        for size in self.sizes:
            begins = real & ((places - first) % size == 0) & (places - first + size <= length)
            self.members[size] = places[begins].unsqueeze(1) + torch.arange(size)
            self.tails[size] += int(real.sum()) - int(begins.sum()) * size
        follows = real & (places > first)
        self.neighbours = torch.stack([places[follows] - 1, places[follows]], 1)


class UnionCounter(Counter):
    """A site's counts, and those of its unions: exact integers, sums of ratios in float64."""

    def __init__(self, like: Counter, groups: Groups):
        super().__init__(like.kept.numel(), like.kept.device)
        self.groups = groups
        self.union = dict.fromkeys(groups.sizes, 0)  # (group, unit) pairs that some token keeps
        self.inside = dict.fromkeys(groups.sizes, 0)  # (token, unit) pairs kept, tokens of these groups
        self.count = dict.fromkeys(groups.sizes, 0)  # groups
        self.reuse, self.jaccard, self.pairs = 0.0, 0.0, 0

    def add(self, keep: torch.Tensor, dense: torch.Tensor | None = None) -> None:
        super().add(keep, dense)
        rows = keep.reshape(-1, keep.shape[-1])
        left = None if dense is None else dense.flatten().to(rows.device)
        for size in self.groups.sizes:
            members = sparse_only(self.groups.members[size].to(rows.device), left)
            for part in members.split(max(1, (1 << 22) // (size * rows.shape[1]))):
                chosen = rows[part]  # [G, size, n]
                self.union[size] += int(chosen.any(1).sum())
                self.inside[size] += int(chosen.sum())
            self.count[size] += len(members)
        for part in sparse_only(self.groups.neighbours.to(rows.device), left).split(4096):
            one, other = rows[part[:, 0]], rows[part[:, 1]]
            both, either = (one & other).sum(-1).double(), (one | other).sum(-1).double()
            known = one.any(-1)  # a token that keeps nothing has nothing to hand on
            self.reuse += float((both / one.sum(-1).clamp(min=1))[known].sum())
            self.jaccard += float((both / either.clamp(min=1))[known].sum())
            self.pairs += int(known.sum())

    def merge(self, other: UnionCounter) -> None:
        super().merge(other)
        for mine, its in ((self.union, other.union), (self.inside, other.inside), (self.count, other.count)):
            for size in mine:
                mine[size] += its[size]
        self.reuse, self.jaccard, self.pairs = (
            self.reuse + other.reuse, self.jaccard + other.jaccard, self.pairs + other.pairs
        )  # fmt: skip

    def figures(self) -> dict[int, dict[str, float]]:
        """By size: `sparsity` of the union and of its `tokens`; sizes that no group had are left out."""
        units = self.kept.numel()
        return {
            size: {
                "sparsity": 1 - self.union[size] / (count * units),
                "tokens": 1 - self.inside[size] / (count * units * size),
            }
            for size, count in self.count.items()
            if count
        }


def sparse_only(members: torch.Tensor, dense: torch.Tensor | None) -> torch.Tensor:
    """The groups without a token that a prompt policy left dense."""
    return members if dense is None or not len(members) else members[~dense[members].any(1)]


@contextmanager
def counting(model: nn.Module, groups: Groups) -> Iterator[dict[str, UnionCounter]]:
    """Count unions at every sparse module that counts units of single tokens, while the block runs."""
    counters = {}
    for site, module in measured_modules(model):
        own = module.new_counter()
        if type(own) is Counter:
            module.counter = counters[site] = UnionCounter(own, groups)
    try:
        yield counters
    finally:
        for _, module in measured_modules(model):
            module.counter = None


def summarise(model: nn.Module, counters: dict[str, UnionCounter], weights: dict[str, int]) -> dict:
    """The figures by size: model-wide (by weights read, 0 where nothing drops), per kind of unit, and per site.

    weights: of every block map, by site. Heads have no weight: they stand in `kinds` alone, a plain mean over sites.
    """
    modules = dict(measured_modules(model))
    figures = {site: counter.figures() for site, counter in counters.items()}
    sizes = sorted({size for each in figures.values() for size in each})
    section: dict[str, dict] = {}
    for size in sizes:
        here = {site: each[size] for site, each in figures.items() if size in each}
        maps = {name: site for site in here for name in modules[site].covers if name in weights}
        whole = {
            key: model_wide({name: here[maps[name]][key] if name in maps else 0.0 for name in weights}, weights)
            for key in ("sparsity", "tokens")
        }
        alone = sum(f["tokens"] ** size for f in here.values())  # what independent tokens would leave
        section[str(size)] = {
            **whole,
            "excess": sum(f["sparsity"] for f in here.values()) / alone if alone else None,
            "kinds": {
                kind: sum(values) / len(values)
                for kind in sorted({modules[site].unit for site in here})
                if (values := [f["sparsity"] for site, f in here.items() if modules[site].unit == kind])
            },
            "per_site": {site: f["sparsity"] for site, f in here.items()},
        }
    return section


def neighbours(counters: dict[str, UnionCounter]) -> dict[str, float | None]:
    """reuse and jaccard, plain means over sites."""
    known = [c for c in counters.values() if c.pairs]
    mean = {key: sum(getattr(c, key) / c.pairs for c in known) / len(known) for key in ("reuse", "jaccard") if known}
    return {"reuse": mean.get("reuse"), "jaccard": mean.get("jaccard")}


def chunks(
    module: nn.Module, sequences: torch.Tensor, documents: torch.Tensor, batch_size: int, sizes: list[int],
    weights: dict[str, int],
) -> dict | None:  # fmt: skip
    """Chunk-level sparsity over windows [N, T] of text, masks as the model has them there; None where nothing drops.

    documents int64 [N, T]: the document of each token.
    """
    groups = Groups(sizes)
    with counting(module, groups) as counters:
        steps = zip(batches(sequences, batch_size, module), documents.split(batch_size), strict=True)
        for batch, owners in shown(steps if counters else [], -(-len(sequences) // batch_size), "chunks"):
            groups.of_chunks(owners)
            module(input_ids=batch, use_cache=False, logits_to_keep=1)
    if not counters:
        return None
    lengths = summarise(module, counters, weights)
    return {
        "lengths": lengths,
        **neighbours(counters),
        "tails": {str(size): count for size, count in groups.tails.items()},
        "tokens": sequences.numel(),
        "weights": sum(weights.values()),
        "definition": "chunk-level sparsity: share of (chunk, unit) pairs that no token of the chunk keeps, weighted by "
        "parameters of the block maps; chunks of consecutive tokens, aligned inside a document, teacher-forced",
    }


def of_all_maps(section: dict, total: float) -> None:
    """Turn model-wide shares of the weights that a method covers into shares of all block maps' `total`, in place."""
    for each in section["lengths"].values():
        each["sparsity"] *= section["weights"] / total
        each["tokens"] *= section["weights"] / total
    section["weights"] = total
