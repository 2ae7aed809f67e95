"""Multiply-accumulates and bytes of one decoded token, from shapes and measured counts. FLOPs = 2 x MACs, never stored.

Counted: every linear map of the blocks, the head, attention scores and values at the stated context. Not counted:
norms, activations, rotary embedding, softmax, the embedding look-up (no products). `overhead` is work the method adds
(low-rank remainder, predictor, router, rotation, scaling and selection at one MAC a channel); it is part of `sparse`.
Where weights are pruned too, `sparse` counts products of a kept input and a nonzero weight. `executed` is what ran while
it was timed, and null where nothing was.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import nn

from sparsebench.modules.base import Cost, SiteSparsity, sparse_modules
from sparsebench.sites import find_blocks, shape, stored_bytes


def dense_sites(module: nn.Module) -> dict[str, Cost]:
    """Costs of every block map of a dense model by site name; sparse equals dense until a method says otherwise."""
    costs = {}
    for block in find_blocks(module):
        for site in block.sites.values():
            linear = module.get_submodule(site.path)
            m, n = shape(linear)
            size = stored_bytes(linear)
            costs[site.name] = Cost(m * n, m * n, 0, size, size)
    return costs


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


def site_costs(module: nn.Module, measured: dict[str, SiteSparsity]) -> dict[str, Cost]:
    """Costs of one token by site name: what sparse modules say of themselves, or those of a dense model's block maps."""
    costs: dict[str, Cost] = {}
    for sparse in sparse_modules(module):
        costs |= sparse.costs(measured)
    return costs or dense_sites(module)


@dataclass(frozen=True)
class Outside:
    """What a decoded token costs outside the block maps, dense and sparse alike."""

    head_macs: int
    attention_macs: int  # scores and weighted values at the stated context
    head_bytes: int
    cache_bytes: int  # keys and values read

    @property
    def macs(self) -> int:
        return self.head_macs + self.attention_macs

    @property
    def bytes(self) -> int:
        return self.head_bytes + self.cache_bytes


def outside_blocks(module: nn.Module, context: int) -> Outside:
    """Head, attention and KV cache of one decoded token that sees `context` tokens."""
    head = module.get_output_embeddings().weight
    size = head.element_size()
    return Outside(
        head.numel(),
        attention_macs(module.config, context),
        head.numel() * size,
        kv_bytes(module.config, context, size),
    )


def executed(dense: dict[str, Cost], sparse: dict[str, Cost], outside: Outside, skips: bool) -> float:
    """MACs of one decoded token as a timed step ran it, from costs by site of the tokens that were timed.

    A step that only simulates skipping by masks (`skips` false) runs all products of the dense one.
    """
    overhead = sum(c.overhead_macs for c in sparse.values())
    blocks = sum(c.sparse_macs if c.executed_macs is None else c.executed_macs for c in sparse.values())
    return (blocks if skips else sum(c.dense_macs for c in dense.values())) + overhead + outside.macs


def read_bytes(sparse: dict[str, Cost], outside: Outside) -> float:
    """Bytes of weights and KV cache that one decoded token reads where the kernel skips."""
    return sum(c.sparse_bytes for c in sparse.values()) + outside.bytes


def account(dense: dict[str, Cost], sparse: dict[str, Cost], outside: Outside, context: int) -> tuple[dict, dict]:
    """The record's macs and bytes sections of one decoded token, from costs by site.

    Decode skips what the sparse tokens dropped. `executed` stays None until a kernel ran: only timing can fill it.
    """
    dense_macs = sum(c.dense_macs for c in dense.values())
    overhead = sum(c.overhead_macs for c in sparse.values())
    sparse_macs = sum(c.sparse_macs for c in sparse.values()) + overhead
    macs = {
        "dense": dense_macs + outside.macs,
        "sparse": sparse_macs + outside.macs,
        "executed": None,
        "overhead": overhead,
        "unit": f"multiply-accumulates per decoded token, batch 1, context {context}; FLOPs = 2 x MACs; executed: by "
        "the timed steps, on their own tokens",
        "parts": {
            "blocks_dense": dense_macs,
            "blocks_sparse": sparse_macs,
            "head": outside.head_macs,
            "attention": outside.attention_macs,
        },
        "per_site": {name: asdict(cost) for name, cost in sparse.items()},
    }
    traffic = {
        "dense": sum(c.dense_bytes for c in dense.values()) + outside.bytes,
        "sparse": read_bytes(sparse, outside),
        "unit": f"bytes of weights and KV cache read per decoded token, batch 1, context {context}",
        "parts": {"head": outside.head_bytes, "kv_cache": outside.cache_bytes},
    }
    return macs, traffic


