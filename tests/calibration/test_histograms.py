"""Histograms of |x| against exact quantiles."""

import pytest
import torch

from sparsebench.calibration.histograms import AbsHistogram, observe, quantile
from tests.helpers import tiny_model

SHARES = (0.05, 0.25, 0.5, 0.65, 0.9, 0.98, 0.999)


@pytest.mark.parametrize("draw", [torch.randn, lambda n: torch.distributions.Laplace(0, 0.01).sample((n,))])
def test_quantile_matches_the_exact_one(draw):
    torch.manual_seed(0)
    values = draw(200_000)
    histogram = AbsHistogram()
    histogram.add(values.view(400, 500))
    for p in SHARES:
        t = histogram.quantile(p)
        assert float((values.abs() <= t).float().mean()) == pytest.approx(p, abs=2e-3)


def test_quantile_is_linear_inside_a_bin():
    histogram = AbsHistogram()
    histogram.add(torch.full((100,), 1.0))  # one bin, [1, 1 + 2**-8)
    assert [histogram.quantile(p) for p in (0.25, 0.5, 1.0)] == [1 + p * 2**-8 for p in (0.25, 0.5, 1.0)]
    histogram.add(torch.full((300,), 3.0))  # [3, 3 + 2**-7): 0.625 lies at its middle
    assert histogram.quantile(0.625) == 3 + 2**-8


def test_quantile_does_not_decrease_in_p():
    histogram = AbsHistogram()
    histogram.add(torch.randn(10_000))
    values = [histogram.quantile(p / 200) for p in range(201)]
    assert values == sorted(values) and values[0] == 0.0


def test_counts_are_additive():
    a, b, both = AbsHistogram(), AbsHistogram(), AbsHistogram()
    x, y = torch.randn(1000), 5 * torch.randn(77)
    a.add(x), b.add(y), both.add(torch.cat([x, y]))
    assert torch.equal(a.counts + b.counts, both.counts)


def test_exact_for_bfloat16_values():
    values = torch.randn(50_000).bfloat16()
    histogram = AbsHistogram()
    histogram.add(values)
    t = histogram.quantile(0.5)
    assert abs(float((values.float().abs() > t).float().mean()) - 0.5) < 5e-3


def test_many_zeros_give_threshold_zero():
    values = torch.relu(torch.randn(10_000))
    histogram = AbsHistogram()
    histogram.add(values)
    assert histogram.quantile(0.3) == 0.0
    assert histogram.quantile(0.75) > 0.5


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        AbsHistogram().add(torch.tensor([1.0, float("nan")]))


def test_share_outside_the_unit_interval_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        quantile(0, torch.ones(4, dtype=torch.int64), 1.5)


def test_observers_see_the_inputs_of_their_maps():
    model = tiny_model()
    seen = []
    path = "model.layers.1.mlp.down_proj"
    observe(model, torch.randint(0, 300, (5, 16)), {path: lambda x: seen.append(x.shape)}, batch_size=2)
    assert seen == [(2, 16, 160), (2, 16, 160), (1, 16, 160)]
    assert not model.get_submodule(path)._forward_pre_hooks
