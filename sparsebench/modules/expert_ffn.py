"""Expert FFN: the neurons of an FFN in E experts of m, of which each token runs the ones its router selects.

Behind MoEfication, D2DMoE and LTE. The neurons of an expert stand next to each other, so A_e = first[e m : (e + 1) m];
y = b2 + sum over selected e of act(A_e x + a_e) B_e, with all experts the dense FFN. A projection of attention that was
distilled into a two-layer MLP is the same module at another site.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sparsebench import kernels
from sparsebench.kernels import masked_dense
from sparsebench.modules.activations import topk_mask
from sparsebench.modules.base import Cost, Counter, SiteSparsity, SparseModule

NAMES = {  # of transformers -> of the kernels
    "relu": "relu", "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_tanh": "gelu_tanh",
}  # fmt: skip


def select(scores: torch.Tensor, rule: str, threshold: torch.Tensor, k: int | None = None) -> torch.Tensor:
    """bool [..., E] from scores [..., E]; a threshold below 0 keeps all.

    topk      exactly k largest (MoEfication), the lowest index wins a tie
    max       R_e >= tau max R: tau = 0 all, tau = 1 the largest only (D2DMoE, scores >= 0). R_e = 0 says that the expert
              adds nothing, so with tau > 0 it isn't run even where all are 0 [choice]
    cumshare  the largest shares R_e / sum R until they reach tau, none of share 0, at least one (D2DMoE, first release)
    above     sigmoid(logit) > tau, strictly; a token may keep none (LTE, eq. 2)
    """
    if rule == "topk":
        keep = topk_mask(scores, k)
    elif rule == "cumshare":
        shares = scores / scores.sum(-1, keepdim=True).clamp(min=1e-30)
        shares, order = shares.sort(dim=-1, descending=True, stable=True)
        before = shares.cumsum(-1) - shares
        first = torch.arange(scores.shape[-1], device=scores.device) == 0
        keep = torch.zeros_like(scores, dtype=torch.bool)
        keep = keep.scatter(-1, order, (before < threshold) & (shares > 0) | first | (threshold >= 1))
    else:
        return masked_dense.RULES[rule](scores, threshold)
    return keep | (threshold < 0)


class Router(nn.Module):
    """Scores of experts, float32 [..., E], from the FFN's input x [..., d]: one linear map, or two without biases.

    Computed in the dtype of its weights, which are float32 while it learns.

    Args:
        first: V1 [w, d], or the only map [E, d].
        second: V2 [E, w] or None.
        inner: relu | tanh, between the maps.
        outer: abs (D2DMoE's last operation) | none (logits).
        normalise: divide x by its length first (MoEfication's release).
    """

    def __init__(self, first, second=None, *, inner="relu", outer="none", normalise=False):
        super().__init__()
        self.first = nn.Parameter(first.detach().float().clone(), requires_grad=False)
        self.second = None if second is None else nn.Parameter(second.detach().float().clone(), requires_grad=False)
        self.inner, self.outer, self.normalise = inner, outer, normalise

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return masked_dense.expert_scores(
            x, self.first, self.second, inner=self.inner, outer=self.outer, normalise=self.normalise
        )

    def rules(self) -> tuple[str, ...]:
        """Rules that backends may apply in the same pass (`expert_keep`)."""
        if self.normalise or self.inner != "relu":
            return ()
        return tuple(masked_dense.RULES) if self.second is not None else ("above",) * (self.outer == "none")

    @property
    def num_products(self) -> int:
        """Multiply-accumulates per token."""
        return self.first.numel() + (0 if self.second is None else self.second.numel())

    def permute(self, order: torch.Tensor) -> None:
        """Experts in another order."""
        last = self.first if self.second is None else self.second
        last.data = last.data[order].contiguous()


class ExpertFFN(SparseModule):
    """One FFN (or distilled projection) as experts.

    Args:
        weights: first [f, d] (gate or fc1), last [f, n] (down or fc2, a neuron per row), and where there are such
            first_bias [f], up [f, d], up_bias [f], last_bias [n].
        activation: a name of transformers.
        num_experts: E, a divisor of f. Raises ValueError where it is none.
        site: name in records, e.g. `3.ffn`.
        dense_macs: products per token of the dense maps that it stands for, by site name.
        kernel: backend for calls outside training and counting; None while training.
    """

    def __init__(self, weights: dict, activation: str, num_experts: int, *, site: str, dense_macs: dict, kernel=None):
        super().__init__()
        for name in ("first", "first_bias", "up", "up_bias", "last", "last_bias"):
            tensor = weights.get(name)
            like = None if tensor is None else nn.Parameter(tensor.detach().contiguous().clone(), requires_grad=False)
            self.register_parameter(name, like)
        if activation not in NAMES:
            raise ValueError(f"model: experts need an activation among {', '.join(NAMES)}, got {activation}")
        if len(self.first) % num_experts:
            raise ValueError(f"{num_experts} equal experts can't be made of the {len(self.first)} neurons of {site}")
        self.activation, self.num_experts, self.site, self.dense_macs = NAMES[activation], num_experts, site, dense_macs
        self.register_buffer("threshold", torch.zeros((), device=self.first.device), persistent=False)
        self.router: Router | None = None
        self.rule, self.k, self.routing, self.mode = "max", None, "trained", "dense"
        self.dropout, self.kernel_name = 0.0, kernel or "masked_dense"
        self.watch = None  # called with (self, x, z, a, x1) in dense and soft calls
        self.soft_scores = None

    def new_counter(self) -> Counter:
        return Counter(self.num_experts, self.first.device)

    @property
    def size(self) -> int:
        """m, neurons per expert."""
        return len(self.first) // self.num_experts

    @property
    def expert_macs(self) -> int:
        """Products of one expert on one token."""
        maps = 2 if self.up is not None else 1
        return self.size * (maps * self.first.shape[1] + self.last.shape[1])

    @property
    def covers(self) -> dict[str, int]:
        """Weights per site name."""
        if len(self.dense_macs) == 1:
            return dict.fromkeys(self.dense_macs, self.expert_macs * self.num_experts)
        return dict(self.dense_macs)

    @property
    def maps(self) -> dict:
        return {k: getattr(self, k) for k in ("first_bias", "up", "up_bias", "last_bias")}

    def hidden(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(z, a, x1), each [..., f]."""
        return masked_dense.expert_hidden(
            x, self.first, self.activation, first_bias=self.first_bias, up=self.up, up_bias=self.up_bias
        )

    def last_product(self, x1: torch.Tensor) -> torch.Tensor:
        return F.linear(x1, self.last.t(), self.last_bias)

    def norms(self, x1: torch.Tensor) -> torch.Tensor:
        """||x1_e B_e|| [..., E] by h' (B B') h with one Gram matrix [m, m] per expert, in float32 at least (also where
        autocast would take less)."""
        experts = self.last.detach().to(torch.promote_types(self.last.dtype, torch.float32))
        experts = experts.unflatten(0, (self.num_experts, -1))
        with torch.autocast(experts.device.type, enabled=False):
            gram = experts @ experts.transpose(1, 2)
            h = x1.to(gram.dtype).unflatten(-1, (self.num_experts, -1))
            return ((torch.einsum("...ei,eij->...ej", h, gram) * h).sum(-1)).clamp(min=0).sqrt()

    def sums(self, x1: torch.Tensor) -> torch.Tensor:
        """Sum of |x1| over each expert's neurons [..., E]: the sum of ReLU activations where those are x1."""
        return x1.abs().float().unflatten(-1, (self.num_experts, -1)).sum(-1)

    def keep(self, x: torch.Tensor, x1: torch.Tensor | None = None) -> torch.Tensor:
        """bool [..., E]: the experts each token runs. routing=oracle ranks by the true label (sums for topk, else norms)."""
        if self.routing == "trained":
            if self.rule in self.router.rules() and not torch.is_grad_enabled():
                maps = (self.router.first, self.router.second)
                backend = kernels.serving(self.running, x, maps[0], "expert_keep", maps[1])
                return backend.expert_keep(x, maps[0], self.threshold, maps[1], outer=self.router.outer, rule=self.rule)
            scores = self.router(x)
        elif self.routing == "random":
            scores = random_scores(x, self.num_experts)
        else:
            x1 = self.hidden(x)[2] if x1 is None else x1
            scores = self.sums(x1) if self.rule == "topk" else self.norms(x1)
        return select(scores, self.rule, self.threshold, self.k)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mode != "hard" or self.counter is not None or torch.is_grad_enabled():
            return self.as_written(x)
        backend = kernels.serving(self.running, x, self.first, "expert_ffn", self.last)
        return backend.expert_ffn(x, self.keep(x), self.first, self.last, self.activation, **self.maps)

    @torch.compiler.disable  # it keeps what the pass showed: a compiled block stops for it
    def as_written(self, x: torch.Tensor) -> torch.Tensor:
        """A pass in training, counted or soft: all of the products, masked."""
        z, a, x1 = self.hidden(x)
        if self.watch is not None:
            self.watch(self, x, z, a, x1)
        if self.dropout and self.training:
            x1 = F.dropout(x1, self.dropout)
        if self.mode == "dense":
            if self.counter is not None:
                self.count(torch.ones(*x.shape[:-1], self.num_experts, dtype=torch.bool, device=x.device))
            return self.last_product(x1)
        if self.mode == "soft":
            gates = self.soft_scores = torch.sigmoid(self.router(x))
            if self.counter is not None:
                self.count(torch.ones_like(gates, dtype=torch.bool))
        else:
            gates = self.keep(x, x1)
            if self.counter is not None:
                self.count(gates)
        x1 = x1.unflatten(-1, (self.num_experts, -1)) * gates.to(x1.dtype).unsqueeze(-1)
        return self.last_product(x1.flatten(-2))

    def count(self, keep: torch.Tensor) -> None:
        self.counter.add(keep)

    @property
    def running(self) -> str:
        """The backend asked for; an oracle sees every expert's output first, so nothing can be skipped."""
        return self.kernel_name if self.routing == "trained" else "masked_dense"

    def kernel(self, tokens: int) -> str:
        """The backend that serves so many tokens; a module that runs all experts skips nothing."""
        if self.mode != "hard":
            return "masked_dense"
        return kernels.ran(self.running, self.first, "expert_ffn", self.last, rows=tokens)

    def reorder(self, order: torch.Tensor) -> None:
        """Neurons in another order [f]."""
        for name in ("first", "first_bias", "up", "up_bias", "last"):
            if getattr(self, name) is not None:
                getattr(self, name).data = getattr(self, name).data[order.to(self.first.device)].contiguous()

    def costs(self, measured: dict[str, SiteSparsity]) -> dict[str, Cost]:
        """MACs and weight bytes of one token, dense and as measured; the router stands at the first site.

        An oracle costs nothing here: it is a bound, not a way to run.
        """
        costs, element = {}, self.first.element_size()
        router = self.router.num_products if self.mode == "hard" and self.routing == "trained" else 0
        width = self.router.first.element_size() if router else 0
        for site, mine in self.covers.items():
            share, dense = 1 - measured[site].sparsity_of_sparse_tokens, self.dense_macs[site]
            traffic = share * mine * element + router * width
            costs[site] = Cost(dense, share * mine, router, dense * element, traffic)
            router = 0
        return costs

    def extra_repr(self) -> str:
        return f"{self.site}, {self.num_experts} experts of {self.size}, {self.mode}, {self.rule}, {self.routing}"


def random_scores(x: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Scores in [0, 1) that depend on nothing but the token's own values, so that a run can be repeated."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(x.shape[-1], num_experts, generator=generator).to(x.device) * 1e4
    return (F.normalize(x.float(), dim=-1) @ directions).remainder(1.0)
