"""MACs and bytes against counts by hand (docs/methods/metrics.md, check 8)."""

import pytest
import torch

from sparsebench.measure import macs, quality, sparsity
from sparsebench.modules.base import Cost
from sparsebench.modules.input_sparse import InputSparseLinear, replace, swap
from sparsebench.sites import find_blocks
from tests.helpers import accounted, tiny_model

D, F, KV, V, LAYERS = 64, 160, 32, 320, 2  # tests.conftest.SHAPES["llama"]
BLOCK = D * D + 2 * D * KV + D * D + 3 * D * F


def brute_force(model, context: int) -> int:
    """Products of one decoded token, by looping over every map's output and input."""
    total = 0
    for block in find_blocks(model):
        for site in block.sites.values():
            for _ in model.get_submodule(site.path).weight:
                total += model.get_submodule(site.path).weight.shape[1]
    for _ in range(LAYERS):
        for _head in range(4):
            for _position in range(context):
                total += 2 * 16
    return total + V * D


def test_dense_macs_by_hand():
    model = tiny_model()
    actual, traffic = accounted(macs.dense_sites(model), model, {}, context=10, skips=False)
    assert actual["dense"] == brute_force(model, 10) == LAYERS * BLOCK + V * D + LAYERS * 2 * 4 * 16 * 10
    assert actual["sparse"] == actual["executed"] == actual["dense"] and actual["overhead"] == 0
    assert traffic["dense"] == 4 * (LAYERS * BLOCK + V * D + LAYERS * 2 * 2 * 16 * 10)


@pytest.mark.parametrize("skips", [True, False])
def test_sparse_macs_follow_measured_counts(skips):
    model = tiny_model()
    dense = macs.dense_sites(model)
    site = find_blocks(model)[0].sites["down"]
    replace(model, site.path, InputSparseLinear(model.get_submodule(site.path), site.name, 0.05))
    with sparsity.counting(model) as counters:
        quality.perplexity(model, torch.randint(0, 300, (3, 16)), 3)
    share = sparsity.summarise(model, counters)["0.down"].sparsity
    assert 0.05 < share < 0.95
    actual, traffic = accounted(dense, model, sparsity.summarise(model, counters), context=1, skips=skips)
    assert actual["dense"] - actual["sparse"] == pytest.approx(share * D * F)
    assert actual["executed"] == (actual["sparse"] if skips else actual["dense"])  # a simulation saves nothing
    assert traffic["dense"] - traffic["sparse"] == pytest.approx(4 * share * D * F)


def test_decode_costs_what_sparse_tokens_skip():
    """With prompt=half every second token that was scored is dense, and no decoded one."""
    sparse = InputSparseLinear(torch.nn.Linear(8, 4, bias=False), "0.q", 0.5, prompt="half")
    with sparsity.counting(sparse) as counters:
        sparse(torch.tensor([0.0, 1.0]).repeat(2, 6, 4))
    measured = sparsity.summarise(sparse, counters)
    assert (measured["0.q"].sparsity, measured["0.q"].sparsity_of_sparse_tokens) == (0.25, 0.5)
    cost = sparse.costs(measured)["0.q"]
    assert (cost.sparse_macs, cost.executed_macs, cost.sparse_bytes) == (16, 16, 64)


def test_ffn_of_a_gated_model_is_3df_per_token():
    sites = macs.dense_sites(tiny_model())
    assert sum(sites[f"0.{role}"].dense_macs for role in ("gate", "up", "down")) == 3 * D * F


def test_nothing_is_executed_before_it_is_timed():
    model = tiny_model()
    costs, outside = macs.dense_sites(model), macs.outside_blocks(model, 10)
    actual, _ = macs.account(costs, costs, outside, 10)
    assert actual["executed"] is None
    assert macs.executed(costs, costs, outside, skips=True) == brute_force(model, 10)
    assert macs.per_sample("image", 1000.0, 10.0, 4.0, costs)["executed"] is None


