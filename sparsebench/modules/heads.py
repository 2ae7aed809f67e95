"""Head-sparse attention: of each token only some heads (or key-value groups) reach the output projection; the rest are 0.

The module stands in the place of the output projection, whose input is all heads side by side, so it works in every
family. A decode step whose selection is known before attention (static, trained) reads the cache of kept groups only:
an attention function of our own, registered with transformers, hands it to a kernel. Keys and values of all heads are
still computed and written. The first layers, and what a prompt policy names, keep all heads (arXiv 2505.14884).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsebench import kernels
from sparsebench.modules import storage
from sparsebench.modules.base import Cost, Counter, SiteSparsity, SparseModule
from sparsebench.modules.tokens import CALLS, follow, left_dense, per_row
from sparsebench.sites import Block, LinearMap

ROUTERS = ("oracle", "previous", "static", "trained")
IMPLEMENTATION = "sparsebench_heads"
SITE = "heads"


class HeadSparseOutput(SparseModule, LinearMap):
    """The output projection behind selected heads.

    Args:
        linear: the projection to replace (nn.Linear).
        layer, heads, units: units are the heads, or the key-value groups, of which `kept` stay per token.
        router: oracle (the largest of this token), previous (of the token before), static (`ranking`) or trained.
        by_output: score a head by its part of the projection's output, not by its own length.
        ranking: [units], larger is kept, for static; route: (weight [units, d], bias [units]) for trained.
        prompt: which tokens of a multi-token call are sparse (modules/tokens.py).
    """

    unit = "heads"
    lies_by_channels: tuple[str, ...] = ("weight",)

    def __init__(
        self, linear, layer: int, heads: int, units: int, kept: int, *, router: str, by_output=False, ranking=None,
        route=None, prompt="all", kernel="masked_dense",
    ):  # fmt: skip
        super().__init__()
        self.weight = storage.channel_major(linear.weight)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.data, requires_grad=False)
        device = self.weight.device
        self.register_buffer("threshold", torch.zeros((), device=device), persistent=False)
        self.register_buffer("ranking", ranking, persistent=False)
        for name, tensor in zip(("route_weight", "route_bias"), route or (None, None), strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.layer, self.site, self.heads, self.units, self.kept = layer, f"{layer}.{SITE}", heads, units, kept
        self.router, self.by_output, self.prompt, self.kernel_name = router, by_output, prompt, kernel
        self.attends = False  # whether attention around it calls `attend`
        self.hidden: torch.Tensor | None = None  # input of the attention around it, where a router reads it
        self.before: torch.Tensor | None = None  # scores [B, units] of the last token of the last prompt (previous)
        kernels.chain(kernel)

    @property
    def covers(self) -> dict[str, int]:
        """No weights: a dropped head saves its cache. It has a line of its own in records."""
        return {self.site: 0}

    def new_counter(self) -> Counter:
        return Counter(self.units, self.weight.device)

    @property
    def known_before(self) -> bool:
        """Whether the selection is known before attention runs, so that a kernel can skip."""
        return self.router in ("static", "trained")

    def kernel(self, tokens: int) -> str:
        return self.kernel_of_rows(1) if tokens == 1 else "masked_dense"

    def kernel_of_rows(self, rows: int) -> str:
        if not self.known_before or not self.attends:
            return "masked_dense"
        backend = kernels.providing(self.kernel_name, "selective_attention")
        size = (1, self.weight.shape[1] // self.heads)
        q, keys = (self.weight.new_empty(1, *shape) for shape in ((self.heads, size[1]), (self.units, *size)))
        return kernels.name_of(backend) if serves(backend, q, keys) else "masked_dense"

    def lengths(self, x: torch.Tensor) -> torch.Tensor:
        """Score [..., units] of the heads' outputs x [..., heads * size]."""
        return head_scores(x, self.heads, self.units, self.weight if self.by_output else None)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """What the selection goes by, [..., units]; infinite for a token without one before it."""
        if self.router == "static":
            return self.ranking.expand(*x.shape[:-1], self.units)
        if self.router == "trained":
            return F.linear(self.hidden, self.route_weight, self.route_bias).float().reshape(*x.shape[:-1], self.units)
        scores = self.lengths(x)
        if self.router == "oracle":
            return scores
        if x.shape[-2] == 1 and self.before is not None and self.before.shape[0] == x.shape[0]:
            return self.before.unsqueeze(-2)
        self.before = scores[..., -1, :].detach()
        return torch.cat([scores[..., :1, :], scores[..., :-1, :]], -2)  # the first token has only itself

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        """bool [..., units]: exactly `kept` of each token; all where the threshold is below 0."""
        scores = self.scores(x)
        chosen = scores.topk(self.kept, dim=-1, sorted=False).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True) | (self.threshold < 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keep, dense = self.keep(x), left_dense(self.prompt, x)
        if self.counter is not None:
            self.counter.add(keep, dense)
        if dense is not None:
            keep = keep | dense.unsqueeze(-1)
        channels = keep.repeat_interleave(x.shape[-1] // self.units, -1)
        x = torch.where(channels, x, 0)
        if self.counter is None and per_row(x) == 1 and self.known_before and self.attends:
            backend = kernels.serving(self.kernel_name, x, self.weight)
            return backend.input_sparse_linear(x, self.weight, self.bias, keep=channels)
        return F.linear(x, self.weight, self.bias)

    def costs(self, measured: dict[str, SiteSparsity]) -> dict[str, Cost]:
        """The projection's columns of kept heads; overhead: the router, or the norms of the heads. What the cache saves
        is counted outside the block maps (measure/macs.py)."""
        m, n = self.weight.shape
        share, element = 1 - measured[self.site].sparsity_of_sparse_tokens, self.weight.element_size()
        router = 0 if self.route_weight is None else self.route_weight.numel()
        extra = {"static": 0, "trained": router}.get(self.router, n * (m if self.by_output else 1))
        return {
            f"{self.layer}.o": Cost(
                m * n, share * m * n, extra, m * n * element, share * m * n * element + router * element
            )
        }

    def extra_repr(self) -> str:
        return f"{self.site}, {self.kept} of {self.units}, router={self.router}, prompt={self.prompt}"


def head_scores(x: torch.Tensor, heads: int, units: int, weight: torch.Tensor | None = None) -> torch.Tensor:
    """The largest ||a_h|| of each unit, [..., units] in fp32, of heads side by side x [..., heads * size].

    weight [m, heads * size]: ||W_h a_h|| instead, what a head adds to the projection's output.
    """
    parts = x.float().unflatten(-1, (heads, -1))
    if weight is None:
        norms = parts.norm(dim=-1)
    else:
        blocks = weight.float().unflatten(1, (heads, -1))  # [m, heads, size]
        norms = torch.stack([(parts[..., h, :] @ blocks[:, h].t()).norm(dim=-1) for h in range(heads)], -1)
    return norms.unflatten(-1, (units, -1)).amax(-1)


def attend(module, query, key, value, attention_mask, dropout: float = 0.0, scaling: float | None = None, **kwargs):
    """The attention function of a model with head-sparse layers: a kernel for one token where it serves, else torch's.

    query [B, H, T, D]; key and value [B, groups, P, D]; attention_mask bool [B, 1, T, P] or None. Returns
    ([B, T, H, D], None).
    """
    sparse = module._modules.get(getattr(module, "heads_at", ""))
    if sparse is not None and served(sparse, module, query, key):
        batch, shared = query.shape[0], query.shape[1] // key.shape[1]
        keep = sparse.keep(query.transpose(1, 2).flatten(2))[:, 0]  # of the router alone: it does not read this
        positions = torch.full((batch,), key.shape[2], dtype=torch.int32, device=key.device)
        if attention_mask is not None:
            positions = attention_mask[:, 0, -1].sum(-1, dtype=torch.int32).expand(batch)
        if sparse.units != key.shape[1]:
            keep = keep.unflatten(-1, (key.shape[1], shared)).any(-1)
        backend = kernels.providing(sparse.kernel_name, "selective_attention")
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        return backend.selective_attention(query[:, :, 0], key, value, keep, positions, factor)[:, None], None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def served(sparse: HeadSparseOutput, module: nn.Module, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether a call goes to the kernel: one token per sequence, no padding, no window, selection known."""
    if (
        query.shape[2] != 1
        or not sparse.known_before
        or not sparse.attends
        or sparse.counter is not None
        or CALLS[-1].mask is not None
    ):
        return False
    if getattr(module, "sliding_window", None) or sparse.kernel_name == "masked_dense":
        return False
    return serves(kernels.providing(sparse.kernel_name, "selective_attention"), query[:, :, 0], key)


def serves(backend, q: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether a backend's attention takes queries [B, H, D] and keys [B, groups, P, D]."""
    problem = getattr(backend, "unsupported_selective_attention", None)
    return problem is None or problem(q, keys) is None


def note_hidden(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Hook before attention: its router reads the same input as q, k and v."""
    module._modules[module.heads_at].hidden = args[0] if args else kwargs["hidden_states"]


def swap(model: nn.Module, block: Block, *arguments, **rule) -> HeadSparseOutput:
    """Put a HeadSparseOutput in the place of a block's output projection; `rule` as for it."""
    path, _, name = block.sites["o"].path.rpartition(".")
    attention = model.get_submodule(path)
    sparse = HeadSparseOutput(getattr(attention, name), block.index, *arguments, **rule)
    attention.heads_at = name
    setattr(attention, name, sparse)
    if sparse.router == "trained":
        attention.register_forward_pre_hook(note_hidden, with_kwargs=True)
    follow(model)
    if sparse.known_before and replaceable(model):
        sparse.attends = True
        ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, sdpa_mask)
        model.config._attn_implementation = IMPLEMENTATION
    return sparse


def replaceable(model: nn.Module) -> bool:
    """Whether the model's attention is torch's own, called by name: no soft caps, no sinks, no function of its own."""
    config = model.config
    plain = not getattr(config, "attn_logit_softcapping", None) and not hasattr(config, "attention_sink")
    named = getattr(type(model), "_supports_attention_backend", False) and getattr(type(model), "_supports_sdpa", False)
    return plain and named and config._attn_implementation in ("sdpa", IMPLEMENTATION)
