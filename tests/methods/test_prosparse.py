"""ProSparse: the paper's numbers, and each faithfulness check of its specification."""

import itertools
from pathlib import Path

import pytest
import torch
import yaml

import sparsebench.conf
from sparsebench import config
from sparsebench.config.compose import compose_all
from sparsebench.measure import neurons, quality, sparsity
from sparsebench.methods.prosparse.method import CONTROLS, expected_sparsity, stage_lambda
from sparsebench.models.language import Loaded
from sparsebench.modules import base
from sparsebench.modules.x1 import X1Penalty, l1
from sparsebench.training import finetune
from tests.helpers import KINDS, tiny_model, tiny_tokenizer, work

data = KINDS["language"].data

T7B, L7B = [5000, 6000, 10000, 12000, 16000, 16500], [0, 5e-3, 5e-2, 5e-2, 2e-1, 2e-1]
QUICK = [
    "method.train.steps=6", "method.stages=[1,2,4,6]", "method.lambdas=[0,1,8,8]", "method.train.warmup=1",
    "method.train.precision=no", "method.predictor=null", "method.dev_sequences=8", "method.train.log_every=2",
]  # fmt: skip


def build(*overrides):
    return config.build_settings(compose_all(["method=prosparse", "hardware=cpu", *QUICK, *overrides])[0]).method


def fitted(method, folder, model=None):
    return method.fit(Loaded(model or tiny_model(), tiny_tokenizer(), {}), data(), work(folder))


def test_schedule_of_the_7b_run():
    """Check 1: the vectors, never falling, flat at each T_i."""
    at = {5000: 0, 5001: 5e-3, 6000: 5e-3, 8000: 0.0275, 10000: 0.05, 11000: 0.05, 12000: 0.05, 13000: 0.071967, 14000: 0.125,
          16000: 0.2, 16500: 0.2}  # fmt: skip
    for step, value in at.items():
        assert stage_lambda(step, T7B, L7B) == pytest.approx(value, abs=1e-6), step
    rising = [stage_lambda(t, T7B, L7B) for t in range(1, 16501)]
    assert all(a <= b + 1e-15 for a, b in itertools.pairwise(rising))
    for end in T7B[1:]:
        steepest = max(b - a for a, b in itertools.pairwise(rising[6000:]))
        assert abs(stage_lambda(end, T7B, L7B) - stage_lambda(end - 1, T7B, L7B)) < 0.01 * steepest


@pytest.mark.parametrize("name, steps", [("prosparse_7b", 16500), ("prosparse_13b", 16000), ("prosparse_1b", 101000)])
def test_the_papers_tables_are_experiments(name, steps):
    node = compose_all([f"experiment={name}"])[0]["method"]
    problems = []
    method = config.build(node, "method", problems)
    assert not problems and method.train.steps == method.stages[-1] == steps
    if name == "prosparse_7b":
        assert (method.stages, method.lambdas) == (T7B, L7B)


def test_fit_of_sparsity_against_lambda():
    """Check 7: the specification's values, and the published 7B runs (Tables 1 and 5) within a few points of the fit."""
    for value, share in ((0.01, 78.9), (0.05, 84.0), (0.1, 86.4), (0.2, 88.9), (0.5, 92.2)):
        assert expected_sparsity(value) == pytest.approx(share, abs=0.05)
    for value, share in ((0.2, 88.11), (0.05, 85.95), (0.1, 88.62), (0.5, 93.15)):  # staged; constant
        assert expected_sparsity(value) == pytest.approx(share, abs=2.5)


def test_mean_norm_ignores_duplicates_padding_and_splits():
    """Check 2."""
    x1 = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(0))
    whole = l1(x1, "mean")
    torch.testing.assert_close(l1(torch.cat([x1, x1]), "mean"), whole)
    torch.testing.assert_close(torch.stack([l1(p, "mean") for p in x1.split(2)]).mean(), whole)
    padded, mask = torch.cat([x1, 7 * torch.ones(4, 3, 10)], 1), torch.ones(4, 9, dtype=torch.bool)
    mask[:, 6:] = False
    torch.testing.assert_close(l1(padded, "mean", mask), whole)
    torch.testing.assert_close(l1(x1, "token_sum"), 10 * whole)
    torch.testing.assert_close(l1(x1, "sum1e-8"), x1.abs().sum() * 1e-8)
    assert l1(torch.cat([x1, x1]), "sum1e-8") == pytest.approx(2 * float(l1(x1, "sum1e-8")))


