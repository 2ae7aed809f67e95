"""Counting: integer, additive, free of padding (docs/methods/metrics.md, checks 1-3)."""

import pytest
import torch
from torch import nn

from sparsebench.measure import sparsity
from sparsebench.modules.input_sparse import InputSparseLinear
from sparsebench.modules.tokens import dense_prefix


def counted(x, threshold=0.5, prompt="all", mask=None):
    layer = InputSparseLinear(nn.Linear(x.shape[-1], 3), "0.q", threshold, prompt=prompt)
    with sparsity.counting(layer) as counters:
        sparsity.set_token_mask(layer, mask)
        layer(x)
    return sparsity.summarise(layer, counters)["0.q"]


def test_constructed_tensor():
    x = torch.tensor([[[0.1, 0.9, 0.5, -0.6], [0.0, 0.2, -0.3, 0.4]]])  # 0.5 is dropped: the comparison is strict
    assert counted(x).sparsity == 6 / 8


def test_counts_add_up_over_passes():
    layer = InputSparseLinear(nn.Linear(8, 3), "0.q", 0.7)
    a, b = torch.randn(2, 5, 8), torch.randn(3, 4, 8)
    with sparsity.counting(layer) as both:
        layer(a), layer(b)
    with sparsity.counting(layer) as first:
        layer(a)
    with sparsity.counting(layer) as second:
        layer(b)
    first["0.q"].merge(second["0.q"])
    assert torch.equal(first["0.q"].kept, both["0.q"].kept)
    assert first["0.q"].sparse_tokens == both["0.q"].sparse_tokens == 22


def test_padding_moves_no_figure():
    x = torch.randn(2, 6, 8)
    mask = torch.ones(2, 6, dtype=torch.bool)
    padded = torch.cat([x, torch.zeros(2, 3, 8)], dim=1)
    longer = torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    assert counted(x, mask=mask) == counted(padded, mask=longer) == counted(x)


@pytest.mark.parametrize(
    ("policy", "tokens", "dense"),
    [("none", 10, 10), ("half", 10, 5), ("half", 11, 6), ("p99", 200, 2), ("last10", 100, 90), ("all", 10, 0)]
    + [(policy, 1, 0) for policy in ("none", "half", "p99", "last10", "all")],
)
def test_prompt_policies(policy, tokens, dense):
    assert dense_prefix(policy, tokens) == dense


def test_dense_prompt_tokens_lower_the_figure_but_not_that_of_sparse_tokens():
    x = torch.randn(3, 10, 50)
    actual = counted(x, prompt="half")
    dropped = float((x[:, 5:].abs() <= 0.5).float().mean())
    assert actual.sparsity_of_sparse_tokens == pytest.approx(dropped)
    assert actual.sparsity == pytest.approx(dropped / 2)
    assert (actual.sparse_tokens, actual.dense_tokens) == (15, 15)


GQA = {
    "q": 16.777216,
    "k": 4.194304,
    "v": 4.194304,
    "o": 16.777216,
    "gate": 58.720256,
    "up": 58.720256,
    "down": 58.720256,
}
GROUPS = {"q": 0, "k": 0, "v": 0, "o": 1, "up": 2, "gate": 3, "down": 4}


@pytest.mark.parametrize(
    ("shares", "overall"),
    [
        ((51.4, 50, 50, 50, 80), 58.2),
        ((42, 40, 40, 40, 60.4), 45.7),
        ((12.3, 0, 10.3, 10.3, 79.3), 28.3),
        ((0.1, 0, 0.1, 0.1, 85.5), 23.1),
    ],
)
def test_model_wide_of_mistral_rows(shares, overall):
    """Q-Sparse, Table 2: per-group input sparsity of Mistral-7B against the overall figure (docs/methods/qsparse.md)."""
    by_role = {role: shares[group] for role, group in GROUPS.items()}
    assert sparsity.model_wide(by_role, GQA) == pytest.approx(overall, abs=0.1)


@pytest.mark.parametrize(("d", "f", "skipped", "expected"), [(4096, 11008, 0.8932, 39.8), (5120, 13824, 0.8880, 39.6)])
def test_relu_sparsity_converts_to_model_wide(d, f, skipped, expected):
    """S on x1 skips rows of up and columns of down: S (P_u + P_d) / sum P."""
    weights = {"q": d * d, "k": d * d, "v": d * d, "o": d * d, "gate": d * f, "up": d * f, "down": d * f}
    shares = dict.fromkeys(weights, 0.0) | {"up": 100 * skipped, "down": 100 * skipped}
    assert sparsity.model_wide(shares, weights) == pytest.approx(expected, abs=0.1)


def test_equal_shares_give_that_share():
    assert sparsity.model_wide(dict.fromkeys(GQA, 0.37), GQA) == pytest.approx(0.37)