def over_scored_tokens(
    dense: dict[str, Cost], sparse: dict[str, Cost], measured: dict[str, SiteSparsity], outside: Outside, context: int
) -> tuple[dict, dict]:
    """`scored` of the record's macs and bytes: means over the tokens that quality was scored on, same unit.

    Where a prompt policy left some of them dense, those cost what a dense token costs (pruned weights stay pruned);
    figures per decoded token assume that none was. So quality and these costs are of the same tokens.
    """
    sites, traffic = {}, 0.0
    for name, cost in sparse.items():
        site = measured.get(name)
        tokens = site.sparse_tokens + site.dense_tokens if site else 0
        share = site.sparse_tokens / tokens if tokens else 1.0
        plain = dense.get(name, cost)  # a part that the dense model has not (a rotation) costs the same for every token
        left = plain.dense_macs if site is None or site.nonzeros is None else site.nonzeros
        sites[name] = {
            "dense_macs": cost.dense_macs,
            "sparse_macs": share * cost.sparse_macs + (1 - share) * left,
            "overhead_macs": share * cost.overhead_macs,
        }
        traffic += share * cost.sparse_bytes + (1 - share) * plain.dense_bytes
    rest, rest_bytes = outside.macs, outside.bytes
    unit = f"mean over the scored tokens, each as if decoded at batch 1, context {context}"
    macs = {
        "dense": sum(c.dense_macs for c in dense.values()) + rest,
        "sparse": sum(s["sparse_macs"] + s["overhead_macs"] for s in sites.values()) + rest,
        "unit": f"multiply-accumulates, {unit}",
        "per_site": sites,
    }
    moved = {
        "dense": sum(c.dense_bytes for c in dense.values()) + rest_bytes,
        "sparse": traffic + rest_bytes,
        "unit": f"bytes of weights and KV cache, {unit}",
    }
    return macs, moved


def unit_per(sample: str) -> dict[str, str]:
    """What the figures of an `image` or a `text` are, for the record."""
    unit = f"multiply-accumulates per {sample}, mean over the test {sample}s; FLOPs = 2 x MACs"
    return {"per": sample, "unit": unit}


def per_sample(sample: str, dense: float, attention: float, tokens: float, sparse: dict[str, Cost]) -> dict:
    """The record's macs section of an encoder whose sparse modules have `costs` per token.

    sample: `image` or `text`. dense: products of one, `attention` (scores and weighted values) among them; tokens: of
    one, as routed; sparse: costs by site of what sparse modules replaced. What they did not replace costs what it did;
    routers count as overhead, per token.
    """
    saved = tokens * sum(c.dense_macs - c.sparse_macs for c in sparse.values())
    overhead = tokens * sum(c.overhead_macs for c in sparse.values())
    return {
        "dense": dense,
        "sparse": dense - saved + overhead,
        "executed": None,
        "overhead": overhead,
        "parts": {"attention": attention, "tokens": tokens},
        "per_site": {name: asdict(cost) for name, cost in sparse.items()},
    } | unit_per(sample)


def executed_per_sample(macs: dict, skipping: set[str]) -> float:
    """MACs of one sample as a timed forward pass ran it: sites not among `skipping` ran all their products.

    macs: the section that `per_sample` gave.
    """
    sites = [site for name, site in macs["per_site"].items() if name in skipping]
    saved = sum(site["dense_macs"] - site["sparse_macs"] for site in sites)
    return macs["dense"] - macs["parts"]["tokens"] * saved + macs["overhead"]


def matrix_bytes(dense: int, sparse: int) -> dict:
    """The record's bytes section of such an encoder, from the bytes of all matrices of each model (`matrices_of`)."""
    unit = "bytes of all matrices of each model: block maps, embeddings and heads, routers where there are any"
    return {"dense": dense, "sparse": sparse, "unit": unit}


def matrices_of(module: nn.Module) -> int:
    """Bytes of all matrices of a model."""
    return sum(w.numel() * w.element_size() for w in module.parameters() if w.dim() > 1)
