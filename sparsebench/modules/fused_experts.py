"""Experts as transformers keeps them, in tensors of three dimensions: how they lie, how they gate, which pairs are run.

A model with experts runs for each token x the k experts its router chose: y = sum_e r_e (W_d^e mid_e (+ b_d^e)), with
mid_e = act(W_g^e x) * W_u^e x. What is done for one token by one expert is called a pair; only pairs are computed, and
only pairs count. Everything here gives bit by bit what the model's own loop over experts gives.

The modules say how their tensors lie (sites.expert_sizes): gate and up are halves or every other row, and inputs or
outputs come first in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Tensors:
    """Weights of E experts as [E, m, n], views whichever way round they are stored; biases [E, m] or None."""

    gate_up: torch.Tensor  # [E, 2 I, D]
    down: torch.Tensor  # [E, D, I]
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    halves: bool  # gate in the first I rows and up in the others; False: in turns


def parts(z: torch.Tensor, halves: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up out of z [..., 2 I]."""
    return z.chunk(2, dim=-1) if halves else (z[..., ::2], z[..., 1::2])


def tensors_of(own: nn.Module) -> Tensors:
    """The tensors of a model's own module, not copied."""
    turn = (lambda w: w.transpose(1, 2)) if own.is_transposed else (lambda w: w)
    biases = (own.gate_up_proj_bias.data, own.down_proj_bias.data) if own.has_bias else (None, None)
    return Tensors(turn(own.gate_up_proj.data), turn(own.down_proj.data), *biases, own.is_concatenated)


def relaid(tensors: Tensors, *, inputs: bool) -> Tensors:
    """The same experts for kernels: gate and up as halves, every neuron of down contiguous, and of gate and up each input
    channel where `inputs`, else each neuron."""

    def halves(t: torch.Tensor | None) -> torch.Tensor | None:
        return t if t is None or tensors.halves else torch.cat([t[:, ::2], t[:, 1::2]], 1)

    gate_up = halves(tensors.gate_up)
    gate_up = gate_up.transpose(1, 2).contiguous().transpose(1, 2) if inputs else gate_up.contiguous()
    down = tensors.down.transpose(1, 2).contiguous().transpose(1, 2)
    return Tensors(gate_up, down, halves(tensors.gate_up_bias), tensors.down_bias, True)


class Gating(nn.Module):
    """mid = act(g) * u; of GPT-OSS g sigmoid(alpha g) (u + 1), with g <= limit and |u| <= limit.

    Raises ValueError where the model's own module does something else.
    """

    def __init__(self, own: nn.Module):
        super().__init__()
        limit, alpha = getattr(own, "limit", None), getattr(own, "alpha", None)
        self.clamped = limit is not None and alpha is not None
        self.limit, self.alpha = limit, alpha
        self.act_fn = None if self.clamped else getattr(own, "act_fn", None)
        self.check(own)

    def check(self, own: nn.Module) -> None:
        """Compare with what the model does, on random values."""
        device, tensors = own.gate_up_proj.device, tensors_of(own)
        generator = torch.Generator().manual_seed(0)
        z = (8 * torch.randn(4, tensors.gate_up.shape[1], generator=generator)).to(device, own.gate_up_proj.dtype)
        known = self.clamped or self.act_fn is not None
        gate, up = parts(z, tensors.halves)
        if not known or not torch.equal(self.combined(self.activated(gate), up), own._apply_gate(z)):
            raise ValueError(
                f"model: {type(own).__name__} gates in a way that is not known here, its experts must stay dense"
            )

    def activated(self, gate: torch.Tensor) -> torch.Tensor:
        """act(g), exactly 0 nowhere but where the function is."""
        if not self.clamped:
            return self.act_fn(gate)
        gate = gate.clamp(max=self.limit)
        return gate * torch.sigmoid(gate * self.alpha)

    def combined(self, active: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The middle of a pair, 0 where `active` is."""
        return (up.clamp(-self.limit, self.limit) + 1) * active if self.clamped else active * up


@dataclass
class Pairs:
    """The pairs of one call in the order in which the model adds them up: by expert, then by choice, then by token."""

    tokens: torch.Tensor  # int64 [P]
    experts: torch.Tensor  # int64 [P], never falling
    weights: torch.Tensor  # [P], of the router
    single: bool  # one token: nothing else can be a decode step at batch 1


def pairs_of(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, num_experts: int) -> Pairs:
    """hidden [N, D]; index int64 and weights [N, k] as the router gave them. An index of E or more runs nothing."""
    count = hidden.shape[0]
    experts, order = index.t().reshape(-1).sort(stable=True)
    pairs = Pairs(order % count, experts, weights.t().reshape(-1)[order], count == 1)
    if count > 1:
        run = experts < num_experts
        pairs.tokens, pairs.experts, pairs.weights = pairs.tokens[run], pairs.experts[run], pairs.weights[run]
    return pairs


def summed(y: torch.Tensor, pairs: Pairs, hidden: torch.Tensor) -> torch.Tensor:
    """[N, D] of the outputs y [P, D] of pairs, each times its weight, added in the dtype of `hidden`."""
    return torch.zeros_like(hidden).index_add_(0, pairs.tokens, (y * pairs.weights[:, None]).to(hidden.dtype))


def runs(experts: torch.Tensor) -> list[tuple[int, slice]]:
    """(expert, its pairs) of sorted experts [P]; experts without pairs are left out."""
    ids, counts = experts.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0).tolist()
    return [(e, slice(end - n, end)) for e, n, end in zip(ids.tolist(), counts.tolist(), ends, strict=True)]


def products(x: torch.Tensor, experts: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """W^e x + b^e of each pair: x [P, n], experts sorted [P], weight [E, m, n], bias [E, m]. Returns [P, m]."""
    parts = [F.linear(x[part], weight[e]) if bias is None else F.linear(x[part], weight[e]) + bias[e]
             for e, part in runs(experts)]  # fmt: skip
    return torch.cat(parts) if parts else x.new_zeros(0, weight.shape[1])


def gathered(x: torch.Tensor, experts: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same for a few pairs without asking the host which experts they are, so that a graph can hold it."""
    y = torch.bmm(weight[experts], x.unsqueeze(-1)).squeeze(-1)
    return y if bias is None else y + bias[experts]
