"""Predictors of active neurons: labels, measures, what they cost, and the approximate model they make."""

import pytest
import torch

from sparsebench import config, kernels
from sparsebench.config.compose import compose_all
from sparsebench.measure import macs, quality, sparsity
from sparsebench.methods.prosparse import predictor
from sparsebench.models import Loaded
from sparsebench.modules.activations import FATReLU
from sparsebench.modules.neuron_sparse import NeuronSparseFFN, swap
from sparsebench.records import state
from sparsebench.sites import find_blocks
from tests.helpers import CPU_KERNELS, KINDS, accounted, tiny_model, tiny_tokenizer, work

data = KINDS["language"].data

SETTINGS = {
    "rank": 32, "tokens": 512, "epochs": 10, "patience": 10, "batch_size": 64, "lr": 1e-2, "weight_decay": 0.0,
    "held_out": 0.25, "target_recall": 1.0,
}  # fmt: skip


QUICK = [
    "method.train.steps=6", "method.stages=[1,2,4,6]", "method.lambdas=[0,1,8,8]", "method.train.warmup=1",
    "method.train.precision=no", "method.dev_sequences=8", "method.train.log_every=2",
]  # fmt: skip


def settings(**changes):
    return predictor.Settings(**{**SETTINGS, **changes})


def test_measures_by_hand():
    class Fixed(predictor.Predictor):
        def forward(self, x):
            return x > 0

    one = Fixed(torch.zeros(1, 4), torch.zeros(4, 1), torch.zeros(1), torch.zeros(4))
    x = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, -1.0, -1.0]])
    active = torch.tensor([[True, False, True, False], [True, False, False, False]])
    actual = predictor.measures(one, x, active)
    assert actual == {"recall": 2 / 3, "predicted_sparsity": 1 - 3 / 8, "sparsity": 1 - 3 / 8}


def test_labels_are_all_active_neurons_negative_products_included():
    model = tiny_model(layers=1)
    (block,) = find_blocks(model)
    ffn = swap(model, block, FATReLU())
    rows = data().fit.sequences(4)
    x, active = predictor.pairs(model, [block], rows, 2)[0]
    gate, up = x @ ffn.map("gate").weight.t(), x @ ffn.map("up").weight.t()
    assert active.shape == (4 * 32, 160)
    assert torch.equal(active, (gate.relu() * up) != 0)
    assert active[(gate > 0.1) & (up < -0.1)].all()


def test_learns_a_rule_it_can_express():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 16, generator=generator)
    active = x @ torch.randn(16, 40, generator=generator) > 1.5
    one, record = predictor.train_one(x, active, settings(epochs=20), seed=0)
    assert record["recall"] > 0.9 and record["predicted_sparsity"] > 0.5 * record["sparsity"]
    again, _ = predictor.train_one(x, active, settings(epochs=20), seed=0)
    assert torch.equal(one.first, again.first)


def test_the_epoch_with_the_best_held_out_recall_is_kept(monkeypatch):
    """Recall rises, then falls: neither the last epoch nor one judged on rows that were trained on."""
    generator = torch.Generator().manual_seed(0)
    x, active = torch.randn(400, 16, generator=generator), torch.rand(400, 40, generator=generator) > 0.7
    recalls, at_epoch = [0.2, 0.8, 0.5, 0.4], []

    def scripted(one, rows, labels):
        assert torch.equal(rows, x[300:]) and torch.equal(labels, active[300:])
        at_epoch.append(one.first.detach().clone())
        return {"recall": recalls[len(at_epoch) - 1], "predicted_sparsity": 0.5, "sparsity": 0.7}

    monkeypatch.setattr(predictor, "measures", scripted)
    one, actual = predictor.train_one(x, active, settings(epochs=4), seed=0)
    assert (actual["recall"], actual["epoch"]) == (0.8, 1)
    assert torch.equal(one.first, at_epoch[1]) and not torch.equal(one.first, at_epoch[3])


def test_a_perfect_predictor_changes_nothing_and_a_blind_one_silences_the_ffn():
    model = tiny_model(layers=1)
    (block,) = find_blocks(model)
    ffn = swap(model, block, FATReLU())
    x = torch.randn(2, 5, 64)
    exact = ffn(x)
    ffn.predictor = lambda x: torch.ones(*x.shape[:-1], 160, dtype=torch.bool)
    assert torch.equal(ffn(x), exact)
    ffn.predictor = lambda x: torch.zeros(*x.shape[:-1], 160, dtype=torch.bool)
    assert not ffn(x).any()


