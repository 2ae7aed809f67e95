"""The training loop: schedules, resuming bit for bit, divergence, the gradient it takes."""

import errno
import json
import math
import os
import random
import shutil
import signal

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from sparsebench.records import stopping
from sparsebench.training import loop
from sparsebench.training.loop import Diverged, Order, train
from tests.helpers import EVIL_VALUES, tiny_model, training_settings, variants


def trainable(seed=0):
    return tiny_model(seed=seed, layers=1).requires_grad_(True)


def windows():
    return torch.randint(0, 320, (10, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def rows():
    return windows()


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
    actual = pick(0, 30).view(3, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in actual)
    assert not torch.equal(actual[0], actual[1])
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


@pytest.mark.parametrize("told_at", [3, 7, 12])
def test_told_to_stop_it_ends_the_step_and_keeps_it(tmp_path, rows, listening, told_at):
    """Before: SIGTERM ended training with nothing kept but the last periodic checkpoint, 12 being the very end."""
    reference = trainable()
    train(reference, rows, training_settings(), folder=tmp_path / "a", seed=0)

    def tell(step):
        if step + 1 == told_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(stopping.Stopped, match=rf"told to stop by SIGTERM; the checkpoint of step {told_at} of train"):
        train(trainable(), rows, training_settings(), folder=tmp_path / "b", seed=0, before_step=tell)
    stopping.told = stopping.Told()
    again = trainable(seed=7)
    assert train(again, rows, training_settings(), folder=tmp_path / "b", seed=0).resumed_at == told_at
    assert torch.equal(weights(reference), weights(again))


def test_a_disk_that_is_full_in_the_middle_of_a_checkpoint(tmp_path, rows, monkeypatch):
    """One line says so, the checkpoint before is kept, the half of the new one is gone; with space it goes on."""
    save = Accelerator.save_state

    def full(self, folder, **options):
        save(self, folder, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill(step):
        if step == 5:
            monkeypatch.setattr(Accelerator, "save_state", full)

    with pytest.raises(OSError, match=r"step-8 can't be written, \d+ MB are left on the disk: .*No space left"):
        train(trainable(), rows, training_settings(), folder=tmp_path, seed=0, before_step=fill)
    assert [p.name for p in tmp_path.iterdir()] == ["step-4"]
    monkeypatch.setattr(Accelerator, "save_state", save)
    assert train(trainable(), rows, training_settings(), folder=tmp_path, seed=0).resumed_at == 4


def test_a_half_written_checkpoint_is_not_read(tmp_path, rows):
    train(trainable(), rows, training_settings(steps=9), folder=tmp_path, seed=0)
    (tmp_path / ".step-99.partial").mkdir()
    (tmp_path / ".step-99.partial" / "model.safetensors").write_bytes(b"half")
    history = train(trainable(), rows, training_settings(steps=12), folder=tmp_path, seed=0)
    assert history.resumed_at == 8


def stopped(folder, rows, after, **changes):
    """Train until step `after` is done; checkpoints at 4 and 8 are left."""

    def kill(step):
        if step + 1 == after:
            raise Killed

    with pytest.raises(Killed):
        train(trainable(), rows, training_settings(**changes), folder=folder, seed=0, after_step=kill)


def test_history_before_a_kill_is_kept(tmp_path, rows):
    """Rows and the clip rate of a killed and resumed training are those of one never killed."""
    whole = train(trainable(), rows, training_settings(log_every=2, clip=0.1), folder=tmp_path / "a", seed=0)
    stopped(tmp_path / "b", rows, 11, log_every=2, clip=0.1)
    resumed = train(trainable(), rows, training_settings(log_every=2, clip=0.1), folder=tmp_path / "b", seed=0)
    assert resumed.resumed_at == 8 and len(resumed.rows) == len(whole.rows) == 6

    def facts(history):
        return [{k: r[f"train/{k}"] for k in ("step", "loss", "lr", "clip_rate")} for r in history.rows]

    assert facts(resumed) == facts(whole)


@pytest.mark.parametrize(("first", "resumed", "last", "diverges"), [(1.0, 20.0, 20.0, True), (20.0, 1.0, 10.0, False)])
def test_the_guard_remembers_the_first_loss_across_a_kill(tmp_path, rows, first, resumed, last, diverges):
    """Losses of steps 0 to 7, of step 8, where the killed training goes on, and of the rest.

    A guard that starts anew at step 8 would let the first case end (20 is below 61) and the second fail (10 above 4).
    """

    def attempt(kill):
        now = {"step": 0}

        def before(step):
            now["step"] = step
            if kill and step == 8:
                raise Killed

        def loss(module, batch):
            value = first if now["step"] < 8 else resumed if now["step"] == 8 else last
            return 0 * module(input_ids=batch, use_cache=False).logits.sum() + value

        return train(trainable(), rows, training_settings(), folder=tmp_path, seed=0, loss=loss, before_step=before)

    with pytest.raises(Killed):
        attempt(kill=True)
    if diverges:
        with pytest.raises(Diverged, match="the loss is 20 at step 8, 1 at first"):
            attempt(kill=False)
    else:
        history = attempt(kill=False)
        assert (history.resumed_at, history.first_loss, history.steps) == (8, 20.0, 12)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(folder of a training killed in its 11th step, weights that it ends with when it is never killed)."""
    rows, folder = windows(), tmp_path_factory.mktemp("killed")
    stopped(folder, rows, 11)
    reference = trainable()
    train(reference, rows, training_settings(), folder=folder.with_name("reference"), seed=0)
    return folder, weights(reference)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "missing", "no checksums"])
def test_a_damaged_checkpoint_is_left_for_the_one_before(killed, tmp_path, rows, caplog, damage):
    folder = shutil.copytree(killed[0], tmp_path / "b")
    assert {p.name for p in folder.iterdir()} == {"step-4", "step-8"}
    file = folder / "step-8" / ("sha256.json" if damage == "no checksums" else "optimizer.bin")
    content = file.read_bytes()
    file.unlink()
    if damage in ("cut", "empty", "flipped"):
        flipped = content[:50] + bytes([content[50] ^ 1]) + content[51:]
        file.write_bytes({"cut": content[:-100], "empty": b"", "flipped": flipped}[damage])
    again = trainable(seed=7)
    history = train(again, rows, training_settings(), folder=folder, seed=0)
    assert history.resumed_at == 4 and torch.equal(killed[1], weights(again))
    (line,) = [r.getMessage() for r in caplog.records if "is damaged" in r.getMessage()]
    assert "step-8 is damaged" in line and "\n" not in line


def test_without_a_whole_checkpoint_training_begins_again(killed, tmp_path, rows, caplog):
    folder = shutil.copytree(killed[0], tmp_path / "b")
    for step in (4, 8):
        (folder / f"step-{step}" / "model.safetensors").write_bytes(b"")
    again = trainable()
    history = train(again, rows, training_settings(), folder=folder, seed=0)
    assert history.resumed_at == 0 and torch.equal(killed[1], weights(again))
    assert sum("is damaged" in r.getMessage() for r in caplog.records) == 2


def test_a_checkpoint_of_another_model_fails_one_start_only(tmp_path, rows):
    """Whole, but it can't be loaded: said once, and gone at the next start."""
    stopped(tmp_path, rows, 5)
    other = tiny_model(seed=0, layers=2).requires_grad_(True)
    with pytest.raises(ValueError, match=r"step-4 can't be loaded .* was removed: start again"):
        train(other, rows, training_settings(), folder=tmp_path, seed=0)
    assert train(other, rows, training_settings(), folder=tmp_path, seed=0).resumed_at == 0


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
    sizes = [m.lm_head.weight.detach().abs().mean() for m in (model, tiny_model(layers=1))]
    assert sizes[0] < sizes[1] * 0.7


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_never_gone_on_from(tmp_path, count):
    """Files changed, gone, added, checksums of anything: the one before is taken, or none; nothing ends in a traceback."""
    chance = random.Random(3)

    def whole(step):
        folder = tmp_path / f"step-{step}"
        folder.mkdir()
        for name in ("model.safetensors", "optimizer.bin", loop.PROGRESS):
            (folder / name).write_bytes(f"{name} of {step}".encode())
        (folder / loop.CHECKSUMS).write_text(json.dumps(loop.checksums(folder)))
        return folder

    whole(4)
    sums = json.loads((tmp_path / "step-4" / loop.CHECKSUMS).read_text())
    damaged = variants(sums, count, depth=1)
    for number in range(count):
        assert loop.latest(tmp_path) == 4
        folder = whole(8)
        assert loop.latest(tmp_path) == 8
        how = number % 4
        victim = chance.choice(sorted(folder.iterdir()))
        if how == 0:
            text = next(damaged)[1]
            if text == (folder / loop.CHECKSUMS).read_bytes():
                continue
            (folder / loop.CHECKSUMS).write_bytes(text)
        elif how == 1:
            victim.unlink()
        elif how == 2:
            victim.write_bytes(victim.read_bytes()[:-1] or b"x")
        else:
            (folder / "extra").write_text(str(chance.choice(EVIL_VALUES)).encode("utf-8", "replace").decode())
        assert loop.latest(tmp_path) == 4 and not folder.exists()


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    for name in ("step-007", "step-x", "step-", "step-\u0663", "step-" + "9" * 60):
        (tmp_path / name).mkdir()
    (tmp_path / "step-5").write_text("a file")
    assert loop.latest(tmp_path) == 0 and len(list(tmp_path.iterdir())) == 6
