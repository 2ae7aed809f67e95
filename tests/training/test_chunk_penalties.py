"""Penalties for shared activity: docs/methods/chunk.md, checks 8, 9 and 12."""

import pytest
import torch

from sparsebench.training import chunk_penalties


def test_the_chunk_penalty_of_the_paper():
    """Check 8: 8 tokens, 48 units, 8 active of equal weight: shared .109, all different .161, one unit always 1/48; an
    inactive unit has no gradient through ReLU."""
    shared = torch.zeros(1, 8, 48)
    shared[..., :8] = 1
    apart, single = torch.zeros(1, 8, 48), torch.zeros(1, 8, 48)
    for token in range(8):
        apart[0, token, [(8 * token + i) % 48 for i in range(8)]] = 1
    single[..., 0] = 1
    assert float(chunk_penalties.chunk(shared, 8)) == pytest.approx(8 * (1 - (7 / 8) ** 8) / 48, abs=1e-6)
    assert float(chunk_penalties.chunk(shared, 8)) == pytest.approx(0.109, abs=5e-4)
    assert float(chunk_penalties.chunk(apart, 8)) == pytest.approx(0.161, abs=5e-4)
    assert float(chunk_penalties.chunk(single, 8)) == pytest.approx(1 / 48, abs=1e-6)
    scores = (torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0))).requires_grad_()
    chunk_penalties.chunk(scores.relu(), 4).backward()
    assert not scores.grad[scores < 0].any() and scores.grad[scores > 0].any()
    with pytest.raises(ValueError, match="divide"):
        chunk_penalties.chunk(shared, 3)


def test_the_locality_penalty_of_the_paper():
    """Check 9: equal neighbours leave the entropy of sigmoid(alpha a); symmetric data, equal gradients to both sides."""
    row = torch.tensor([0.3, -0.2, 0.05])
    p = (2.0 * row).sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    assert float(chunk_penalties.locality(row.expand(1, 5, 3), 2.0)) == pytest.approx(float(entropy), abs=1e-6)
    pair = torch.tensor([[[0.4], [-0.4]], [[-0.4], [0.4]]]).requires_grad_()
    chunk_penalties.locality(pair, 1.0).backward()
    assert pair.grad.abs().amin() > 0 and torch.allclose(pair.grad[0, 0], -pair.grad[1, 0])
    assert torch.allclose(pair.grad[:, 1].abs().mean(), pair.grad[:, 1].abs().max())


def test_the_schedule_of_the_chunk_penalty():
    """Check 12: gamma <= 1 shrinks by gamma, gamma in (1, 1.025) grows by 1.025, above by gamma."""
    assert chunk_penalties.next_weight(0.05, 0.9, 1.0) == pytest.approx(0.045)
    assert chunk_penalties.next_weight(0.05, 1.01, 1.0) == pytest.approx(0.05 * 1.025)
    assert chunk_penalties.next_weight(0.05, 1.2, 1.0) == pytest.approx(0.06)
