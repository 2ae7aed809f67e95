"""Routing of a mixture of experts: load, experts hit by a batch, bound of a decode step."""

import math

import pytest
import torch

from sparsebench.measure import macs, routing
from sparsebench.measure.routing import Routing, experts_hit
from sparsebench.modules.base import Cost
from tests.families import ROWS, family


def test_experts_hit_by_a_batch_against_simulation():
    """Check 8: uniform routing, within 3 standard deviations; and the figures of the sizes that are published."""
    generator = torch.Generator().manual_seed(0)
    for count, k, batch in ((64, 8, 4), (128, 8, 16), (4, 2, 3)):
        draws = [
            torch.rand(batch, count, generator=generator).topk(k, -1).indices.unique().numel() for _ in range(1000)
        ]
        draws = torch.tensor(draws, dtype=torch.float64)
        error = 3 * float(draws.std()) / math.sqrt(len(draws))
        assert float(draws.mean()) == pytest.approx(experts_hit(count, k, batch), abs=error)
    assert [round(experts_hit(64, 8, b), 1) for b in (1, 4, 16, 64)] == [8, 26.5, 56.4, 64]
    assert [round(experts_hit(128, 8, b)) for b in (1, 4, 16, 64)] == [8, 29, 82, 126]


def test_load_and_flips_by_hand():
    chosen = torch.tensor([[0, 1], [0, 1], [1, 2], [0, 3]])
    other = torch.tensor([[0, 1], [0, 2], [1, 2], [0, 1]])
    dense, sparse = Routing(5, [chosen, chosen]), Routing(5, [chosen, other])
    assert sparse.flipped(dense) == 2 / 8
    assert dense.tokens_per_expert().tolist() == [[3, 3, 1, 1, 0]] * 2
    told = routing.describe(dense, sparse)
    assert told["tokens_per_expert"] == [0, 1, 3] and told["never_run"] == 2
    assert told["experts_hit"]["1"]["measured"] == 2 and told["experts_hit"]["16"]["measured"] is None
    assert told["experts_hit"]["4"] == {"uniform": 5 * (1 - 0.6**4), "measured": 4}


def test_the_order_of_the_choice_is_no_flip():
    model = family("mixtral")
    with routing.choices(model) as seen, torch.no_grad():
        model(input_ids=ROWS[:2], use_cache=False)
    assert len(seen) == 2 and all(bool((c[0].diff(dim=-1) > 0).all()) for c in seen)


def test_the_share_of_experts_bounds_the_step():
    """1 / (1 - q 2/3 s) for the gate's rule, where gate, up and down are of one size."""
    one = Cost(100, 100, 0, 200, 200)
    dense = {"0.q": one} | {f"0.experts.{r}": one for r in ("gate", "up", "down")}
    half = Cost(100, 50, 0, 200, 100)
    outside = macs.Outside(100, 0, 200, 0)
    told = routing.bound(dense, dense | {"0.experts.up": half, "0.experts.down": half}, outside)
    q = 600 / 1000
    assert told == {"experts_share_of_bytes": q, "bound": pytest.approx(1 / (1 - q * 2 / 3 * 0.5))}


def test_a_model_without_experts_has_no_routing():
    assert routing.routing(family("llama"), ROWS, 4) is None
