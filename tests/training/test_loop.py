"""The training loop: schedules, resuming bit for bit, divergence, the gradient it takes."""

import math

import pytest
import torch
from torch import nn

from sparsebench.training.loop import Diverged, Order, train
from tests.helpers import tiny_model, training_settings


def trainable(seed=0):
    return tiny_model(seed=seed, layers=1).requires_grad_(True)


@pytest.fixture
def rows():
    return torch.randint(0, 320, (10, 16), generator=torch.Generator().manual_seed(1))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_rates():
    s = training_settings(steps=102, warmup=2)
    assert s.rate(0) == pytest.approx(5e-4) and s.rate(1) == s.rate(2) == pytest.approx(1e-3)
    assert s.rate(52) == pytest.approx((1e-3 + 1e-4) / 2)
    linear = training_settings(steps=102, warmup=2, schedule="linear", min_lr=0.0)
    assert linear.rate(52) == pytest.approx(5e-4)
    assert training_settings(schedule="constant").rate(11) == 1e-3


def test_settings_that_contradict_each_other():
    with pytest.raises(
        ValueError, match="micro_batch must divide batch_size=4, got 3\nwarmup must be below steps=12, got 12"
    ):
        training_settings(micro_batch=3, warmup=12)


def test_every_epoch_reads_every_row_once():
    pick = Order(10, seed=3)
    found = pick(0, 30).view(3, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in found)
    assert not torch.equal(found[0], found[1])
    assert torch.equal(Order(10, seed=3)(7, 5), pick(7, 5))  # no state: any position can be asked for


def test_loss_falls_and_history_is_kept(tmp_path, rows):
    model = trainable()
    seen = []
    history = train(
        model, rows, training_settings(steps=30, warmup=5, lr=1e-2), folder=tmp_path, seed=0, track=seen.append
    )
    assert history.rows == seen and history.steps == 30
    assert seen[-1]["train/loss"] < seen[0]["train/loss"] - 0.3
    assert not any(m._forward_pre_hooks for m in model.modules())  # dropout is gone


def test_accumulation_equals_one_large_batch(tmp_path, rows):
    whole, parts = trainable(), trainable()
    train(whole, rows, training_settings(micro_batch=4, dropout=0.0), folder=tmp_path / "a", seed=0)
    train(parts, rows, training_settings(micro_batch=1, dropout=0.0), folder=tmp_path / "b", seed=0)
    torch.testing.assert_close(weights(whole), weights(parts), rtol=1e-4, atol=1e-5)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("killed_after", [5, 8, 11])
def test_killed_and_resumed_ends_with_the_same_bits(tmp_path, rows, killed_after):
    """Dropout draws random numbers at every step, so the random state must come back too."""
    reference = trainable()
    train(reference, rows, training_settings(), folder=tmp_path / "a", seed=0)

    def kill(step):
        if step + 1 == killed_after:
            raise Killed

    with pytest.raises(Killed):
        train(trainable(), rows, training_settings(), folder=tmp_path / "b", seed=0, after_step=kill)
    again = trainable(seed=7)  # what it starts from must not matter
    history = train(again, rows, training_settings(), folder=tmp_path / "b", seed=0)
    assert history.resumed_at == (killed_after - 1) // 4 * 4  # killed before that step's own checkpoint
    assert torch.equal(weights(reference), weights(again))


def test_a_half_written_checkpoint_is_not_read(tmp_path, rows):
    train(trainable(), rows, training_settings(steps=9), folder=tmp_path, seed=0)
    (tmp_path / ".step-99.partial").mkdir()
    (tmp_path / ".step-99.partial" / "model.safetensors").write_bytes(b"half")
    history = train(trainable(), rows, training_settings(steps=12), folder=tmp_path, seed=0)
    assert history.resumed_at == 8


def test_divergence_names_the_step_and_keeps_the_checkpoint(tmp_path, rows):
    calls = {"n": 0}

    def loss(module, batch):
        calls["n"] += 1
        value = module(input_ids=batch, use_cache=False).logits.float().square().mean()
        return value * (math.nan if calls["n"] > 12 else 1.0)  # two passes per step: the seventh step

    with pytest.raises(Diverged, match="the loss is nan at step 6"):
        train(trainable(), rows, training_settings(), folder=tmp_path, seed=0, loss=loss)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-4"]


def test_a_loss_far_above_the_first_is_divergence(tmp_path, rows):
    calls = {"n": 0}

    def loss(module, batch):
        calls["n"] += 1
        value = module(input_ids=batch, use_cache=False).logits.float().square().mean()
        return value * 0 + (9.0 if calls["n"] > 12 else 1.0)

    with pytest.raises(Diverged, match="the loss is 9 at step 6, 1 at first"):
        train(trainable(), rows, training_settings(), folder=tmp_path, seed=0, loss=loss)


class L1:
    """A penalty on one layer's output, for the test."""

    def __init__(self, layer: nn.Module, scale: float):
        self.scale, self.seen = scale, None
        layer.register_forward_hook(lambda m, a, out: setattr(self, "seen", out))

    def coefficient(self, step):
        return self.scale

    def value(self):
        return self.seen.abs().mean()

    def stats(self):
        return {"mean": float(self.seen.detach().abs().mean())}


def test_penalty_pushes_and_coefficient_zero_changes_nothing(tmp_path, rows):
    def run(scale, name):
        model = trainable()
        penalty = None if scale is None else L1(model.model.layers[0].mlp.down_proj, scale)
        history = train(
            model,
            rows,
            training_settings(steps=40, lr=1e-2, dropout=0.0, clip=None),
            folder=tmp_path / name,
            seed=0,
            penalty=penalty,
        )
        return model, history

    plain, _ = run(None, "a")
    zero, with_stats = run(0.0, "b")
    _, history = run(3.0, "c")
    assert torch.equal(weights(plain), weights(zero))
    assert history.rows[-1]["train/penalty"] < 0.5 * with_stats.rows[-1]["train/penalty"]
    assert history.rows[-1]["train/lambda"] == 3.0


def test_vectors_are_not_decayed(tmp_path, rows):
    model = trainable()
    train(
        model, rows, training_settings(weight_decay=0.9, lr=1e-1, min_lr=1e-1, schedule="constant", steps=6, warmup=0, dropout=0.0),
        folder=tmp_path, seed=0, loss=lambda m, b: 0 * m(input_ids=b, use_cache=False).logits.sum(),
    )  # fmt: skip
    assert torch.equal(model.model.norm.weight, torch.ones(64))
    assert float(model.lm_head.weight.abs().mean()) < float(tiny_model(layers=1).lm_head.weight.abs().mean()) * 0.7
