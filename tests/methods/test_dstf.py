"""DSTF's faithfulness checks (docs/methods/dstf.md, Faithfulness checks; the number of each check stands in its docstring)."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsebench import config
from sparsebench.config.compose import compose_all
from sparsebench.measure import effective_macs, quality
from sparsebench.methods import fatrelu
from sparsebench.methods.dstf import penalties
from sparsebench.methods.dstf.method import DSTF
from sparsebench.methods.dstf.penalties import MapPenalty, WeightMasks, magnitude_masks, squared_hoyer, transformed_l1
from sparsebench.models import Loaded
from sparsebench.modules.activation_map import maps_of
from sparsebench.records import state
from sparsebench.tasks import image_classification
from sparsebench.training.loop import Diverged, classification_loss, train
from tests.helpers import TinyCNN, tiny_cnn, tiny_images, work

VALUES = torch.tensor([0.1, 0.5, 1.0, 2.0, 10.0])


def method(*overrides, **train_changes) -> DSTF:
    quick = {"steps": 20, "batch_size": 8, "micro_batch": 8, "lr": 0.02, **train_changes}
    given = [f"method.train.{k}={v}" for k, v in quick.items()]
    base = ["method.strengths=[0.1,1.0]", "method.l1_steps=5", "method.finetune_steps=10"]
    return config.build_settings(
        compose_all(["model=lenet5", "method=dstf", "hardware=cpu", *base, *given, *overrides])[0]
    ).method


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict:
    """State dict of a network that has learnt the tiny images."""
    module = tiny_cnn().requires_grad_(True)
    settings = method(steps=80).train
    train(module, tiny_images().fit, settings, folder=tmp_path_factory.mktemp("t"), seed=0, loss=classification_loss)
    return module.state_dict()


def network(trained):
    module = tiny_cnn()
    module.load_state_dict(trained)
    return module


def fitted(dstf, trained, folder):
    return dstf.fit(Loaded(network(trained), None, {}), tiny_images(), work(folder))


@pytest.mark.parametrize("beta", [1e-3, 0.1, 1.0, 7.0, 1e3])
def test_transformed_l1_is_0_at_0_and_1_at_1_and_bounded(beta):
    """Check 1."""
    assert float(transformed_l1(torch.tensor([0.0]), beta)) == 0
    assert float(transformed_l1(torch.tensor([-1.0]), beta)) == pytest.approx(1, rel=1e-6)
    assert float(transformed_l1(torch.tensor([1e6]), beta)) <= (1 + beta) * (1 + 1e-6)


def test_transformed_l1_values_and_limits():
    """Check 1."""
    for a, expected in ((0.5, 0.6667), (2.0, 1.3333), (10.0, 1.8182)):
        assert float(transformed_l1(torch.tensor([a]), 1.0)) == pytest.approx(expected, abs=1e-4)
    for a in VALUES:
        assert float(transformed_l1(a, 1e4)) == pytest.approx(float(a), abs=1e-2)
        assert float(transformed_l1(a, 1e-4)) == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_gradient(beta):
    """Check 2."""
    a = VALUES.double().requires_grad_(True)
    transformed_l1(a, beta).backward()
    torch.testing.assert_close(a.grad, beta * (1 + beta) / (beta + VALUES.double()) ** 2, rtol=1e-5, atol=0)


def test_no_gradient_through_a_closed_relu_and_dead_units_are_logged():
    """Check 2, second half."""
    x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    transformed_l1(F.relu(x), 1.0).backward()
    assert x.grad[:2].tolist() == [0, 0] and x.grad[2] > 0
    module = tiny_cnn()
    module.get_submodule("bn1").bias[:4] = -100.0  # half of the first map's channels never fire
    penalty = MapPenalty(module, lambda a: transformed_l1(a, 1.0), 1.0)
    module.train()
    module(torch.randn(6, 1, 8, 8))
    maps = {layer.site: layer for layer in maps_of(module)}
    units = sum(float(fired.numel()) for fired in penalty.active.values())
    silent = sum(int((~fired).sum()) for fired in penalty.active.values())
    stats = penalty.stats()
    assert len(maps) == 3 and stats["dead_units"] == pytest.approx(silent / units) and silent >= 4 * 64
    assert stats["map_zeros"] > 0.2


def reg(name, x, **kwargs):
    module = nn.Sequential()
    penalty = MapPenalty(module, penalties.regulariser(name, 1.0), 1.0, **kwargs)
    penalty.maps = {"a": x}
    return float(penalty.value())


@pytest.mark.parametrize("name", penalties.NAMES)
@pytest.mark.parametrize("norm", ["per_sample_sum", "per_element"])
def test_duplicating_the_batch_changes_nothing(name, norm):
    """Check 3. (Hoyer per element is no mean over images: it is divided by N only.)"""
    a = torch.rand(4, 3, 5, 5)
    assert reg(name, torch.cat([a, a]), norm=norm) == pytest.approx(reg(name, a, norm=norm), rel=1e-5)


def test_scaling_changes_tl1_and_l1_but_not_hoyer():
    """Check 3."""
    a = torch.rand(4, 3, 5, 5)
    assert reg("hoyer", 3 * a) == pytest.approx(reg("hoyer", a), rel=1e-4)
    assert reg("l1", 3 * a) == pytest.approx(3 * reg("l1", a), rel=1e-5)
    assert reg("tl1", a) < reg("tl1", 3 * a) < 3 * reg("tl1", a)


def test_squared_hoyer():
    """Check 4; an all-zero map gives 0, not NaN."""
    assert float(squared_hoyer(F.one_hot(torch.tensor(3), 9))) == pytest.approx(1)
    assert float(squared_hoyer(torch.full((12,), 0.3))) == pytest.approx(12, rel=1e-5)
    zero = torch.zeros(4, requires_grad=True)
    squared_hoyer(zero).backward()
    assert float(squared_hoyer(zero.detach())) == 0 and torch.isfinite(zero.grad).all()


def test_weights_of_maps_and_per_layer_balance(trained, tmp_path):
    """Per-layer alphas: each map has the same share of the penalty where stage 3 starts."""
    data, w = tiny_images(), work(tmp_path)
    dstf = method("method.per_layer=true")
    (strength, alpha), *_ = (pairs := dstf.coefficients(network(trained), data, w))[0]
    _, weights, scale = pairs
    shares = [weights[site] * scale["penalty"][site] for site in weights]
    assert shares == pytest.approx([1 / 3] * 3) and alpha == pytest.approx(strength * scale["cross_entropy"])
    alphas, none, scale = method().coefficients(network(trained), data, w)
    assert none is None
    for strength, alpha in alphas:
        assert alpha * sum(scale["penalty"].values()) == pytest.approx(strength * scale["cross_entropy"])


def test_finding_the_coefficients_leaves_the_network_alone(trained, tmp_path):
    module = network(trained)
    before = copy.deepcopy(module.state_dict())
    method().coefficients(module, tiny_images(), work(tmp_path))
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items()) and not module.training
    assert not any(m._forward_hooks for m in module.modules())


def test_one_alpha_per_map_by_hand(trained, tmp_path):
    pairs, weights, _ = method("method.alpha=[0.1,0.0,0.3]").coefficients(
        network(trained), tiny_images(), work(tmp_path)
    )
    assert pairs == [(None, 1.0)] and list(weights.values()) == [0.1, 0.0, 0.3]
    with pytest.raises(ValueError, match=r"method.alpha must list 3 numbers \(relu, relu.2, relu_2\), got 2"):
        method("method.alpha=[0.1,0.2]").coefficients(network(trained), tiny_images(), work(tmp_path))


def test_masks_are_the_same_after_stage_3_and_pruned_weights_are_0(trained, tmp_path):
    """Check 7."""
    fit = fitted(method("method.weight_sparsity=0.6"), trained, tmp_path)
    stage2 = state.read(tmp_path / "weights-finetune.safetensors")
    masks = {k.removeprefix("mask."): v for k, v in fit.tensors.items() if k.startswith("mask.")}
    assert set(masks) == {"conv1.weight", "conv2.weight", "conv3.weight", "head.weight"}
    total = sum(m.numel() for m in masks.values())
    assert sum(int((~m).sum()) for m in masks.values()) == round(0.6 * total)
    sparse = method().apply(tiny_cnn(), fit, work(tmp_path))
    for name, mask in masks.items():
        assert torch.equal(stage2.tensors[name] != 0, mask)
        weight = sparse.get_parameter(name)
        assert torch.equal(weight != 0, mask) and float(weight[~mask].abs().sum()) == 0
        assert not torch.equal(stage2.tensors[name], weight)  # stage 3 did train
    assert effective_macs.weight_sparsity(sparse) == pytest.approx(0.6, abs=0.01)


def test_masks_drop_gradients_too():
    """Check 7: with momentum and decay a pruned weight would come back."""
    module = tiny_cnn().requires_grad_(True)
    masks, tau = magnitude_masks(module, 0.5)
    kept = WeightMasks(module, masks)
    module(torch.randn(2, 1, 8, 8)).sum().backward()
    weights = penalties.product_weights(module)
    for name, mask in masks.items():
        assert float(weights[name].grad[~mask].abs().sum()) == 0 and float(weights[name].grad[mask].abs().sum()) > 0
        assert bool((weights[name][mask].abs() > tau).all())
    kept.remove()


def test_alpha_0_is_plain_fine_tuning_bit_for_bit(trained, tmp_path):
    """Check 8."""
    dstf = method("method.alpha=0.0", "method.stages=activation")
    fit = fitted(dstf, trained, tmp_path / "a")
    plain = network(trained).requires_grad_(True)
    train(plain, tiny_images().fit, dstf.train, folder=tmp_path / "b", seed=0, loss=classification_loss)
    assert all(torch.equal(fit.tensors[k], v) for k, v in plain.state_dict().items())
    overrides = ("method.stages=finetune", "method.alpha=0.0", "method.l1_steps=0", "method.finetune_steps=0")
    control = fitted(method(*overrides), trained, tmp_path / "c")
    assert all(torch.equal(control.tensors[k], v) for k, v in plain.state_dict().items())


def test_the_control_has_the_steps_and_candidates_of_dual(trained, tmp_path, monkeypatch):
    """As many optimiser steps and as many trainings to choose from, and no two candidates alike."""
    taken = {}

    def counted(module, rows, settings, *, folder, seed, **arguments):
        taken[variant].append((folder.name, settings.steps, seed))
        return train(module, rows, settings, folder=folder, seed=seed, **arguments)

    monkeypatch.setattr("sparsebench.methods.dstf.method.train", counted)
    for variant in ("dual", "finetune"):
        taken[variant] = []
        actual = fitted(method(f"method.stages={variant}"), trained, tmp_path / variant).info["extra"]["dstf"]["search"]
        assert len([r for r in actual if r["stage"] == 3]) == 2
    assert (
        sum(steps for _, steps, _ in taken["dual"])
        == sum(steps for _, steps, _ in taken["finetune"])
        == 5 + 10 + 2 * 20
    )
    assert taken["finetune"] == [("control", 15, 0), ("control-0", 20, 0), ("control-1", 20, 1)]


def test_the_sparsest_admissible_strength_is_chosen(trained, tmp_path):
    fit = fitted(method("method.strengths=[30,3000,1.0e+7]", "method.stages=activation", steps=60), trained, tmp_path)
    rows = [r for r in fit.info["extra"]["dstf"]["search"] if r["stage"] == 3]
    baseline = fit.info["extra"]["dstf"]["search"][0]["accuracy"]
    finished = [r for r in rows if not r.get("diverged")]
    assert all(r["admissible"] == (r["accuracy"] >= baseline) for r in finished)
    (chosen,) = [r for r in rows if r.get("chosen")]
    assert chosen["map_sparsity"] == max(r["map_sparsity"] for r in finished if r["admissible"])
    assert len(finished) < 3 or not rows[2]["admissible"]  # a penalty that leaves nothing of the task


@pytest.fixture(scope="module")
def control(trained, tmp_path_factory):
    """The last row of the search after plain fine-tuning."""
    folder = tmp_path_factory.mktemp("control")
    return fitted(method("method.stages=finetune", steps=60), trained, folder).info["extra"]["dstf"]["search"][-1]


@pytest.mark.parametrize("name", penalties.NAMES)
def test_each_regulariser_makes_maps_sparser(name, trained, control, tmp_path):
    """Check 9 in small: at 1e5 times the (tiny) cross-entropy on dev every regulariser beats plain fine-tuning's zeros, at
    the accuracy of both within 0.1 points. Which of them leaves the most is what the paper claims (claims/dstf_tl1)."""
    overrides = (f"method.regulariser={name}", "method.stages=activation", "method.strengths=[1.0e+5]")
    actual = fitted(method(*overrides, steps=60), trained, tmp_path / name).info["extra"]["dstf"]["search"][-1]
    assert actual["map_sparsity"] > control["map_sparsity"] + 0.2
    assert actual["accuracy"] == pytest.approx(control["accuracy"], abs=0.001)


def test_variants_train_what_they_say(trained, tmp_path):
    only_weights = fitted(method("method.stages=weight"), trained, tmp_path / "w")
    assert [r["stage"] for r in only_weights.info["extra"]["dstf"]["search"]] == [1, 2]
    only_maps = fitted(method("method.stages=activation"), trained, tmp_path / "a")
    assert not any(k.startswith("mask.") for k in only_maps.tensors)
    assert effective_macs.weight_sparsity(method().apply(tiny_cnn(), only_maps, work(tmp_path))) == 0


def test_a_killed_fit_goes_on_and_ends_with_the_same_bits(trained, tmp_path, monkeypatch):
    reference = fitted(method(), trained, tmp_path / "a")
    calls = {"n": 0}
    right = WeightMasks.apply

    def dying(self, step=0):
        calls["n"] += 1
        if calls["n"] == 30:
            raise KeyboardInterrupt
        right(self, step)

    monkeypatch.setattr(WeightMasks, "apply", dying)
    with pytest.raises(KeyboardInterrupt):
        fitted(method(), trained, tmp_path / "b")
    monkeypatch.setattr(WeightMasks, "apply", right)
    again = fitted(method(), trained, tmp_path / "b")
    assert all(torch.equal(reference.tensors[k], again.tensors[k]) for k in reference.tensors)


def test_map_sparsity_is_counted_in_eval_mode_by_exact_zeros(trained):
    """Check 10: pooled and layer-mean by hand; a tiny positive value is no zero."""
    module, data = network(trained), tiny_images()
    _, maps = quality.classification_quality(module, data.test, None, 16)
    actual = image_classification.shares(maps)
    seen = {}
    for layer in maps_of(module):
        layer.register_forward_hook(lambda m, _, y: seen.__setitem__(m.site, y))
    batch = next(data.test.batches(None, 1000, "cpu"))
    with torch.no_grad():
        module(batch.inputs)
    zeros = {site: float((y == 0).float().mean()) for site, y in seen.items()}
    assert {s: v["sparsity"] for s, v in actual["per_site"].items()} == pytest.approx(zeros)
    assert actual["layer_mean"] == pytest.approx(sum(zeros.values()) / 3)
    elements = sum(y.numel() for y in seen.values())
    assert actual["model_wide"] == pytest.approx(sum(zeros[s] * y.numel() for s, y in seen.items()) / elements)
    assert actual["model_wide"] != pytest.approx(actual["layer_mean"], abs=1e-3)
    layer = next(maps_of(tiny_cnn()))
    layer.counter = layer.new_counter()
    layer(torch.tensor([[1e-30, 0.0, -1.0, 5.0]]))
    assert layer.counter.zeros == 2 and layer.counter.elements == 4


def test_dropout_is_off_when_dev_is_scored(trained, tmp_path):
    """Check 10: training mode is left before scoring, so two scores agree."""
    module, dstf = network(trained), method()
    module.train()
    first = dstf.score(module, tiny_images(), work(tmp_path))
    assert not module.training and first == dstf.score(module, tiny_images(), work(tmp_path))


def test_fatrelu_keeps_the_last_threshold_that_passed_and_the_global_budget(trained):
    module, data = network(trained), tiny_images()

    def accuracy():
        return quality.classification_quality(module, data.dev, None, 16)[0]["accuracy"]

    start = accuracy()
    actual = fatrelu.search(module, accuracy, budget=0.1, upper=1.0, tolerance=1e-3)
    assert {m.site: m.threshold for m in maps_of(module)} == actual
    assert accuracy() >= start - 0.1 and any(t > 0 for t in actual.values())
    for layer in maps_of(module):  # where bisection stopped short of the end, a little more costs too much
        if actual[layer.site] < 1.0:
            assert actual[layer.site] == pytest.approx(round(actual[layer.site] * 1024) / 1024)


@pytest.mark.parametrize("limit", [0.1, 0.3, 0.55, 0.8])
def test_fatrelu_bisects_to_a_known_threshold(limit):
    """One map, accuracy falls to 0 above t: the search ends just below, and that threshold stays, not the last tried."""
    module, tried = tiny_cnn(), []
    layer = next(maps_of(module))

    def accuracy():
        tried.append(layer.threshold or 0)
        return 1.0 if tried[-1] <= limit else 0.0

    actual = fatrelu.search(module, accuracy, budget=0.0, upper=1.0, tolerance=1e-3)
    assert limit - 1e-3 <= actual[layer.site] <= limit
    assert {m.site: m.threshold for m in maps_of(module)} == actual
    assert actual[layer.site] == max(t for t in tried if t <= limit)


def test_fatrelu_keeps_values_at_the_threshold():
    layer = next(maps_of(tiny_cnn()))
    layer.threshold = 0.5
    assert layer(torch.tensor([[-1.0, 0.25, 0.5, 0.75]])).tolist() == [[0.0, 0.0, 0.5, 0.75]]


def test_fatrelu_after_stage_3(trained, tmp_path):
    fit = fitted(method("method.fatrelu_budget=0.2", "method.stages=activation"), trained, tmp_path)
    sparse = method().apply(tiny_cnn(), fit, work(tmp_path))
    assert {m.site: m.threshold for m in maps_of(sparse)} == fit.info["thresholds"]


def test_everything_diverging_is_an_error_that_names_the_setting(trained, tmp_path):
    with pytest.raises(Diverged, match=r"method\.strengths"):
        fitted(method("method.stages=activation", "method.strengths=[1.0e9]", steps=40, lr=5.0), trained, tmp_path)


def test_settings_that_contradict_each_other():
    with pytest.raises(config.ConfigError) as error:
        method("method.strengths=[]")
    assert error.value.problems == ["method.strengths must hold at least one number where method.alpha is null, got []"]
    with pytest.raises(config.ConfigError, match="method=dstf needs a network with ReLU maps, got model=vit-tiny"):
        method("model=vit-tiny")
    with pytest.raises(config.ConfigError, match=r"method.l1_steps must be above train.warmup=10, got 5"):
        method("method.train.warmup=10")


def test_bf16_model_is_trained_in_float32_and_applied_in_bf16(trained, tmp_path):
    fit = method().fit(Loaded(network(trained).to(torch.bfloat16), None, {}), tiny_images(), work(tmp_path))
    assert fit.tensors["conv1.weight"].dtype == torch.float32
    sparse = method().apply(tiny_cnn().to(torch.bfloat16), fit, work(tmp_path))
    assert sparse.get_parameter("conv1.weight").dtype == torch.bfloat16
    assert dataclasses.is_dataclass(method()) and isinstance(TinyCNN(), nn.Module)
