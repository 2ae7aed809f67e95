"""Training through torch.compile: the same model as without, whatever watches or replaces parts of its blocks."""

import pytest
import torch

from sparsebench.modules.x1 import X1Penalty
from sparsebench.training import compiled
from sparsebench.training.loop import train
from tests.helpers import tiny_model, training_settings


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Traced as for a GPU, without minutes of a C++ compiler."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()


def trained(folder, on, *, watched=False):
    module = tiny_model(seed=0).float().requires_grad_(True)
    rows = torch.randint(0, module.config.vocab_size, (8, 16), generator=torch.Generator().manual_seed(1))
    settings = training_settings(steps=3, compile=on)
    if not watched:
        return module, train(module, rows, settings, folder=folder, seed=0).rows
    with X1Penalty(module, "mean", lambda step: 0.1) as penalty:
        return module, train(module, rows, settings, folder=folder, seed=0, penalty=penalty).rows


@pytest.mark.parametrize("watched", [False, True])
def test_the_same_weights_and_the_same_history(tmp_path, watched):
    plain, before = trained(tmp_path / "a", False, watched=watched)
    traced, after = trained(tmp_path / "b", True, watched=watched)
    for a, b in zip(plain.parameters(), traced.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert [r["train/loss"] for r in after] == pytest.approx([r["train/loss"] for r in before], rel=1e-5)
    assert set(after[0]) == set(before[0])
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0


def test_blocks_are_left_as_they_were():
    module = tiny_model()
    chosen = compiled.blocks(module)
    assert len(chosen) == module.config.num_hidden_layers
    with compiled.compiled(module, True):
        assert all(b._compiled_call_impl is not None for b in chosen) and compiled.ACTIVE.get()
    assert all(b._compiled_call_impl is None for b in chosen) and not compiled.ACTIVE.get()


def test_inside_the_blocks_the_tracer_takes_over_the_loss_too():
    logits, tokens = torch.randn(2, 5, 11), torch.randint(0, 11, (2, 5))
    with compiled.compiled(tiny_model(), True):
        inside = compiled.next_token_entropy(logits, tokens)
    assert inside == pytest.approx(float(compiled.next_token_entropy(logits, tokens)), rel=1e-6)
