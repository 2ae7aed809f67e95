"""Multiply-accumulates and bytes of one decoded token, from shapes and measured counts. FLOPs = 2 x MACs, never stored.

Counted: every linear map of the blocks, the head, attention scores and values at the stated context. Not counted:
norms, activations, rotary embedding, softmax, the embedding look-up (no products). `overhead` is work the method adds
(low-rank remainder, predictor, router, rotation, scaling and selection at one MAC a channel); it is part of `sparse`.
Where weights are pruned too, `sparse` counts products of a kept input and a nonzero weight. `executed` is what ran while
it was timed, and null where nothing was.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import nn

from sparsebench.modules.base import Cost, SiteSparsity, measured_modules, sparse_modules
from sparsebench.sites import attention_layout, find_blocks, is_linear, shape, stored_bytes


def dense_sites(module: nn.Module) -> dict[str, Cost]:
    """Costs of every block map of a dense model by site name; sparse equals dense until a method says otherwise.

    Experts cost what one token runs and reads of them: k of E.
    """
    costs = {}
    for block in find_blocks(module):
        for site in (*block.sites.values(), *block.others.values()):
            linear = module.get_submodule(site.path)
            m, n = shape(linear)
            size = stored_bytes(linear)
            costs[site.name] = Cost(site.calls * m * n, site.calls * m * n, 0, size, size)
        if block.experts is not None:
            active, size = block.experts.active, block.experts.active * block.experts.element_size
            costs |= {name: Cost(active, active, 0, size, size) for name in block.experts.sites.values()}
    return costs


def stored_experts(module: nn.Module) -> dict[str, int]:
    """Parameters of all experts by site name; {} for what a method left, whose blocks are no longer known."""
    try:
        blocks = find_blocks(module)
    except ValueError:
        return {}
    return {name: b.experts.stored for b in blocks if b.experts for name in b.experts.sites.values()}


@dataclass(frozen=True)
class Attention:
    """What one layer's attention multiplies and reads per position that a new token sees."""

    scores: int  # heads times the size of a query
    values: int  # heads times the size of a value
    cached: int  # elements of keys and values, or of their latents
    expanded: int = 0  # products that make keys and values of one cached latent


def attention_of(module: nn.Module) -> list[Attention]:
    """The attention of every layer, from the shapes of its maps; from the configuration where a method replaced those.

    Keys and values count as the maps make them: once per group of queries; those of the layer they are taken from where a
    layer has none of its own. Latent attention (DeepSeek) as transformers runs it: latents are cached, and expanded for
    every position at every step; before it did so (`expand_kv`), keys and values of all heads were cached.
    """
    layers: list[Attention] = []
    for layer in next((m for m in module.modules() if isinstance(m, nn.ModuleList) and is_decoder(m)), ()):
        size = {role: shape(linear) for role, linear in attention_layout(layer).items()}
        values, expanded = size["o"][1], 0
        scores = next((size[r][0] for r in ("q_b", "q") if r in size), values)
        if "qkv" in size:
            cached = size["qkv"][0] - values
        elif "kv_b" in size:
            latent = any(hasattr(m, "expand_kv") for m in layer.modules())
            expanded = size["kv_b"][0] * size["kv_b"][1] if latent else 0
            cached = size["kv_a"][0] if latent else scores + values
        elif "k" in size:
            cached = size["k"][0] + size.get("v", size["k"])[0]
        else:
            cached = next(a.cached for a in reversed(layers) if a.scores == scores)
        if any(hasattr(m, "lambda_q1") for m in layer.modules()):  # DiffLlama attends twice
            scores, values = 2 * scores, 2 * values
        layers.append(Attention(scores, values, cached, expanded))
    return layers or of_config(module.config)


def is_decoder(stack: nn.ModuleList) -> bool:
    return len(stack) > 0 and all(attention_layout(layer) for layer in stack)


def of_config(config) -> list[Attention]:
    """The same from a configuration of heads, groups and head size."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return [Attention(heads * head_dim, heads * head_dim, 2 * groups * head_dim)] * config.num_hidden_layers


def site_costs(module: nn.Module, measured: dict[str, SiteSparsity]) -> dict[str, Cost]:
    """Costs of one token by site name: what sparse modules say of themselves, or those of a dense model's block maps."""
    costs: dict[str, Cost] = {}
    for sparse in sparse_modules(module):
        costs |= sparse.costs(measured)
    return costs or dense_sites(module)


@dataclass(frozen=True)
class Outside:
    """What a decoded token costs outside the block maps: dense and sparse alike, but for dropped heads."""

    head_macs: int
    attention_macs: float  # scores and weighted values at the stated context
    head_bytes: int
    cache_bytes: float  # keys and values read
    other_macs: int = 0  # maps outside blocks other than the head, and products of streams (Gemma-3n)
    other_bytes: int = 0
    pair_macs: int = 0  # of one query with one key and its value, over all layers: what a prompt multiplies

    @property
    def macs(self) -> int:
        return self.head_macs + self.attention_macs + self.other_macs

    @property
    def bytes(self) -> int:
        return self.head_bytes + self.cache_bytes + self.other_bytes


