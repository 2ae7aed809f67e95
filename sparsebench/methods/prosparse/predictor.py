"""Predictors of active neurons for approximate skipping: per layer Linear(d, r), ReLU, Linear(r, f) on the FFN's input.

Label of a neuron: x1 != 0 (arXiv 2402.13516, App. F says all active neurons; its public code labels otherwise). Loss,
optimiser and stopping follow that code: BCE with weight 1 on active and density + 0.005 on inactive neurons, the epoch
with the best recall is kept.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from sparsebench import kernels
from sparsebench.calibration.histograms import observe
from sparsebench.config import setting
from sparsebench.modules.base import Cost, Counter, SiteSparsity, SparseModule
from sparsebench.modules.neuron_sparse import last_path
from sparsebench.modules.routed import MOST_ROWS
from sparsebench.modules.tokens import CALLS
from sparsebench.sites import Block, find_blocks


@dataclass(kw_only=True)
class Settings:
    """How predictors are trained."""

    rank: int = setting(gt=0)
    tokens: int = setting(gt=1)
    epochs: int = setting(gt=0)
    patience: int = setting(gt=0)
    batch_size: int = setting(gt=0)
    lr: float = setting(gt=0)
    weight_decay: float = setting(ge=0)
    held_out: float = setting(gt=0, lt=1)
    target_recall: float = setting(gt=0, le=1)


class Predictor(SparseModule):
    """x [..., d] -> bool [..., f], True where the neuron is predicted active; the rows of W_gate (W_1) of others are skipped.

    A sparse module of its own for counting and costs (site `<layer>.gate`). Plain parameters, no linear modules, so that
    the structure of the block around it stays what it was.
    """

    unit = "neurons"

    def __init__(
        self, first: torch.Tensor, second: torch.Tensor, bias1: torch.Tensor, bias2: torch.Tensor, site="", k=None
    ):
        super().__init__()
        self.k: int | None = k  # neurons that all rows of a batch share; None = each token's own
        self.first, self.second = nn.Parameter(first), nn.Parameter(second)  # [r, d], [f, r]
        self.bias1, self.bias2 = nn.Parameter(bias1), nn.Parameter(bias2)
        self.register_buffer("threshold", torch.zeros((), device=first.device), persistent=False)
        self.site = site

    @property
    def num_weights(self) -> int:
        """Weights of the map whose rows are skipped, [f, d]."""
        return self.first.shape[1] * self.second.shape[0]

    @property
    def covers(self) -> dict[str, int]:
        return {self.site: self.num_weights}

    def kernel(self, tokens: int) -> str:
        """What computes the predicted rows of the gate map: the kernel for one token, a masked product for more."""
        if tokens > 1:
            return "masked_dense"
        return kernels.name_of(kernels.providing(self.kernel_name, "output_sparse_linear"))

    def kernel_of_rows(self, rows: int) -> str:
        return self.kernel(1) if rows <= MOST_ROWS else "masked_dense"

    def new_counter(self) -> Counter:
        return Counter(self.second.shape[0], self.second.device)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.first, self.bias1).relu(), self.second, self.bias2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.logits(x)
        wanted = logits > 0 if self.k is None else of_batch(logits, self.k)
        wanted = wanted | (self.threshold < 0)
        if self.counter is not None:
            self.counter.add(wanted)
        return wanted

    def costs(self, measured: dict[str, SiteSparsity]) -> dict[str, Cost]:
        """The gate map's, with r (d + f) products of the predictor as overhead."""
        size, extra = self.num_weights, self.first.numel() + self.second.numel()
        share, element = 1 - measured[self.site].sparsity_of_sparse_tokens, self.first.element_size()
        return {self.site: Cost(size, share * size, extra, size * element, (share * size + extra) * element)}


def of_batch(logits: torch.Tensor, k: int) -> torch.Tensor:
    """bool [.., f]: the k neurons with the largest sum of ReLU(logits) over the rows of a call, the same for all of them.

    logits [B, T, f] or, of a model that flattens its tokens, [B T, f]: each position has a set of its own, as it has in a
    decode step of B rows. Padding has no voice. Outside of a model's call each row of [N, f] stands alone.
    """
    call, neurons = CALLS[-1], logits.shape[-1]
    scores = logits.relu()
    if scores.dim() == 2:
        scores = scores.unflatten(0, call.shape or (1, -1))
    if call.mask is not None and call.mask.shape == scores.shape[:2]:
        scores = scores * call.mask.unsqueeze(-1)
    chosen = scores.sum(0, keepdim=True).topk(min(k, neurons), -1, sorted=False).indices
    wanted = torch.zeros_like(scores[:1], dtype=torch.bool).scatter_(-1, chosen, True)
    return wanted.expand_as(scores).reshape(logits.shape)