def test_gradient_of_the_penalty():
    """Check 3: sign(x1)/(f N), exactly 0 where the gate is shut; gate and up both learn from it."""
    method = build("method.control=vanilla_relu")
    model = tiny_model(layers=1).requires_grad_(True)
    method.swap(model, 0.0, None)
    seen = {}
    model.model.layers[0].mlp.activation.register_forward_hook(lambda m, a, out: seen.update(gate=out))
    with X1Penalty(model, "mean", lambda step: 1.0) as penalty:
        model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.update(x1=a[0]))
        model(input_ids=torch.arange(24).view(2, 12), use_cache=False)
        seen["x1"].retain_grad()
        penalty.value().backward()
        shares = penalty.stats()
    x1, gate = seen["x1"], seen["gate"]
    torch.testing.assert_close(x1.grad, x1.detach().sign() / x1.numel())
    assert not x1.grad[gate == 0].any()
    mlp = model.model.layers[0].mlp
    assert mlp.gate_proj.weight.grad.any() and mlp.up_proj.weight.grad.any() and mlp.down_proj.weight.grad is None
    assert shares["x1_zero/0"] == pytest.approx(float((x1 == 0).float().mean()))


def test_penalty_is_the_sum_over_layers():
    """The paper's sum over layers, not their mean: lambda means the same whatever the depth."""
    model, seen = tiny_model(layers=3), []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, a: seen.append(a[0].detach()))
    with X1Penalty(model, "mean", lambda step: 1.0) as penalty:
        model(input_ids=torch.arange(24).view(2, 12), use_cache=False)
        assert float(penalty.value()) == pytest.approx(sum(float(x.abs().mean()) for x in seen), rel=1e-5)
    assert len(seen) == 3


def test_lambda_zero_is_vanilla_relu_bit_for_bit(tmp_path):
    """Check 4."""
    grid = ["method.thresholds=[0.0]"]
    zero = fitted(build("method.lambdas=[0,0,0,0]", *grid), tmp_path / "a")
    vanilla = fitted(build("method.control=vanilla_relu", *grid), tmp_path / "b")
    assert all(torch.equal(zero.tensors[k], vanilla.tensors[k]) for k in zero.tensors)
    assert zero.tensors.keys() == vanilla.tensors.keys()
    pushed = fitted(build(*grid), tmp_path / "c")
    assert any(not torch.equal(zero.tensors[k], pushed.tensors[k]) for k in zero.tensors)


@pytest.fixture(scope="module")
def equal_tokens(tmp_path_factory):
    """control -> (state, perplexity on dev, zeros of x1 on dev) after 50 steps each from the same weights."""
    longer = ["method.train.steps=50", "method.stages=[5,10,30,50]", "method.train.lr=3e-3", "method.thresholds=[0.0]"]
    rows, results = data().dev.sequences(16), {}
    for control in (None, "constant_lambda", "shifted_relu", "vanilla_relu"):
        folder = tmp_path_factory.mktemp(str(control))
        method = build(*longer, f"method.control={control or 'null'}")
        state = fitted(method, folder)
        model = method.apply(tiny_model(), state, work(folder))
        perplexity = quality.perplexity(model, rows, 4)["perplexity"]
        results[control] = (state, perplexity, neurons.zeros(model, rows, 4, [1])["x1_zero"])
    return results


def test_the_penalty_makes_sparse_and_history_says_so(equal_tokens):
    last, other = (equal_tokens[c][0].info["extra"]["training"][-1] for c in (None, "vanilla_relu"))
    assert last["fit/x1_zero"] > other["fit/x1_zero"] + 0.03
    assert last["fit/lambda"] == 8 and other["fit/lambda"] == 0
    for key in ("loss", "penalty", "lambda", "x1_zero/0", "x1_zero/1", "tokens_per_s", "eta_s", "lr"):
        assert f"fit/{key}" in last


def test_the_order_of_zeros_and_of_loss_at_equal_tokens(equal_tokens):
    """Check 8 on a tiny model: zeros of ProSparse near those of a constant lambda, above shifted, above plain ReLU; the
    constant lambda loses more."""
    zeros = {control: share for control, (_, _, share) in equal_tokens.items()}
    assert zeros[None] > zeros["shifted_relu"] + 0.1 and zeros["shifted_relu"] > zeros["vanilla_relu"] + 0.02
    assert abs(zeros[None] - zeros["constant_lambda"]) < 0.15
    assert equal_tokens[None][1] < 0.9 * equal_tokens["constant_lambda"][1]


def test_threshold_is_the_largest_within_the_tolerance(tmp_path):
    strict = fitted(build("method.threshold_tolerance=0", "method.thresholds=[0.005,5.0]"), tmp_path / "a")
    loose = fitted(build("method.threshold_tolerance=1e9", "method.thresholds=[0.005,5.0]"), tmp_path / "b")
    table = strict.info["extra"]["thresholds_on_dev"]
    assert [row["threshold"] for row in table] == [0.0, 0.005, 5.0]
    assert [row["sparsity"] for row in table] == sorted(row["sparsity"] for row in table)
    allowed = [r["threshold"] for r in table if r["perplexity"] <= table[0]["perplexity"]]
    assert strict.info["threshold"] == max(allowed) and loose.info["threshold"] == 5.0


