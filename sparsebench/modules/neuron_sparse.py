"""Neuron-sparse FFN: y = W_d (phi(W_g x) * W_u x), exact zeros of phi skip rows of W_u and columns of W_d.

Behind every method that switches FFN neurons off: ReLU and FATReLU models, top-k, thresholded gates. Plain FFNs
(y = W_2 phi(W_1 x)) skip columns of W_2. Trained and evaluated with masks; one-token calls go to a kernel that skips.
The maps keep their names inside the module, so that sites.py finds them as before.
"""

from __future__ import annotations

from inspect import signature

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsebench import kernels
from sparsebench.modules import storage
from sparsebench.modules.activations import Activation
from sparsebench.modules.base import Cost, Counter, SiteSparsity, SparseModule
from sparsebench.modules.input_sparse import replace
from sparsebench.modules.routed import wanted_rows
from sparsebench.modules.tokens import per_row
from sparsebench.sites import Block, shape

ROLES = (("gate", "up", "down"), ("fc1", "fc2"))


def ffn_path(block: Block) -> str:
    """Path of the module that holds a block's FFN. Raises ValueError where it is fused or not a module of its own."""
    for roles in ROLES:
        if set(roles) <= set(block.sites):
            parents = {block.sites[role].path.rpartition(".")[0] for role in roles}
            if len(parents) == 1 and parents != {block.path}:
                return parents.pop()
    raise ValueError(
        f"model: neuron-sparse FFNs need gate, up, down or fc1, fc2 in one module of the block, got {', '.join(block.sites)}"
    )


