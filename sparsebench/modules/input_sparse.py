"""Input-sparse linear: y = W (x where |x| c > t) + b, the module behind every method that drops input channels.

The weight is stored once, transposed in memory (one input channel is contiguous) so that decode can skip the dropped
channels; it keeps the shape [m, n] and dense products over many tokens read it just as fast that way round. It is the
dense map's own parameter, turned (storage.py): a dense model beside the sparse one takes no memory of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsebench import kernels
from sparsebench.kernels import masked_dense
from sparsebench.modules import storage
from sparsebench.modules.base import Cost, Counter, SiteSparsity, SparseModule
from sparsebench.modules.masking import masked
from sparsebench.modules.tokens import follow, left_dense, per_row
from sparsebench.sites import LinearMap

PROMPT_POLICIES = ("none", "half", "last10", "p99", "all")  # what they mean: modules/tokens.py


class InputSparseLinear(SparseModule, LinearMap):
    """A linear map that drops input channels per token.

    Args:
        linear: the map to replace (nn.Linear or transformers' Conv1D); its weight is taken over, not copied.
        site: name in records, e.g. `3.gate`.
        threshold: keep x_i iff |x_i| c_i > threshold (strictly).
        scale: c [n], e.g. column norms; None = 1.
        prompt: which tokens of a multi-token call are sparse, one of PROMPT_POLICIES.
        top_k: keep the top_k largest |x_i| c_i of each token instead (exactly so many, the first of equal ones; zeros
            among them are dropped, as they are by any threshold); a negative threshold still keeps all.
        low_rank: (A [n, r], B [r, m]) applied to what was dropped, or None. Filled up with zeros to a multiple of 8
            ranks, so that kernels read whole rows of 16 bytes; `rank` is r.
        kernel: backend for one-token calls; a call it can't serve goes to the next in rank (`kernels.serving`).
    """

    lies_by_channels: tuple[str, ...] = ("weight",)

    def __init__(
        self, linear, site, threshold, *, scale=None, top_k=None, prompt="all", low_rank=None, kernel="masked_dense"
    ):
        super().__init__()
        self.take(linear)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.data, requires_grad=False)
        self.register_buffer("threshold", torch.tensor(float(threshold), device=self.device), persistent=False)
        scale = None if scale is None else scale.to(self.device, torch.float32).contiguous()
        self.register_buffer("scale", scale, persistent=False)
        for name in ("low_rank_a", "low_rank_b"):
            self.register_buffer(name, None, persistent=False)
        self.low_rank = low_rank
        self.site, self.top_k, self.prompt, self.kernel_name = site, top_k, prompt, kernel
        kernels.chain(kernel)  # loaded now, not while a graph is compiled

    def take(self, linear) -> None:
        """Take over the weight of the map that is replaced, stored as [m, n] with n outermost in memory."""
        if isinstance(linear, Conv1D):  # it lies so already, under the transposed shape
            self.weight = nn.Parameter(linear.weight.data.contiguous().t(), requires_grad=False)
        else:
            self.weight = storage.channel_major(linear.weight)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return tuple(self.weight.shape)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def covers(self) -> dict[str, int]:
        return {self.site: self.shape[0] * self.shape[1]}

    @property
    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None if self.low_rank_a is None else (self.low_rank_a, self.low_rank_b)

    @low_rank.setter
    def low_rank(self, factors: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        a, b = factors or (None, None)
        self.rank = 0 if a is None else a.shape[1]
        self.low_rank_a = None if a is None else F.pad(a.to(self.device), (0, -self.rank % 8)).contiguous()
        self.low_rank_b = None if b is None else F.pad(b.to(self.device), (0, 0, 0, -self.rank % 8)).contiguous()

    def new_counter(self) -> Counter:
        return Counter(self.shape[1], self.device)

    def kernel(self, tokens: int) -> str:
        """One token goes to the kernel, more are masked."""
        return kernels.ran(self.kernel_name, self.weight) if tokens == 1 else "masked_dense"

    def kernel_of_rows(self, rows: int) -> str:
        return kernels.ran(self.kernel_name, self.weight, rows=rows)

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        """bool, the shape of x [..., n]."""
        if self.top_k is None:
            return masked_dense.kept(x, self.threshold, self.scale)
        return (masked_dense.largest(x, self.top_k, self.scale) & (x != 0)) | (self.threshold < 0)

    def rule(self, x: torch.Tensor, backend) -> dict:
        """What a kernel is told of the channels to keep: its rule where the backend knows it, else the mask of x [..., n]."""
        rule = {"threshold": self.threshold, "scale": self.scale}
        if self.top_k is None:
            return rule
        return rule | {"top_k": self.top_k} if getattr(backend, "SELECTS", False) else {"keep": self.keep(x)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.counter is None and per_row(x) == 1:
            backend = kernels.serving(self.kernel_name, x, self.weight)
            return backend.input_sparse_linear(
                x, self.weight, self.bias, **self.rule(x, backend), low_rank=self.low_rank
            )
        if self.counter is None and self.top_k is None and self.low_rank is None and type(self) is InputSparseLinear:
            return F.linear(masked(x, self), self.weight, self.bias)
        keep, dense = self.keep(x), left_dense(self.prompt, x)
        if self.counter is not None:
            self.counter.add(keep, dense)
        if dense is not None:
            keep = keep | dense.unsqueeze(-1)
        return masked_dense.input_sparse_linear(x, self.weight, self.bias, keep=keep, low_rank=self.low_rank)

    def costs(self, measured: dict[str, SiteSparsity]) -> dict[str, Cost]:
        """MACs and weight bytes of one decoded token, dense and as measured.

        Overhead: r (m + n) of the low-rank part (an upper bound: kept inputs need not pass it), n for a scale and n for
        a selection.
        """
        m, n = self.shape
        site = measured[self.site]
        kept = (1 - site.sparsity_of_sparse_tokens) * m * n
        factors, element = self.rank * (m + n), self.weight.element_size()
        extra = factors + n * (self.scale is not None) + n * (self.top_k is not None)
        both = kept if site.kept_nonzeros is None else site.kept_nonzeros
        return {self.site: Cost(m * n, both, extra, m * n * element, (kept + factors) * element, kept)}

    def extra_repr(self) -> str:
        m, n = self.shape
        rule = f"threshold={float(self.threshold):.4g}" if self.top_k is None else f"top_k={self.top_k}"
        return f"{self.site}, {n}->{m}, {rule}, prompt={self.prompt}"


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` in the place that `path` names; with a prompt policy it will need the model's real lengths."""
    parent, _, name = path.rpartition(".")
    if getattr(module, "prompt", "all") != "all":
        follow(model)
    setattr(model.get_submodule(parent), name, module)


def swap(model: nn.Module, site, threshold: float, **rule) -> InputSparseLinear:
    """Replace the linear map at a site (sites.py) by an input-sparse one; `rule` as for InputSparseLinear."""
    sparse = sparse_of(model.get_submodule(site.path), site.name, threshold, **rule)
    replace(model, site.path, sparse)
    return sparse


def sparse_of(linear: nn.Module, name: str, threshold: float, **rule) -> InputSparseLinear:
    """An input-sparse map with the weight of `linear`; quantised maps (quant_sparse.py) make one of their own."""
    make = getattr(linear, "sparse", None)
    return make(name, threshold, **rule) if make else InputSparseLinear(linear, name, threshold, **rule)
