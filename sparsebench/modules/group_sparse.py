"""N:M input-sparse linear: of every M consecutive inputs of one token the N of largest score are read (arXiv 2509.22166).

A group lies along the reduction axis, as sparse tensor cores need it, and is of one token: no token's mask depends on
another's. Exactly N stay in each group, ties and groups of zeros included (the lowest index wins), so kept zeros count
as kept; the counter says beside it how many of what is kept are not 0.

Corrections around the mask, in the spirit of the paper's (its own formulas could not be read: [choice]):
    shift       y = W mask(x - eta) + W eta: eta the token's mean or a calibrated vector; only the masked part is sparse
    variance    y = W (gamma mask(x)): gamma = sqrt(sum x^2 / sum of kept x^2), of the token or a calibrated constant
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from sparsebench import kernels
from sparsebench.modules import storage
from sparsebench.modules.activations import topk_mask
from sparsebench.modules.base import MANY, Cost, Counter, PromptCost, SiteSparsity
from sparsebench.modules.input_sparse import InputSparseLinear
from sparsebench.modules.tokens import left_dense, per_row

PHASES = ("prefill", "all")
CORRECTIONS = ("none", "shift", "variance")
SMALL_GROUP = 8  # up to here ranks are counted pair by pair: a GPU selects from millions of tiny rows slowly
SEMI24 = "semi_structured_linear"  # the kernel function for 2 of 4


def group_mask(score: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """bool, the shape of score [..., width]: the n largest of each m consecutive entries; the lowest index wins a tie.

    The same as activations.topk_mask by groups. Raises ValueError where m does not divide the width.
    """
    if m > SMALL_GROUP or score.shape[-1] % m:
        return topk_mask(score, n, m)
    groups = score.unflatten(-1, (-1, m))
    own, other = groups.unsqueeze(-1), groups.unsqueeze(-2)
    earlier = torch.ones(m, m, dtype=torch.bool, device=score.device).tril(-1)  # [own, other]: other stands before own
    ahead = ((other > own) | ((other == own) & earlier)).sum(-1)
    return (ahead < n).flatten(-2)


@dataclass
class Selection:
    """Which inputs of a token are read, and what becomes of them.

    scale c [inputs] of the score |x| c, None = 1; center: eta [inputs] of shift, None = the token's mean; gain: gamma of
    variance, None = the token's own.
    """

    n: int
    m: int
    scale: torch.Tensor | None = None
    correction: str = "none"
    center: torch.Tensor | None = None
    gain: float | None = None

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        """bool, the shape of x [..., inputs] (shifted already): exactly n of each group of m."""
        return group_mask(x.abs() if self.scale is None else x.abs() * self.scale, self.n, self.m)

    def eta(self, x: torch.Tensor, dense: torch.Tensor | None = None) -> torch.Tensor | None:
        """What is taken off x before the selection, [..., 1] or [..., inputs]; 0 for tokens left dense; None = nothing."""
        if self.correction != "shift":
            return None
        eta = x.float().mean(-1, keepdim=True).to(x.dtype) if self.center is None else self.center.to(x.dtype)
        return eta if dense is None else torch.where(dense.unsqueeze(-1), 0, eta)

    def gamma(self, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor | float:
        """The factor on what is kept [..., 1]; 1 where nothing is."""
        if self.gain is not None:
            return self.gain
        whole, part = (t.float().square().sum(-1, keepdim=True) for t in (x, kept))
        return torch.where(part > 0, (whole / part.clamp_min(torch.finfo(part.dtype).tiny)).sqrt(), 1.0).to(x.dtype)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """What takes the place of x: gamma mask(x - eta) + eta."""
        eta = self.eta(x)
        moved = x if eta is None else x - eta
        values = torch.where(self.keep(moved), moved, 0)
        if self.correction == "variance":
            values = values * self.gamma(x, values)
        return values if eta is None else values + eta


class GroupCounter(Counter):
    """As Counter, and how many of the kept entries were not 0."""

    def __init__(self, channels: int, device: torch.device):
        super().__init__(channels, device)
        self.nonzeros = 0

    def merge(self, other: Counter) -> None:
        super().merge(other)
        self.nonzeros += other.nonzeros

    def add_values(self, keep: torch.Tensor, values: torch.Tensor, dense: torch.Tensor | None) -> None:
        """Count one call: `add`, and the values [..., n] that are kept and not 0 on tokens made sparse."""
        self.add(keep, dense)
        live = (keep & (values != 0)).sum(-1).flatten()
        if dense is not None:
            live = live * ~dense.flatten()
        if self.token_mask is not None:
            live = live * self.token_mask.flatten().to(live.device)
        self.nonzeros += int(live.sum())


class GroupSparseLinear(InputSparseLinear):
    """A linear map that reads n of every m inputs of a token.

    Args:
        linear, site, prompt, kernel: as InputSparseLinear.
        selection: n, m (which must divide the map's inputs), score, correction.
        phase: prefill = calls of several tokens are sparse and one-token calls dense, the weight stays as it lies, so
            that decode is the dense model's bit for bit; all = both are sparse.
    """

    def __init__(self, linear, site, selection: Selection, *, phase="prefill", prompt="all", kernel="masked_dense"):
        super().__init__(linear, site, 0.0, scale=selection.scale, prompt=prompt, kernel=kernel)
        width = self.weight.shape[1]
        if width % selection.m:
            raise ValueError(f"method.m must divide the {width} inputs of {site}, got {selection.m}")
        if phase == "prefill" and not isinstance(linear, Conv1D):
            self.lies_by_channels = ()
            storage.turn(self.weight, channels=False)
        self.n, self.m, self.phase = selection.n, selection.m, phase
        self.correction, self.gain = selection.correction, selection.gain
        self.read_at = (-1, False)  # version of the threshold when it was last read, and whether it kept everything
        center = None if selection.center is None else selection.center.to(self.weight)
        self.register_buffer("center", center, persistent=False)
        self.register_buffer("image", self.image_of_center(), persistent=False)

    def image_of_center(self) -> torch.Tensor | None:
        """What the part that was shifted away adds to y [outputs]: W eta, or W 1 for the mean of a token."""
        if self.correction != "shift":
            return None
        wide = self.weight.detach().float()
        eta = torch.ones_like(wide[0]) if self.center is None else self.center.float()
        return (wide @ eta).to(self.weight.dtype)

    @property
    def selection(self) -> Selection:
        return Selection(self.n, self.m, self.scale, self.correction, self.center, self.gain)

    def new_counter(self) -> GroupCounter:
        return GroupCounter(self.weight.shape[1], self.weight.device)

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        """bool, the shape of x [..., inputs]: exactly n of each group of m (everything where the threshold is negative)."""
        return self.selection.keep(x) | (self.threshold < 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = per_row(x) == 1
        if one and self.phase == "prefill":
            if self.counter is not None:
                dense = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
                self.counter.add_values(torch.ones_like(x, dtype=torch.bool), x, dense)
            return F.linear(x, self.weight, self.bias)
        dense = left_dense(self.prompt, x)
        eta = self.selection.eta(x, dense)
        moved = x if eta is None else x - eta
        keep = self.keep(moved)
        if self.counter is not None:
            self.counter.add_values(keep, moved, dense)
        if dense is not None:
            keep = keep | dense.unsqueeze(-1)
        values = torch.where(keep, moved, 0)
        if self.correction == "variance":
            values = values * self.gamma(x, values, dense)
        y = self.product(values, keep, one)
        return y if eta is None else y + self.image_of(eta, dense)

    def image_of(self, eta: torch.Tensor, dense: torch.Tensor | None) -> torch.Tensor:
        """W eta, [..., outputs]; 0 for tokens left dense."""
        if self.center is None:
            return eta * self.image
        return self.image if dense is None else torch.where(dense.unsqueeze(-1), 0, self.image)

    def gamma(self, x: torch.Tensor, values: torch.Tensor, dense: torch.Tensor | None) -> torch.Tensor:
        """The selection's factor; a calibrated one is 1 where nothing was dropped."""
        gamma = self.selection.gamma(x, values)
        if self.gain is None:
            return gamma
        gamma = torch.where(self.threshold < 0, 1.0, gamma).to(x.dtype)
        return gamma if dense is None else torch.where(dense.unsqueeze(-1), 1.0, gamma).to(x.dtype)

    def product(self, values: torch.Tensor, keep: torch.Tensor, one: bool) -> torch.Tensor:
        """W values + b, by the kernel that serves the call."""
        if self.counter is None and one:
            backend = kernels.serving(self.kernel_name, values, self.weight)
            return backend.input_sparse_linear(values, self.weight, self.bias, keep=keep)
        if self.counter is None and self.two_of_four and not self.prompt_is_mixed and not self.keeps_everything():
            rows = values.flatten(0, -2)
            backend = kernels.serving(self.kernel_name, rows, self.weight, SEMI24)
            y = backend.semi_structured_linear(rows, self.weight, self.bias, trusted=True)
            return y.unflatten(0, values.shape[:-1])
        return F.linear(values, self.weight, self.bias)

    @property
    def two_of_four(self) -> bool:
        return (self.n, self.m) == (2, 4)

    @property
    def prompt_is_mixed(self) -> bool:
        """Whether a prompt holds tokens left dense, which are no 2:4."""
        return self.prompt != "all"

    def keeps_everything(self) -> bool:
        """Whether the threshold is negative; it is read from its device only after it was written."""
        version = self.threshold._version
        if self.read_at[0] != version:
            self.read_at = (version, bool(self.threshold < 0))
        return self.read_at[1]

    def kernel(self, tokens: int) -> str:
        """One token: masked_dense where it stays dense, else the kernel that skips; more: sparse tensor cores for 2:4."""
        if tokens == 1:
            return "masked_dense" if self.phase == "prefill" else super().kernel(1)
        if not self.two_of_four or self.prompt_is_mixed:
            return "masked_dense"
        return kernels.ran(self.kernel_name, self.weight, SEMI24, rows=tokens)

    def overhead(self) -> int:
        """MACs of one sparse token beside the product: selection and scale one a channel; the mean, x - eta and W eta;
        both sums of squares, the root's quotient left out, and the multiplication."""
        m, n = self.weight.shape
        extra = n + n * (self.scale is not None)
        if self.correction == "shift":
            extra += n + (n + m if self.center is None else 0)  # W eta of a vector is added like a bias
        if self.correction == "variance":
            kept = n * self.n // self.m
            extra += kept + (n + kept if self.gain is None else 0)
        return extra

    def costs(self, measured: dict[str, SiteSparsity]) -> dict[str, Cost]:
        """MACs and weight bytes of one decoded token, and the MACs of one token of a prompt."""
        m, n = self.weight.shape
        bytes_ = m * n * self.weight.element_size()
        seen = measured[self.site]
        share = 1 - seen.sparsity_of_sparse_tokens if seen.sparse_tokens else self.n / self.m  # no token was sparse yet
        skips = kernels.load(self.kernel(MANY)).SKIPS
        prompt = PromptCost(share * m * n, self.overhead(), share * m * n if skips else m * n)
        if self.phase == "prefill":
            return {self.site: Cost(m * n, m * n, 0, bytes_, bytes_, prompt=prompt)}
        cost = Cost(m * n, share * m * n, self.overhead(), bytes_, share * bytes_, share * m * n, prompt=prompt)
        return {self.site: cost}

    def extra_repr(self) -> str:
        m, n = self.weight.shape
        rule = f"{self.n}:{self.m}, phase={self.phase}, correction={self.correction}"
        return f"{self.site}, {n}->{m}, {rule}, prompt={self.prompt}"