class NeuronSparseFFN(SparseModule):
    """The FFN of one block.

    Args:
        ffn: the module to replace; its linear maps are taken over, not copied.
        block: where it stands (sites.py).
        activation: phi with exact zeros.
        up_activation: `relu` for dReLU, x1 = phi(W_g x) relu(W_u x); None otherwise.
        predictor: x [..., d] -> bool [..., f], the only neurons computed (methods/prosparse/predictor.py); None = exact.
        kernel: backend for one-token calls; None while training (weights stay as they lie).
    """

    unit = "neurons"

    def __init__(self, ffn, block: Block, activation: Activation, *, up_activation=None, predictor=None, kernel=None):
        super().__init__()
        roles = next(roles for roles in ROLES if set(roles) <= set(block.sites))
        self.names = {role: block.sites[role].path.rpartition(".")[2] for role in roles}
        for name in self.names.values():
            self.add_module(name, getattr(ffn, name))
        self.gated = "gate" in self.names
        self.activation = activation.to(self.map(roles[0]).weight.device)
        self.up_activation, self.predictor = up_activation, predictor
        self.site, self.layer = f"{block.index}.ffn", block.index
        self.kernel_name = kernel or "masked_dense"
        if predictor is not None:
            predictor.kernel_name = self.kernel_name
        if kernel:
            self.lay_out()

    def map(self, role: str) -> nn.Module:
        return getattr(self, self.names[role])

    @property
    def last(self) -> nn.Module:
        """The map whose input is x1."""
        return self.map("down" if self.gated else "fc2")

    def lay_out(self) -> None:
        """Store each neuron of the last map contiguously, as the kernels read it."""
        last = self.last
        if not isinstance(last, Conv1D):
            last.weight, last.lies_by_channels = storage.channel_major(last.weight), ("weight",)

    @property
    def threshold(self) -> torch.Tensor:
        return self.activation.threshold

    @property
    def skipped_roles(self) -> tuple[str, ...]:
        """Maps of which an inactive neuron skips its row or column."""
        if not self.gated:
            return ("fc2",)
        return ("down",) if self.up_activation or self.map("up").bias is not None else ("up", "down")

    @property
    def covers(self) -> dict[str, int]:
        """Weights of each map that inactive neurons skip, by the name it has in records."""
        return {f"{self.layer}.{role}": self.map(role).weight.numel() for role in self.skipped_roles}

    def new_counter(self) -> Counter:
        last = self.last
        return Counter(shape(last)[1], last.weight.device)

    def gates(self, x: torch.Tensor) -> torch.Tensor:
        """phi(W_g x) [..., f] (of a plain FFN phi(W_1 x)), 0 where the predictor says inactive.

        A negative threshold skips nothing: the pre-activation itself comes back (for the break-even measurement).
        """
        first = self.map("gate" if self.gated else "fc1")
        if self.predictor is None:
            z = first(x)
            return torch.where(self.threshold < 0, z, self.activation(z))
        wanted = self.predictor(x)
        fast = self.to_kernel(x) and self.gated and first.bias is None
        z = wanted_rows(x, first.weight, wanted, self.kernel_name) if fast else first(x)
        return torch.where(self.threshold < 0, z, torch.where(wanted, self.activation(z), 0))

    def to_kernel(self, x: torch.Tensor) -> bool:
        """Whether a call goes to the kernel: one token, outside training and counting."""
        return (x.dim() < 3 or per_row(x) == 1) and self.counter is None and not torch.is_grad_enabled()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.gates(x)
        if self.to_kernel(x):
            return self.skipping(x, a)
        x1 = a
        if self.gated:
            u = self.map("up")(x)
            x1 = a * (u.relu() if self.up_activation == "relu" else u)
        if self.counter is not None:
            active = (a if "up" in self.skipped_roles else x1) != 0
            self.counter.add(active)
        return self.last(x1)

    @property
    def last_weight(self) -> torch.Tensor:
        """[d, f], each neuron contiguous."""
        last = self.last
        return last.weight.t() if isinstance(last, Conv1D) else last.weight

    @property
    def function(self) -> str:
        """The kernel function that serves one token."""
        return "neuron_sparse_ffn" if "up" in self.skipped_roles else "input_sparse_linear"

    def kernel(self, tokens: int) -> str:
        """One token goes to the kernel, more are masked."""
        return kernels.ran(self.kernel_name, self.last_weight, self.function) if tokens == 1 else "masked_dense"

    def kernel_of_rows(self, rows: int) -> str:
        return kernels.ran(self.kernel_name, self.last_weight, self.function, rows=rows)

    def skipping(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """The rest of a one-token call, by the kernel."""
        weight, last = self.last_weight, self.last
        backend = kernels.serving(self.kernel_name, a, weight, self.function)
        if "up" in self.skipped_roles:
            y = backend.neuron_sparse_ffn(x, a, self.map("up").weight, weight)
            return y if last.bias is None else y + last.bias
        if self.gated:
            u = self.map("up")(x)
            a = a * (u.relu() if self.up_activation == "relu" else u)
        return backend.input_sparse_linear(a, weight, last.bias, threshold=self.zero)

    @property
    def zero(self) -> torch.Tensor:
        """The threshold on |x1|: 0, or below it where nothing shall be skipped."""
        return self.threshold.clamp(max=0)

    def costs(self, measured: dict[str, SiteSparsity]) -> dict[str, Cost]:
        """MACs and weight bytes of one decoded token, dense and as measured (a predictor states those of its gate map)."""
        costs = {}
        for role, path in self.names.items():
            m, n = shape(getattr(self, path))
            element = getattr(self, path).weight.element_size()
            site = f"{self.layer}.{role}"
            share = 1 - measured[site].sparsity_of_sparse_tokens if role in self.skipped_roles else 1.0
            costs[site] = Cost(m * n, share * m * n, 0, m * n * element, share * m * n * element)
        return costs

    def extra_repr(self) -> str:
        return f"{self.site}, up_activation={self.up_activation}, kernel={self.kernel_name}"


def swap(module: nn.Module, block: Block, activation: Activation, **arguments) -> NeuronSparseFFN:
    """Put a neuron-sparse FFN in the place of the block's own and return it. Raises ValueError as `ffn_path`."""
    path = ffn_path(block)
    takes = [p for p in signature(type(module.get_submodule(path)).forward).parameters if p != "self"]
    if len(takes) > 1:
        raise ValueError(
            f"model: the FFN at {path} takes {' and '.join(takes)}, neuron-sparse FFNs take their input alone"
        )
    sparse = NeuronSparseFFN(module.get_submodule(path), block, activation, **arguments)
    sparse.train(module.training)
    replace(module, path, sparse)
    return sparse


def last_path(block: Block) -> str:
    """Path of the map whose input is x1 [..., f]: down of a gated FFN, fc2 of a plain one.

    Raises ValueError where a block has no FFN that every token passes.
    """
    if not {"down", "fc2"} & set(block.sites):
        raise ValueError(f"model: {block.path} has no FFN that every token passes, got {', '.join(block.sites)}")
    return block.sites["down" if "down" in block.sites else "fc2"].path


def last_map(module: nn.Module, block: Block) -> nn.Module:
    return module.get_submodule(last_path(block))


def neuron_norms(module: nn.Module, block: Block) -> torch.Tensor:
    """||W_d[:, i]|| of every neuron, fp32 [f]."""
    last = last_map(module, block)
    weight = last.weight.t() if isinstance(last, Conv1D) else last.weight
    return torch.linalg.vector_norm(weight.detach().float(), dim=0)


def product(last: nn.Module, x1: torch.Tensor) -> torch.Tensor:
    """W_d x1 without bias."""
    weight = last.weight.t() if isinstance(last, Conv1D) else last.weight
    return F.linear(x1, weight)
