"""Gated FFN whose neurons are chosen by the gate: keep neuron i iff |act(x W_g)_i| >= t (CATS, arXiv 2404.08763).

The gate is computed in full; up and down are computed for kept neurons only, so a dropped neuron saves a row of up and a
column of down.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from sparsebench import kernels
from sparsebench.modules import storage
from sparsebench.modules.base import Cost, Counter, SiteSparsity, SparseModule
from sparsebench.modules.input_sparse import replace
from sparsebench.modules.tokens import left_dense, per_row
from sparsebench.sites import Block


class GateSparseFFN(SparseModule):
    """Takes over the maps of a gated FFN.

    Args:
        ffn: the FFN of transformers: gate_proj, up_proj, down_proj without biases, and act_fn. What it drops by itself
            (Gemma-3n's statistical top-k) stays dropped, and counts.
        layer: its index; the module counts neurons at the site `<layer>.<prefix>ffn`, which covers up and down.
        prefix: of the roles of its maps: `shared.` for the FFN beside experts.
        threshold: keep a neuron iff its gate's magnitude is at least this.
        prompt: which tokens of a multi-token call are sparse, one of PROMPT_POLICIES.
        kernel: backend for one-token calls.
    """

    unit = "neurons"
    lies_by_channels: tuple[str, ...] = ("down",)

    def __init__(self, ffn: nn.Module, layer: int, threshold: float, *, prefix="", prompt="all", kernel="masked_dense"):
        super().__init__()
        self.gate, self.up, self.activation, self.own_rule = ffn.gate_proj, ffn.up_proj, ffn.act_fn, own_rule(ffn)
        self.down = storage.channel_major(ffn.down_proj.weight)  # [d, f], f outermost in memory
        self.register_buffer("threshold", torch.tensor(float(threshold), device=self.down.device), persistent=False)
        self.site, self.prompt, self.kernel_name = f"{layer}.{prefix}ffn", prompt, kernel
        self.layer, self.prefix = layer, prefix
        kernels.chain(kernel)  # loaded now, not while a graph is compiled

    @property
    def covers(self) -> dict[str, int]:
        return {
            f"{self.layer}.{self.prefix}up": self.up.weight.numel(),
            f"{self.layer}.{self.prefix}down": self.down.numel(),
        }

    def new_counter(self) -> Counter:
        return Counter(self.down.shape[1], self.down.device)

    def keep(self, gates: torch.Tensor) -> torch.Tensor:
        """bool, the shape of gates act(x W_g) [..., f]."""
        return gates.abs() >= self.threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = self.activation(self.own_rule(self.gate(x)))
        keep, dense = self.keep(gates), left_dense(self.prompt, x)
        if self.counter is not None:
            self.counter.add(keep & (gates != 0), dense)  # a gate of exactly 0 is skipped whatever the threshold
        if dense is not None:
            keep = keep | dense.unsqueeze(-1)
        active = torch.where(keep, gates, 0)
        name = self.kernel_name if self.counter is None and per_row(x) == 1 else "masked_dense"
        backend = kernels.serving(name, active, self.down, "neuron_sparse_ffn")
        return backend.neuron_sparse_ffn(x, active, self.up.weight, self.down)

    def kernel(self, tokens: int) -> str:
        """One token goes to the kernel, more are masked."""
        return kernels.ran(self.kernel_name, self.down, "neuron_sparse_ffn") if tokens == 1 else "masked_dense"

    def kernel_of_rows(self, rows: int) -> str:
        return kernels.ran(self.kernel_name, self.down, "neuron_sparse_ffn", rows=rows)

    def costs(self, measured: dict[str, SiteSparsity]) -> dict[str, Cost]:
        """MACs and weight bytes of up and down for one decoded token; the gate stays dense."""
        element, costs = self.down.element_size(), {}
        for site, count in self.covers.items():
            kept = (1 - measured[site].sparsity_of_sparse_tokens) * count
            costs[site] = Cost(count, kept, 0, count * element, kept * element)
        return costs

    def extra_repr(self) -> str:
        return f"{self.site}, threshold={float(self.threshold):.4g}, prompt={self.prompt}"


def own_rule(ffn: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What an FFN does to x W_gate before its activation: Gemma-3n's statistical top-k in the layers that have it."""
    return ffn._gaussian_topk if getattr(ffn, "activation_sparsity", 0) > 0 else nn.Identity()


def gates_of(ffn: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """act(x W_gate) [..., f] of a gated FFN of transformers."""
    return ffn.act_fn(own_rule(ffn)(ffn.gate_proj(x)))


def prefixes(block: Block) -> list[str]:
    """The prefixes of a block's FFNs that every token passes: "" and `shared.`; one with experts may have none."""
    inside = [prefix for prefix in ("", "shared.") if f"{prefix}gate" in block.sites]
    return inside or ([] if block.experts is not None else [""])


def gated_ffn(model: nn.Module, block: Block, prefix: str = "") -> str:
    """The path of a block's gated FFN. Raises ValueError where a block has none of the form this module takes over."""
    gate = block.sites.get(f"{prefix}gate")
    path = gate.path.rpartition(".")[0] if gate is not None else ""
    ffn = model.get_submodule(path) if path else None
    names = ("gate_proj", "up_proj", "down_proj")
    if ffn is None or not all(hasattr(ffn, n) for n in (*names, "act_fn")):
        raise ValueError(
            f"method: a gated FFN with gate, up and down is needed, got a block with {', '.join(block.sites)}"
        )
    others = [n for n, _ in ffn.named_children() if n not in (*names, "act_fn")]
    if others:
        raise ValueError(f"method: the FFN at {path} has {', '.join(others)} beside gate, up, down and activation")
    if any(getattr(ffn, n).bias is not None for n in names[1:]):
        raise ValueError(f"method: up and down must have no bias, got one in {path}")
    return path


def swap_ffn(model: nn.Module, block: Block, threshold: float, prefix: str = "", **rule) -> None:
    """Replace a block's FFN, or the one beside its experts; `rule` as for GateSparseFFN."""
    path = gated_ffn(model, block, prefix)
    replace(model, path, GateSparseFFN(model.get_submodule(path), block.index, threshold, prefix=prefix, **rule))