def initial(d: int, rank: int, f: int, seed: int) -> Predictor:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(rank, d, generator=generator) * d**-0.5
    second = torch.randn(f, rank, generator=generator) * rank**-0.5
    return Predictor(first, second, torch.zeros(rank), torch.zeros(f))


def pairs(module: nn.Module, blocks: list[Block], sequences: torch.Tensor, batch_size: int) -> dict[int, tuple]:
    """Per layer (x [M, d], active [M, f] bool) over `sequences` [N, T], on the CPU; active where x1 != 0."""
    inputs: dict[int, list] = {b.index: [] for b in blocks}
    labels: dict[int, list] = {b.index: [] for b in blocks}
    observers = {}
    for block in blocks:
        first = block.sites["gate" if "gate" in block.sites else "fc1"].path
        observers[first] = lambda x, i=block.index: inputs[i].append(x.flatten(0, -2).cpu())
        observers[last_path(block)] = lambda x1, i=block.index: labels[i].append((x1 != 0).flatten(0, -2).cpu())
    observe(module, sequences, observers, batch_size)
    return {i: (torch.cat(inputs[i]).float(), torch.cat(labels[i])) for i in inputs}


def measures(predictor: Predictor, x: torch.Tensor, active: torch.Tensor) -> dict[str, float]:
    """recall = predicted and active / active; predicted sparsity = share predicted inactive; sparsity = truly inactive."""
    with torch.no_grad():
        predicted = torch.cat([predictor(part) for part in x.split(4096)])
    both, count = int((predicted & active).sum()), int(active.sum())
    return {
        "recall": both / count if count else 1.0,
        "predicted_sparsity": 1 - int(predicted.sum()) / predicted.numel(),
        "sparsity": 1 - count / active.numel(),
    }


def train_one(x: torch.Tensor, active: torch.Tensor, settings: Settings, seed: int) -> tuple[Predictor, dict]:
    """The predictor with the best held-out recall, and its measures there. x [M, d], active [M, f]."""
    cut = max(1, min(len(x) - 1, round(len(x) * (1 - settings.held_out))))
    predictor = initial(x.shape[1], settings.rank, active.shape[1], seed).to(x.device)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    weight = float(active[:cut].float().mean()) + 0.005
    best, best_measured, stale = None, {"recall": -1.0}, 0
    for epoch in range(settings.epochs):
        for part in torch.randperm(cut, generator=generator).split(settings.batch_size):
            target = active[part].float()
            loss = F.binary_cross_entropy_with_logits(
                predictor.logits(x[part]), target, weight=target + weight * (1 - target)
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        measured = measures(predictor, x[cut:], active[cut:]) | {"epoch": epoch}
        stale += 1
        if measured["recall"] > best_measured["recall"]:
            best, best_measured, stale = copy.deepcopy(predictor), measured, 0
        if best_measured["recall"] > settings.target_recall or stale >= settings.patience:
            break
    return best.requires_grad_(False), best_measured


def fit(module: nn.Module, data, settings: Settings, work) -> tuple[dict[str, torch.Tensor], dict]:
    """(state tensors `predictor.<layer>.*`, measures per layer and their plain means over layers) on data.fit."""
    blocks = find_blocks(module)
    length = data.fit.sequence_length
    pairs_by_layer = pairs(module, blocks, data.fit.sequences(max(1, settings.tokens // length)), work.batch_size)
    tensors, per_layer = {}, {}
    for layer, (x, active) in pairs_by_layer.items():
        device = next(module.parameters()).device
        one, per_layer[layer] = train_one(x.to(device), active.to(device), settings, work.seed + layer)
        tensors |= {f"predictor.{layer}.{name}": p.detach() for name, p in one.named_parameters()}
        work.log({f"fit/predictor_{key}/{layer}": value for key, value in per_layer[layer].items()})
    means = {
        key: sum(m[key] for m in per_layer.values()) / len(per_layer)
        for key in ("recall", "predicted_sparsity", "sparsity")
    }
    return tensors, {"rank": settings.rank, "tokens": len(x), **means, "per_layer": per_layer}


def build(module: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[int, Predictor]:
    """Predictors from state tensors in the model's dtype and on its device, by layer."""
    like = next(module.parameters())
    return {
        b.index: Predictor(
            *(tensors[f"predictor.{b.index}.{n}"].to(like) for n in ("first", "second", "bias1", "bias2")),
            site=f"{b.index}.{'gate' if 'gate' in b.sites else 'fc1'}",
        ).requires_grad_(False)
        for b in find_blocks(module)
    }
