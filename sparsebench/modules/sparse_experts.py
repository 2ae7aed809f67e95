"""Sparsity inside experts: their inputs and middles dropped by a threshold (TEAL, WINA), their neurons by the gate (CATS).

rule     decides on                             skips, per pair            MACs of a pair (dense 3 D I)
input    |x_i| c_i > t                          inputs of gate and up      2 D I (1 - s) + D I
mid      |mid_i| c_i > t                        columns of down            2 D I + D I (1 - s)
gate     |act(g_i)| >= t, the gate dense        rows of up, columns of down    D I + 2 D I (1 - s)
The router reads the dense x, and biases of down are added once per pair whatever was dropped. Formulas, sources and
choices: docs/methods/experts.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from sparsebench import kernels
from sparsebench.kernels import masked_dense
from sparsebench.modules.base import Cost, Counter, SiteSparsity, SparseModule
from sparsebench.modules.fused_experts import (
    Gating,
    Pairs,
    Tensors,
    gathered,
    pairs_of,
    parts,
    products,
    relaid,
    summed,
    tensors_of,
)
from sparsebench.modules.input_sparse import replace
from sparsebench.modules.tokens import left_dense
from sparsebench.sites import Block, ExpertMaps
from sparsebench.sites import Experts as Layout

INSIDE = ("all", "input", "mid", "off")  # which tensors of experts a method of inputs makes sparse; all: both
Rule = Callable[[torch.Tensor], torch.Tensor]  # of values [P, n] -> bool [P, n], e.g. a cut that moves with the token


class PairCounter(Counter):
    """Counts of one tensor of experts: kept channels over pairs, and by expert over its own pairs."""

    def __init__(self, channels: int, num_experts: int, device: torch.device):
        super().__init__(channels, device)
        self.pairs = torch.zeros(num_experts, dtype=torch.int64, device=device)  # sparse pairs by expert
        self.kept_by_expert = torch.zeros(num_experts, dtype=torch.int64, device=device)

    def add_pairs(self, keep: torch.Tensor, pairs: Pairs, dense: torch.Tensor | None) -> None:
        """Count the pairs of one call whose tokens are no padding. keep bool [P, n]; dense: bool [P] or None."""
        experts = pairs.experts
        if self.token_mask is not None:
            valid = self.token_mask.flatten().to(keep.device)[pairs.tokens]
            keep, experts, dense = keep[valid], experts[valid], None if dense is None else dense[valid]
        if dense is not None:
            self.dense_tokens += int(dense.sum())
            keep, experts = keep[~dense], experts[~dense]
        self.kept += keep.sum(0)
        self.sparse_tokens += keep.shape[0]
        self.pairs += torch.bincount(experts, minlength=len(self.pairs))
        self.kept_by_expert.index_add_(0, experts, keep.sum(1))

    def merge(self, other: PairCounter) -> None:
        super().merge(other)
        self.pairs += other.pairs
        self.kept_by_expert += other.kept_by_expert


def per_pair(values: torch.Tensor | None, pairs: Pairs) -> torch.Tensor | None:
    """A value by expert [E] or [E, n] as one by pair [P, 1] or [P, n]; anything else as it is."""
    if values is None or values.dim() == 0:
        return values
    chosen = values[pairs.experts]
    return chosen.unsqueeze(-1) if chosen.dim() == 1 else chosen


class ExpertLinear(SparseModule):
    """One fused map of all experts that drops input channels per pair.

    Args:
        weight: [E, m, n]; bias: [E, m] or None.
        sites: record names of what it holds (gate and up, or down), each of so many parameters of a token's k experts.
        threshold: keep x_i iff |x_i| c_i > threshold (strictly), a number or [E].
        scale: c [E, n] or None; top_k: exactly so many of each pair instead; rule: what stays instead.
        kernel: backend for a token alone; used on the CPU, elsewhere masks simulate it.
    """

    def __init__(
        self, weight, bias, sites: list[str], active: int, *, threshold=-1.0, scale=None, top_k=None,
        rule: Rule | None = None, kernel="masked_dense",
    ):  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        limits = torch.as_tensor(threshold, dtype=torch.float32).clone().to(weight.device)
        self.register_buffer("threshold", limits, persistent=False)
        self.register_buffer("scale", None if scale is None else scale.float().to(weight.device), persistent=False)
        self.sites, self.active, self.top_k, self.rule, self.kernel_name = sites, active, top_k, rule, kernel
        self.site = sites[0]
        kernels.chain(kernel)

    @property
    def covers(self) -> dict[str, int]:
        return dict.fromkeys(self.sites, self.active)

    def new_counter(self) -> PairCounter:
        return PairCounter(self.weight.shape[2], len(self.weight), self.weight.device)

    @property
    def skips(self) -> bool:
        """Whether a token alone may go to a kernel."""
        return self.weight.device.type == "cpu"

    def kernel(self, tokens: int) -> str:
        return kernels.ran(self.kernel_name, self.weight[0]) if tokens == 1 and self.skips else "masked_dense"

    def keep(self, x: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """bool [P, n] of x [P, n]."""
        limit, scale = per_pair(self.threshold, pairs), per_pair(self.scale, pairs)
        if self.rule is not None:
            return self.rule(x) | (limit < 0)
        if self.top_k is not None:
            return (masked_dense.largest(x, self.top_k, scale) & (x != 0)) | (limit < 0)
        return masked_dense.kept(x, limit, scale)

    def forward(self, x: torch.Tensor, pairs: Pairs, dense: torch.Tensor | None = None) -> torch.Tensor:
        """[P, m] of x [P, n]; dense: bool [P], pairs left dense."""
        if pairs.single and self.counter is None:
            return self.one_token(x, pairs)
        keep = self.keep(x, pairs)
        if self.counter is not None:
            self.counter.add_pairs(keep, pairs, dense)
        if dense is not None:
            keep = keep | dense.unsqueeze(-1)
        return products(torch.where(keep, x, 0), pairs.experts, self.weight, self.bias)

    def one_token(self, x: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """The k experts of one token, each by the kernel."""
        if not self.skips:
            return gathered(torch.where(self.keep(x, pairs), x, 0), pairs.experts, self.weight, self.bias)
        by_value = self.top_k is None and self.rule is None
        keep = None if by_value else self.keep(x, pairs)
        outputs = []
        for i, e in enumerate(pairs.experts.tolist()):
            limit = self.threshold if self.threshold.dim() == 0 else self.threshold[e]
            rule = {"threshold": limit, "scale": None if self.scale is None else self.scale[e]}
            backend = kernels.serving(self.kernel_name, x[i : i + 1], self.weight[e])
            bias = None if self.bias is None else self.bias[e]
            rule = rule if by_value else {"keep": keep[i : i + 1]}
            y = backend.input_sparse_linear(x[i : i + 1], self.weight[e], None, **rule)
            outputs.append(y if bias is None else y + bias)
        return torch.cat(outputs)

    def costs(self, measured: dict[str, SiteSparsity]) -> dict[str, Cost]:
        """MACs and bytes of the k experts of one decoded token. Overhead: n per pair for a scale, and for a selection."""
        per_token, element = self.active / self.weight[0].numel() * len(self.sites), self.weight.element_size()
        chosen = (self.scale is not None) + (self.top_k is not None or self.rule is not None)
        extra, costs = per_token * self.weight.shape[2] * chosen, {}
        for site in self.sites:
            kept = (1 - measured[site].sparsity_of_sparse_tokens) * self.active
            costs[site] = Cost(self.active, kept, extra, self.active * element, kept * element)
            extra = 0
        return costs


class Passed(nn.Module):
    """Gives back its first argument: a place for a hook."""

    def forward(self, x: torch.Tensor, *rest) -> torch.Tensor:
        return x


class SparseExperts(nn.Module, ExpertMaps):
    """Takes the place of a model's experts, with the same call: hidden [N, D], chosen experts and weights [N, k].

    Args:
        own: the module of transformers.
        layout: where it stands (sites.py).
        into, mid: rules of the maps gate and up, and down (as for ExpertLinear); None keeps all.
        prompt: which tokens of a multi-token call are sparse.
        kernel: backend for a token alone. One that skips wants the weights laid out anew, and takes them from `own`.
    """

    def __init__(self, own: nn.Module, layout: Layout, into=None, mid=None, *, prompt="all", kernel="masked_dense"):
        super().__init__()
        self.num_experts, self.hidden, self.inner = layout.num_experts, layout.hidden, layout.inner
        self.gating, self.gates, self.prompt, self.top_k = Gating(own), Passed(), prompt, layout.per_token
        tensors = taken(own, kernel, inputs=into is not None)
        self.halves, sites, active = tensors.halves, layout.sites, layout.active
        self.gate_up = ExpertLinear(
            tensors.gate_up, tensors.gate_up_bias, [sites["gate"], sites["up"]], active, kernel=kernel, **(into or {})
        )
        self.down = ExpertLinear(tensors.down, tensors.down_bias, [sites["down"]], active, kernel=kernel, **(mid or {}))
        for each, rule in ((self.gate_up, into), (self.down, mid)):
            each.counts = rule is not None
            if rule is None:
                each.kernel_name = "masked_dense"
                each.costs = nothing

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        pairs, dense = pairs_of(hidden, index, weights, self.num_experts), left_dense(self.prompt, hidden)
        dense = None if dense is None else dense[pairs.tokens]
        gate, up = parts(self.gate_up(hidden[pairs.tokens], pairs, dense), self.halves)
        mid = self.gating.combined(self.gates(self.gating.activated(gate), pairs), up)
        return summed(self.down(mid, pairs, dense), pairs, hidden)


def nothing(measured: dict[str, SiteSparsity]) -> dict[str, Cost]:
    """A map that drops nothing costs what it did."""
    return {}


def taken(own: nn.Module, kernel: str, *, inputs: bool) -> Tensors:
    """The tensors of `own`: as they lie for masks, laid out anew for a kernel that skips, `own` giving up its own."""
    tensors = tensors_of(own)
    if not kernels.load(kernel).SKIPS or tensors.gate_up.device.type != "cpu":
        return tensors
    tensors = relaid(tensors, inputs=inputs)
    own.gate_up_proj = own.down_proj = None
    return tensors


class GateSparseExperts(SparseModule, ExpertMaps):
    """Takes the place of a model's experts: a pair computes the neurons whose gate is large enough.

    Args:
        own, layout, prompt, kernel: as for SparseExperts.
        threshold: keep a neuron iff |act(g)| is at least this, a number or [E]; rule: what stays instead.
    """

    def __init__(
        self, own, layout: Layout, threshold, *, rule: Rule | None = None, prompt="all", kernel="masked_dense"
    ):
        super().__init__()
        self.num_experts, self.hidden, self.inner = layout.num_experts, layout.hidden, layout.inner
        self.gating, self.prompt, self.rule, self.kernel_name = Gating(own), prompt, rule, kernel
        self.top_k, self.active, self.sites = layout.per_token, layout.active, layout.sites
        self.site = f"{layout.layer}.experts"
        tensors = taken(own, kernel, inputs=False)
        self.halves = tensors.halves
        for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
            tensor = getattr(tensors, name)
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
        limits = torch.as_tensor(threshold, dtype=torch.float32).clone().to(self.down.device)
        self.register_buffer("threshold", limits, persistent=False)
        kernels.chain(kernel)

    @property
    def covers(self) -> dict[str, int]:
        return {self.sites["up"]: self.active, self.sites["down"]: self.active}

    def new_counter(self) -> PairCounter:
        return PairCounter(self.inner, self.num_experts, self.down.device)

    @property
    def skips(self) -> bool:
        """Whether a token alone may go to a kernel: those there are know no biases and no gate but act(g) * u."""
        return self.down.device.type == "cpu" and self.halves and self.down_bias is None and not self.gating.clamped

    def kernel(self, tokens: int) -> str:
        one = tokens == 1 and self.skips
        return kernels.ran(self.kernel_name, self.down[0], "neuron_sparse_ffn") if one else "masked_dense"

    def keep(self, gates: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """bool [P, I] of act(g) [P, I]."""
        limit = per_pair(self.threshold, pairs)
        return gates.abs() >= limit if self.rule is None else self.rule(gates) | (limit < 0)

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        pairs, dense = pairs_of(hidden, index, weights, self.num_experts), left_dense(self.prompt, hidden)
        x, few = hidden[pairs.tokens], pairs.single and self.counter is None
        if few and self.skips:
            return summed(self.one_token(x, pairs), pairs, hidden)
        run = gathered if few and self.down.device.type != "cpu" else products
        gate, up = parts(run(x, pairs.experts, self.gate_up, self.gate_up_bias), self.halves)
        gates = self.gating.activated(gate)
        keep, dense = self.keep(gates, pairs), None if dense is None else dense[pairs.tokens]
        if self.counter is not None:
            self.counter.add_pairs(keep & (gates != 0), pairs, dense)
        if dense is not None:
            keep = keep | dense.unsqueeze(-1)
        mid = self.gating.combined(torch.where(keep, gates, 0), up)
        return summed(run(mid, pairs.experts, self.down, self.down_bias), pairs, hidden)

    def one_token(self, x: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """The k experts of one token: the gate in full, then the kernel over the neurons that stay."""
        experts, inner = pairs.experts.tolist(), self.inner
        gates = torch.cat([nn.functional.linear(x[i : i + 1], self.gate_up[e, :inner]) for i, e in enumerate(experts)])
        gates = self.gating.activated(gates)
        active = torch.where(self.keep(gates, pairs), gates, 0)
        outputs = []
        for i, e in enumerate(experts):
            given = x[i : i + 1], active[i : i + 1], self.gate_up[e, inner:], self.down[e]
            backend = kernels.serving(self.kernel_name, given[1], given[3], "neuron_sparse_ffn")
            outputs.append(backend.neuron_sparse_ffn(*given))
        return torch.cat(outputs)

    def costs(self, measured: dict[str, SiteSparsity]) -> dict[str, Cost]:
        """MACs and bytes of up and down for the k experts of one decoded token; the gate stays dense."""
        element, costs = self.down.element_size(), {}
        for site, active in self.covers.items():
            kept = (1 - measured[site].sparsity_of_sparse_tokens) * active
            costs[site] = Cost(active, kept, 0, active * element, kept * element)
        return costs


def swap_experts(model: nn.Module, block: Block, into=None, mid=None, **options) -> SparseExperts:
    """Put sparse experts in the place of a block's own; arguments as for SparseExperts."""
    sparse = SparseExperts(model.get_submodule(block.experts.path), block.experts, into, mid, **options)
    replace(model, block.experts.path, sparse)
    return sparse


def swap_gated_experts(model: nn.Module, block: Block, threshold, **options) -> GateSparseExperts:
    """Put experts whose neurons are chosen by the gate in the place of a block's own."""
    sparse = GateSparseExperts(model.get_submodule(block.experts.path), block.experts, threshold, **options)
    replace(model, block.experts.path, sparse)
    return sparse
