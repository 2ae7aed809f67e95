"""Multiply-accumulates and bytes of one decoded token, from shapes and measured counts. FLOPs = 2 x MACs, never stored.

Counted: every linear map of the blocks, the head, attention scores and values at the stated context. Not counted:
norms, activations, rotary embedding, softmax, the embedding look-up (no products). `overhead` is work the method adds
(low-rank remainder, predictor, router, rotation, scaling and selection at one MAC a channel); it is part of `sparse`.
Where weights are pruned too, `sparse` counts products of a kept input and a nonzero weight; `executed` is what ran.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import nn

from sparsebench.models.sites import find_blocks, shape
from sparsebench.sparsity import SiteSparsity


@dataclass
class Cost:
    """Per decoded token at batch 1. macs and bytes of weights, for one site."""

    dense_macs: float
    sparse_macs: float
    overhead_macs: float
    dense_bytes: float
    sparse_bytes: float
    executed_macs: float | None = None  # by a kernel that skips inputs only; None = sparse_macs


def dense_sites(module: nn.Module) -> dict[str, Cost]:
    """Costs of every block map of a dense model by site name; sparse equals dense until a method says otherwise."""
    found = {}
    for block in find_blocks(module):
        for site in block.sites.values():
            linear = module.get_submodule(site.path)
            m, n = shape(linear)
            size = m * n * linear.weight.element_size()
            found[site.name] = Cost(m * n, m * n, 0, size, size)
    return found


def attention_macs(config, context: int) -> int:
    """Scores and weighted values over all layers for one new token that sees `context` tokens."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * heads * head_dim * context


def kv_bytes(config, context: int, element_size: int) -> int:
    """Keys and values read for one new token."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * groups * head_dim * context * element_size


def account(
    dense: dict[str, Cost], sparse: nn.Module, measured: dict[str, SiteSparsity], context: int, skips: bool
) -> tuple[dict, dict]:
    """The record's macs and bytes sections.

    `dense` comes from `dense_sites` before the method was applied; `measured` from the evaluation of `sparse`. Decode
    skips what the sparse tokens dropped. With `skips` false (simulated by masks) the executed MACs are the dense ones.
    """
    sites = dict(dense)
    for module in sparse.modules():
        if hasattr(module, "costs"):
            sites |= module.costs(measured, module.site)
    head = sparse.get_output_embeddings().weight
    attention = attention_macs(sparse.config, context)
    cache = kv_bytes(sparse.config, context, head.element_size())
    dense_macs = sum(c.dense_macs for c in dense.values())
    sparse_macs = sum(c.sparse_macs + c.overhead_macs for c in sites.values())
    rest, rest_bytes = head.numel() + attention, head.numel() * head.element_size() + cache
    overhead = sum(c.overhead_macs for c in sites.values())
    skipping = sum(c.sparse_macs if c.executed_macs is None else c.executed_macs for c in sites.values()) + overhead
    macs = {
        "dense": dense_macs + rest,
        "sparse": sparse_macs + rest,
        "executed": (skipping if skips else dense_macs + overhead) + rest,
        "overhead": overhead,
        "unit": f"multiply-accumulates per decoded token, batch 1, context {context}; FLOPs = 2 x MACs",
        "parts": {
            "blocks_dense": dense_macs,
            "blocks_sparse": sparse_macs,
            "head": head.numel(),
            "attention": attention,
        },
        "per_site": {name: asdict(cost) for name, cost in sites.items()},
    }
    traffic = {
        "dense": sum(c.dense_bytes for c in dense.values()) + rest_bytes,
        "sparse": sum(c.sparse_bytes for c in sites.values()) + rest_bytes,
        "unit": f"bytes of weights and KV cache read per decoded token, batch 1, context {context}",
        "parts": {"head": head.numel() * head.element_size(), "kv_cache": cache},
    }
    return macs, traffic


def unit_per(sample: str) -> dict[str, str]:
    """What the figures of an `image` or a `text` are, for the record."""
    unit = f"multiply-accumulates per {sample}, mean over the test {sample}s; FLOPs = 2 x MACs"
    return {"per": sample, "unit": unit}


def per_sample(
    sample: str, dense: float, attention: float, tokens: float, sparse: nn.Module, measured: dict[str, SiteSparsity],
    skips: bool,
) -> dict:  # fmt: skip
    """The record's macs section of an encoder whose sparse modules have `costs` per token.

    sample: `image` or `text`. dense: products of one, `attention` (scores and weighted values) among them; tokens: of
    one, as routed. What no such module replaced costs what it did; routers count as overhead, per token.
    """
    sites: dict[str, Cost] = {}
    for module in sparse.modules():
        if hasattr(module, "costs"):
            sites |= module.costs(measured, module.site)
    saved = tokens * sum(c.dense_macs - c.sparse_macs for c in sites.values())
    overhead = tokens * sum(c.overhead_macs for c in sites.values())
    return {
        "dense": dense,
        "sparse": dense - saved + overhead,
        "executed": dense - (saved if skips else 0) + overhead,
        "overhead": overhead,
        "parts": {"attention": attention, "tokens": tokens},
        "per_site": {name: asdict(cost) for name, cost in sites.items()},
    } | unit_per(sample)


def matrix_bytes(dense: dict[str, Cost], sparse: nn.Module, included: str) -> dict:
    """The record's bytes section of such an encoder; included: what lies outside the block maps, in words."""
    matrices = [p for p in sparse.parameters() if p.dim() > 1]
    return {
        "dense": sum(c.dense_bytes for c in dense.values()),
        "sparse": sum(w.numel() * w.element_size() for w in matrices),
        "unit": f"bytes of weights: of the dense block maps; of all matrices of the sparse model, {included} included",
    }