def outside_blocks(module: nn.Module, context: int, measured: dict[str, SiteSparsity] | None = None) -> Outside:
    """Head, attention and KV cache of one decoded token that sees `context` tokens, and maps that lie nowhere else.

    measured: what head-sparse layers dropped; they read that share of their cache less, where a unit is a whole
    key-value group, and multiply that much less.
    """
    head = module.get_output_embeddings().weight
    size, layers = head.element_size(), attention_of(module)
    maps, streams = other_maps(module, head)
    multiplied = sum((a.scores + a.values) * context + a.expanded * (context - 1) for a in layers)
    cached = sum(a.cached for a in layers) * context * size
    config = module.config
    groups = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    saved = read = 0.0  # layers' worth of attention products and of cache reads
    for site, sparse in measured_modules(module):
        if measured and sparse.unit == "heads" and site in measured:
            share = measured[site].sparsity_of_sparse_tokens
            saved, read = saved + share, read + (share if sparse.units == groups else 0.0)
    return Outside(
        head.numel(),
        multiplied * (1 - saved / len(layers)) if saved else multiplied,
        head.numel() * size,
        cached * (1 - read / len(layers)) if read else cached,
        sum(w.numel() for w in maps) + streams,
        sum(w.numel() * w.element_size() for w in maps),
        sum(a.scores + a.values for a in layers),
    )


def other_maps(module: nn.Module, head: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """(weights of the linear maps outside blocks and head, products of streams by the matrix that a map gives)."""
    maps, streams = [], 0
    blocks = [n for n, m in module.named_modules() if isinstance(m, nn.ModuleList) and is_decoder(m)]
    for name, part in module.named_modules():
        if not isinstance(getattr(part, "weight", None), torch.Tensor) or part.weight is head:
            continue
        if name.endswith("altup.prediction_coefs"):  # a matrix [streams, streams] per token, times D channels each
            streams += shape(part)[0] * module.config.hidden_size
        elif is_linear(part) and not any(name.startswith(f"{stack}.") for stack in blocks):
            maps.append(part.weight)
    return maps, streams


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


def account(
    dense: dict[str, Cost],
    sparse: dict[str, Cost],
    outside: Outside,
    context: int,
    dense_outside: Outside | None = None,
) -> tuple[dict, dict]:
    """The record's macs and bytes sections of one decoded token, from costs by site.

    dense_outside: of the dense model, where heads are dropped; else as `outside`.

    Decode skips what the sparse tokens dropped. `executed` stays None until a kernel ran: only timing can fill it.
    """
    untouched = dense_outside or outside
    dense_macs = sum(c.dense_macs for c in dense.values())
    overhead = sum(c.overhead_macs for c in sparse.values())
    sparse_macs = sum(c.sparse_macs for c in sparse.values()) + overhead
    macs = {
        "dense": dense_macs + untouched.macs,
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
        }
        | ({"other": outside.other_macs} if outside.other_macs else {}),
        "per_site": {name: asdict(cost) for name, cost in sparse.items()},
    }
    traffic = {
        "dense": sum(c.dense_bytes for c in dense.values()) + untouched.bytes,
        "sparse": read_bytes(sparse, outside),
        "unit": f"bytes of weights and KV cache read per decoded token, batch 1, context {context}",
        "parts": {"head": outside.head_bytes, "kv_cache": outside.cache_bytes},
    }
    return macs, traffic


def over_scored_tokens(
    dense: dict[str, Cost], sparse: dict[str, Cost], measured: dict[str, SiteSparsity], outside: Outside, context: int,
    dense_outside: Outside | None = None,
) -> tuple[dict, dict]:  # fmt: skip
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
        token = cost.prompt or cost
        sites[name] = {
            "dense_macs": cost.dense_macs,
            "sparse_macs": share * token.sparse_macs + (1 - share) * left,
            "overhead_macs": share * token.overhead_macs,
        }
        traffic += share * cost.sparse_bytes + (1 - share) * plain.dense_bytes
    whole = dense_outside or outside
    heads = next((s for name, s in measured.items() if name.endswith(".heads")), None)
    seen = heads.sparse_tokens + heads.dense_tokens if heads else 0
    part = heads.sparse_tokens / seen if heads and seen else 1.0  # tokens whose heads were dropped
    rest, rest_bytes = (
        part * o + (1 - part) * w for o, w in ((outside.macs, whole.macs), (outside.bytes, whole.bytes))
    )
    how = "with products as in a prompt, else " if any(c.prompt for c in sparse.values()) else ""
    unit = f"mean over the scored tokens, each {how}as if decoded at batch 1, context {context}"
    macs = {
        "dense": sum(c.dense_macs for c in dense.values()) + whole.macs,
        "sparse": sum(s["sparse_macs"] + s["overhead_macs"] for s in sites.values()) + rest,
        "unit": f"multiply-accumulates, {unit}",
        "per_site": sites,
    }
    moved = {
        "dense": sum(c.dense_bytes for c in dense.values()) + whole.bytes,
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
