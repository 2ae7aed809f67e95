"""Q-Sparse: every linear map reads only the k largest-magnitude entries of its input (arXiv 2407.10969)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sparsebench import kernels
from sparsebench.kernels import masked_dense
from sparsebench.modules.activations import topk, topk_mask
from sparsebench.modules.input_sparse import InputSparseLinear, dense_prefix


def kept_count(share: float, size: int) -> int:
    """k of a group: round(share * size), at least 1 (not int(): 0.29 * 100 is 28.999...)."""
    return max(1, round(share * size))


def rescaled(sparse: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Xs ||X|| / ||Xs|| per token [choice]: the paper says "by its L2 norm" without a formula (unverified)."""
    norm = torch.linalg.vector_norm
    return sparse * (norm(dense, dim=-1, keepdim=True) / norm(sparse, dim=-1, keepdim=True).clamp_min(1e-12))


class TopKTraining(nn.Linear):
    """The map while it is trained: straight-through (or masked) gradient to its input, weight gradient from sparse input.

    `count` may be changed between steps (annealing).
    """

    def __init__(self, linear: nn.Linear, count: int, *, block=None, backward="ste", rescale=False):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.count, self.block, self.backward, self.rescale = count, block, backward, rescale

    def forward(self, x):
        mask = topk_mask(x.detach().abs(), self.count, self.block)
        sparse = topk(x, mask, self.backward)
        return F.linear(rescaled(sparse, x) if self.rescale else sparse, self.weight, self.bias)


class TopKLinear(InputSparseLinear):
    """The map in use: as InputSparseLinear, with the k largest |x_i| of each token (or block) instead of a threshold."""

    def __init__(
        self, linear, site: str, count: int, *, block=None, rescale=False, prompt="all", kernel="masked_dense"
    ):
        super().__init__(linear, site, 0.0, prompt=prompt, kernel=kernel)
        self.count, self.block, self.rescale = count, block, rescale

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        return topk_mask(x.abs(), self.count, self.block) | (self.threshold < 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = self.unflattened(x)
        if whole is not None:
            return self.forward(whole).flatten(0, 1)
        tokens = x.shape[-2] if x.dim() > 2 else 1
        if not self.rescale and (tokens > 1 or self.counter is not None):
            return super().forward(x)
        keep = self.keep(x)
        if self.counter is not None:
            self.counter.add(keep.unsqueeze(-2) if x.dim() <= 2 else keep, dense_prefix(self.prompt, tokens))
        if tokens > 1 and self.prompt != "all":
            keep[..., : dense_prefix(self.prompt, tokens), :] = True
        if self.rescale:
            x = rescaled(torch.where(keep, x, 0), x)
        backend = (
            kernels.serving(self.kernel_name, x, self.weight) if tokens == 1 and self.counter is None else masked_dense
        )
        return backend.input_sparse_linear(x, self.weight, self.bias, keep=keep)
