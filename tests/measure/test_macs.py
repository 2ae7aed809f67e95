"""MACs and bytes against counts by hand (docs/methods/metrics.md, check 8)."""

import pytest
import torch

from sparsebench.measure import macs, quality, sparsity
from sparsebench.modules.input_sparse import InputSparseLinear, replace
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
    found, traffic = accounted(macs.dense_sites(model), model, {}, context=10, skips=False)
    assert found["dense"] == brute_force(model, 10) == LAYERS * BLOCK + V * D + LAYERS * 2 * 4 * 16 * 10
    assert found["sparse"] == found["executed"] == found["dense"] and found["overhead"] == 0
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
    found, traffic = accounted(dense, model, sparsity.summarise(model, counters), context=1, skips=skips)
    assert found["dense"] - found["sparse"] == pytest.approx(share * D * F)
    assert found["executed"] == (found["sparse"] if skips else found["dense"])  # a simulation saves nothing
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
