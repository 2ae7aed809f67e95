"""Multiply-accumulates and weight bytes of a whole prompt in one call, from the costs of its tokens by site.

A prompt is bound by arithmetic and reads every weight once, so what its tokens skip saves products, never weight bytes.
Counted as in macs.py, with scores and weighted values of each token over those before it, and the head for the last.
"""

from __future__ import annotations

from sparsebench.measure.macs import Outside
from sparsebench.modules.base import Cost, PromptCost, SiteSparsity
from sparsebench.modules.tokens import dense_prefix


def of_token(cost: Cost) -> PromptCost:
    """What a sparse token of a prompt costs at a site; without a word of its own, masks of dense products."""
    return cost.prompt or PromptCost(cost.sparse_macs, cost.overhead_macs, cost.dense_macs)


def account(
    dense: dict[str, Cost], sparse: dict[str, Cost], measured: dict[str, SiteSparsity], outside: Outside,
    tokens: int, policy: str, timed: bool,
) -> tuple[dict, dict]:  # fmt: skip
    """`prefill` of the record's macs and bytes sections: a prompt of `tokens`, of which `policy` leaves some dense.

    timed: whether a prompt was really run for its time; only then is anything `executed`.
    """
    share = 1 - dense_prefix(policy, tokens) / tokens
    totals = dict.fromkeys(("sparse", "executed", "overhead"), 0.0)
    covered = 0
    for name, cost in sparse.items():
        token, site = of_token(cost), measured.get(name)
        plain = dense.get(name, cost)  # a part that the dense model has not costs the same for every token
        left = plain.dense_macs if site is None or site.nonzeros is None else site.nonzeros
        totals["sparse"] += share * token.sparse_macs + (1 - share) * left
        totals["executed"] += share * token.executed_macs + (1 - share) * plain.dense_macs
        totals["overhead"] += share * token.overhead_macs
        covered += cost.dense_macs if site is not None and token.sparse_macs < cost.dense_macs else 0
    blocks = sum(c.dense_macs for c in dense.values())
    rest = outside.head_macs + outside.pair_macs * tokens * (tokens + 1) // 2
    simulated = totals["executed"] >= blocks
    macs = {
        "dense": tokens * blocks + rest,
        "sparse": tokens * (totals["sparse"] + totals["overhead"]) + rest,
        "executed": tokens * (totals["executed"] + totals["overhead"]) + rest if timed else None,
        "overhead": tokens * totals["overhead"],
        "tokens": tokens,
        "coverage": covered / blocks if blocks else 0.0,
        "simulated": simulated,
        "hypothetical": {
            "speedup_of_linear_maps": blocks / totals["sparse"] if totals["sparse"] else None,
            "label": "hypothetical hardware: a skipped product takes no time and packing is free; not a measurement",
        },
        "unit": f"multiply-accumulates of a prompt of {tokens} tokens, batch 1, head for its last token; FLOPs = 2 x MACs; "
        "coverage: share of the block maps' products at sparse maps; simulated: masks over dense products",
    }
    read = sum(c.dense_bytes for c in dense.values()) + outside.head_bytes
    traffic = {
        "dense": read,
        "sparse": read,
        "unit": "bytes of weights, each read once by a prompt, whatever its tokens skip",
    }
    return macs, traffic