def test_a_sample_runs_all_products_of_the_sites_that_did_not_skip():
    """4 tokens; a site of 100 products keeps 30 and another of 50 keeps 20; 5 per token are the router's."""
    costs = {"0.ffn": Cost(100, 30, 5, 0, 0), "1.ffn": Cost(50, 20, 0, 0, 0)}
    section = macs.per_sample("image", 2000.0, 10.0, 4.0, costs)
    assert section["sparse"] == 2000 - 4 * 100 + 4 * 5
    by_hand = {(): 2020, ("0.ffn",): 2020 - 280, ("1.ffn",): 2020 - 120, ("0.ffn", "1.ffn"): section["sparse"]}
    for skipping, expected in by_hand.items():
        assert macs.executed_per_sample(section, set(skipping)) == expected


@pytest.mark.parametrize(("prompt", "share"), [("all", 1), ("half", 8 / 16), ("none", 0)])
def test_costs_over_the_scored_tokens_are_of_the_tokens_scored(prompt, share):
    """Of 16 tokens `half` leaves 8 dense: they cost what dense tokens cost, whatever a decoded token costs."""
    model = tiny_model()
    dense = macs.dense_sites(model)
    site = find_blocks(model)[0].sites["down"]
    swap(model, site, 0.05, prompt=prompt)
    with sparsity.counting(model) as counters:
        quality.perplexity(model, torch.randint(0, 300, (3, 16)), 3)
    measured = sparsity.summarise(model, counters)
    decoded, traffic = accounted(dense, model, measured, context=1, skips=True)
    sparse = dense | macs.site_costs(model, measured)
    scored, moved = macs.over_scored_tokens(dense, sparse, measured, macs.outside_blocks(model, 1), 1)
    assert scored["dense"] == decoded["dense"] and moved["dense"] == traffic["dense"]
    saved = measured["0.down"].sparsity * D * F  # over all tokens, dense ones included
    assert scored["dense"] - scored["sparse"] == pytest.approx(saved)
    assert moved["dense"] - moved["sparse"] == pytest.approx(4 * saved)
    assert saved == pytest.approx(share * (decoded["dense"] - decoded["sparse"]))


@pytest.mark.parametrize("prunes", [False, True])
def test_accidental_zero_weights_are_no_saving(prunes):
    model = tiny_model()
    dense, site = macs.dense_sites(model), find_blocks(model)[0].sites["down"]
    model.get_submodule(site.path).weight[:, ::2] = 0
    swap(model, site, 0.0, prompt="half")
    with sparsity.counting(model) as counters:
        quality.perplexity(model, torch.randint(0, 300, (3, 16)), 3)
    measured = sparsity.summarise(model, counters, prunes)
    actual, _ = accounted(dense, model, measured, context=1, skips=True)
    assert actual["dense"] - actual["sparse"] == (D * F // 2 if prunes else 0)
    sparse = dense | macs.site_costs(model, measured)
    scored, _ = macs.over_scored_tokens(dense, sparse, measured, macs.outside_blocks(model, 1), 1)
    assert scored["dense"] - scored["sparse"] == (D * F // 2 if prunes else 0)  # pruned for dense tokens, too


def test_a_part_that_the_dense_model_has_not_is_counted_for_every_token():
    """A rotation has no dense counterpart and no tokens of its own: its overhead counts in full."""
    dense = {"0.q": Cost(100, 100, 0, 400, 400)}
    sparse = {"0.q": Cost(100, 40, 0, 400, 160), "0.attn_in.rotation": Cost(0, 0, 9, 0, 36)}
    outside = macs.outside_blocks(tiny_model(), 1)
    scored, moved = macs.over_scored_tokens(dense, sparse, {}, outside, 1)
    assert scored["sparse"] == 40 + 9 + outside.macs and moved["sparse"] == 160 + 36 + outside.bytes