def test_approximate_prosparse(tmp_path):
    """From fit to a model with predictors: measures reported, r (d + f) MACs per layer counted as overhead."""
    overrides = ["method.predictor={" + ",".join(f"{k}:{v}" for k, v in SETTINGS.items()) + "}"]
    given = ["method=prosparse", "hardware=cpu", *QUICK, *overrides]
    method = config.build_settings(compose_all(given)[0]).method
    state = method.fit(Loaded(tiny_model(), tiny_tokenizer(), {}), data(), work(tmp_path))
    report = state.info["extra"]["predictor"]
    assert 0 <= report["recall"] <= 1 and 0 <= report["predicted_sparsity"] <= 1 and len(report["per_layer"]) == 2
    method.approximate = True
    model = method.apply(tiny_model(), state, work(tmp_path))
    ffns = [m for m in model.modules() if isinstance(m, NeuronSparseFFN)]
    assert all(m.predictor is not None for m in ffns) and len(find_blocks(model)) == 2
    _, counters = quality.language_quality(model, data().test, None, 4)
    measured = sparsity.summarise(model, counters)
    costs, _ = accounted(macs.dense_sites(tiny_model()), model, measured, 8, True)
    assert costs["overhead"] == 2 * 32 * (64 + 160)
    assert set(measured) == {f"{i}.{role}" for i in range(2) for role in ("gate", "up", "down")}
    kept = {site: 1 - share.sparsity for site, share in measured.items()}
    assert kept["0.gate"] >= kept["0.up"] == kept["0.down"]
    executed = sum(64 * 160 * share for share in kept.values()) + costs["overhead"]
    attention = sum(c.dense_macs for s, c in macs.dense_sites(tiny_model()).items() if s.partition(".")[2] in "qkvo")
    rest = costs["parts"]["head"] + costs["parts"]["attention"]
    assert costs["executed"] - rest - attention == pytest.approx(executed)
    with torch.no_grad():
        one = model(input_ids=torch.tensor([[5]]), use_cache=False).logits
        assert torch.isfinite(one).all()
    method.approximate = False
    exact = method.apply(tiny_model(), state, work(tmp_path))
    _, counters = quality.language_quality(exact, data().test, None, 4)
    for site, share in sparsity.summarise(exact, counters).items():
        assert share.sparsity <= measured[site].sparsity + 0.02  # predictors only switch off more


def test_predictors_are_of_the_threshold_in_use(tmp_path):
    """Another threshold is another state (its key says so), and a state's predictors serve no other threshold."""
    predictor = "method.predictor={" + ",".join(f"{k}:{v}" for k, v in SETTINGS.items()) + "}"
    given = ["method=prosparse", "hardware=cpu", *QUICK, predictor, "method.thresholds=[0.3]",
             "method.threshold_tolerance=1e9"]  # fmt: skip
    variants = {
        "exact": ["method.threshold=0"], "own": ["method.approximate=true"],
        "zero": ["method.approximate=true", "method.threshold=0"],
    }  # fmt: skip
    keys, fits = {}, {}
    for name, more in variants.items():
        (composed,) = compose_all([*given, *more])
        settings = config.build_settings(composed)
        keys[name] = state.key(settings, composed, {"versions": {}})
        loaded = Loaded(tiny_model(), tiny_tokenizer(), {})
        fits[name] = settings.method, settings.method.fit(loaded, data(), work(tmp_path / name))
    assert keys["exact"] == keys["own"] != keys["zero"]
    assert [actual.info["predictor_threshold"] for _, actual in fits.values()] == [0.3, 0.3, 0.0]
    with pytest.raises(ValueError, match=r"threshold must be 0.3 with this state's predictors, got 0"):
        fits["zero"][0].apply(tiny_model(), fits["own"][1], work(tmp_path))
    assert fits["zero"][0].apply(tiny_model(), fits["zero"][1], work(tmp_path)) is not None


@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_one_token_reads_only_predicted_rows(kernel):
    """The kernel's path against masks; a gate row that is not predicted is never read (NaN there stays unseen)."""
    model = tiny_model(layers=1)
    (block,) = find_blocks(model)
    ffn = swap(model, block, FATReLU(), kernel=kernel, predictor=predictor.initial(64, 8, 160, 0).requires_grad_(False))
    x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(4))
    expected = ffn(x.expand(1, 2, 64))[:, :1].detach()
    wanted = ffn.predictor(x)[0, 0]
    assert 0.2 < float(wanted.float().mean()) < 0.8
    with torch.no_grad():
        torch.testing.assert_close(ffn(x), expected, rtol=1e-4, atol=1e-4)
        if kernels.load(kernel).SKIPS:
            ffn.map("gate").weight[~wanted] = torch.nan
            torch.testing.assert_close(ffn(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [0, 1.5])
def test_bad_settings(value):
    from sparsebench import config

    with pytest.raises(config.ConfigError, match="method.predictor.target_recall must be a number in"):
        config.build_settings(compose_all(["method=prosparse", f"method.predictor.target_recall={value}"])[0])