def test_thresholds_are_judged_on_dev(tmp_path):
    method = build("method.thresholds=[0.005]", "method.threshold=0")
    state = fitted(method, tmp_path)
    model = method.apply(tiny_model(), state, work(tmp_path))
    actual = quality.perplexity(model, data().dev.sequences(8), 4)["perplexity"]
    assert state.info["extra"]["thresholds_on_dev"][0]["perplexity"] == pytest.approx(actual, rel=1e-5)


def test_threshold_is_an_operating_point(tmp_path):
    """t = 0 ("*") and t = t* from one training."""
    method = build("method.thresholds=[0.3]", "method.threshold_tolerance=1e9")
    state = fitted(method, tmp_path)
    chosen = method.apply(tiny_model(), state, work(tmp_path))
    method.threshold = 0.0
    plain = method.apply(tiny_model(), state, work(tmp_path))
    values = [float(m.threshold) for model in (chosen, plain) for _, m in base.measured_modules(model)]
    assert values == pytest.approx([0.3, 0.3, 0.0, 0.0])
    assert all(torch.equal(a, b) for a, b in zip(chosen.parameters(), plain.parameters(), strict=True))


def test_conversion_to_model_wide():
    """Check 9 and docs/methods/metrics.md: 89.32 % on x1 is 39.8 % of a LLaMA2-7B block, FFN work 40.5 %; 13B at 88.80 %: 39.6 %."""
    for d, f, share, expected in ((4096, 11008, 0.8932, 39.8), (5120, 13824, 0.8880, 39.6)):
        weights = dict.fromkeys("qkvo", d * d) | dict.fromkeys(("gate", "up", "down"), d * f)
        shares = dict.fromkeys(weights, 0.0) | {"up": share, "down": share}
        assert 100 * sparsity.model_wide(shares, weights) == pytest.approx(expected, abs=0.05)
    assert pytest.approx(0.405, abs=5e-4) == (1 + 2 * (1 - 0.8932)) / 3


def test_weights_travel_through_the_state(tmp_path):
    model = tiny_model(seed=3)
    state = finetune.weights(model, model)
    other = tiny_model(seed=4)
    finetune.load_weights(other, state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match="does not fit the model at"):
        finetune.load_weights(tiny_model(layers=3), state)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["method.stages=[1,2,6]"], "method.lambdas must have one value per stage (3), got 4"),
        (["method.stages=[1,4,2,6]"], "method.stages must be rising accumulated steps, got [1, 4, 2, 6]"),
        (["method.train.steps=7"], "method.stages must end at method.train.steps=7, got 6"),
        (["method.control=relu"], "method.control must be one of continued, vanilla_relu, shifted_relu, constant_lambda, drelu"),
        (["method.control=drelu", "method.threshold=0.1"], "method.threshold must be null or 0 with method.control=drelu, got 0.1"),
        (["method.approximate=true"], "method.approximate=true needs method.predictor, got null"),
    ],
)  # fmt: skip
def test_bad_settings(overrides, message):
    with pytest.raises(config.ConfigError) as error:
        build(*overrides)
    assert any(message in line for line in error.value.problems), error.value.problems


def test_one_command_runs_every_control():
    """conf/experiment/prosparse.yaml sweeps over ProSparse and all its controls, on the same tokens."""
    conf = Path(sparsebench.conf.__path__[0])
    swept = yaml.safe_load((conf / "experiment" / "prosparse.yaml").read_text())["hydra"]["sweeper"]["params"][
        "method.control"
    ].split(",")
    assert swept == ["null", *CONTROLS]
    methods = [
        config.build_settings(c).method
        for c in compose_all(["experiment=prosparse", f"method.control={','.join(swept)}"], sweep=True)
    ]
    assert [m.control for m in methods] == [None, *CONTROLS]
    assert len({(m.train.steps, m.train.batch_size, m.train.lr) for m in methods}) == 1


@pytest.mark.parametrize("control", ["null", "shifted_relu", "continued"])
def test_plain_ffns_train_too(control, tmp_path):
    """GPT-2: x1 is the input of fc2."""
    method = build(f"method.control={control}")
    state = fitted(method, tmp_path, tiny_model("gpt2"))
    model = method.apply(tiny_model("gpt2"), state, work(tmp_path))
    values = [site for site, _ in base.measured_modules(model)]
    assert values == ([] if control == "continued" else ["0.ffn", "1.ffn"])
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.arange(8)[None], use_cache=False).logits).all()
