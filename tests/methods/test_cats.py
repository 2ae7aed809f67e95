"""CATS (docs/methods/cats.md): neurons chosen by the gate, up and down computed for kept ones only."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from sparsebench import engines, kernels
from sparsebench.measure import latency, macs, quality, sparsity
from sparsebench.methods.cats import Cats
from sparsebench.models.language import Loaded
from sparsebench.modules.gate_sparse import GateSparseFFN
from tests.helpers import accounted, built, logits, tiny_model, work

FFN = 2 * 64 * 160 / (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)  # up and down as a part of a tiny block


def method(**changes) -> Cats:
    return built("method", "method=cats", "method.prompt=all", **changes)


def applied(rule, data, tmp_path, kind="llama"):
    state = rule.fit(Loaded(tiny_model(kind), None, {}), data, work(tmp_path))
    return rule.apply(tiny_model(kind), state, work(tmp_path))


def test_no_sparsity_is_dense(data, tmp_path):
    actual = applied(method(sparsity=0.0), data, tmp_path)
    assert torch.equal(logits(actual, data.test.rows[:3]), logits(tiny_model(), data.test.rows[:3]))


def test_gate_is_whole_and_neurons_at_the_threshold_stay(data):
    """y = sum over |g_i| >= t of g_i (up_i . x) down_i, with the gate itself computed from the unmasked input."""
    mlp = tiny_model().model.layers[0].mlp
    x = torch.randn(2, 5, 64)
    gates = F.silu(F.linear(x, mlp.gate_proj.weight))
    threshold = float(gates.abs().flatten().kthvalue(gates.numel() // 2).values)
    up, down = mlp.up_proj.weight, mlp.down_proj.weight
    expected = F.linear(torch.where(gates.abs() >= threshold, gates, 0) * F.linear(x, up), down)
    sparse = GateSparseFFN(mlp, 0, threshold)
    torch.testing.assert_close(sparse(x), expected)
    assert bool(sparse.keep(torch.tensor([threshold, -threshold])).all())
    assert not bool(sparse.keep(torch.tensor([threshold * 0.999])).any())


def test_threshold_is_the_percentile_of_the_gate_on_calibration_text(data, tmp_path):
    for share in (0.25, 0.5, 0.9):
        model = applied(method(sparsity=share), data, tmp_path)
        first = model.model.layers[0].mlp
        seen = []
        first.register_forward_hook(
            lambda m, args, _, seen=seen: seen.append(m.keep(m.activation(m.gate(args[0]))).float().mean())
        )
        logits(model, data.fit.rows)
        assert 1 - float(torch.stack(seen).mean()) == pytest.approx(share, abs=0.01)  # layer 0 sees dense inputs


def test_ffn_and_model_wide_sparsity_are_both_reported(data, tmp_path):
    dense = macs.dense_sites(tiny_model())
    model = applied(method(sparsity=0.5), data, tmp_path)
    _, counters = quality.language_quality(model, data.test, None, 4)
    actual = sparsity.summarise(model, counters)
    assert set(actual) == {"0.up", "0.down", "1.up", "1.down"}
    assert actual["0.up"].sparsity == actual["0.down"].sparsity == pytest.approx(0.5, abs=0.03)
    weights = {name: int(cost.dense_macs) for name, cost in dense.items()}
    wide = sparsity.model_wide(dict.fromkeys(weights, 0.0) | {n: s.sparsity for n, s in actual.items()}, weights)
    neurons = (actual["0.up"].sparsity + actual["1.up"].sparsity) / 2
    assert wide == pytest.approx(neurons * FFN)
    counted, _ = accounted(dense, model, actual, context=1, skips=True)
    assert counted["dense"] - counted["sparse"] == pytest.approx(wide * sum(weights.values()))


def test_sparsity_of_the_model_is_asked_of_the_neurons(data, tmp_path):
    rule = method(sparsity=0.3, sparsity_of="model")
    model = applied(rule, data, tmp_path)
    _, counters = quality.language_quality(model, data.test, None, 4)
    neurons = sparsity.summarise(model, counters)["0.up"].sparsity
    assert neurons == pytest.approx(0.3 / FFN, abs=0.03)
    with pytest.raises(ValueError, match=r"method\.sparsity must be below 0\.\d+ with sparsity_of=model"):
        applied(method(sparsity=0.65, sparsity_of="model"), data, tmp_path)


def test_models_without_a_gate_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match="gated FFN with gate, up and down is needed, got a block with qkv"):
        method().fit(Loaded(tiny_model("gpt2"), None, {}), data, work(tmp_path))


@pytest.mark.parametrize("policy", ["none", "half", "p99", "last10", "all"])
def test_prompt_policies(policy, data, tmp_path):
    model = applied(method(sparsity=0.7, prompt=policy), data, tmp_path)
    row, dense = data.test.rows[:1], logits(tiny_model(), data.test.rows[:1])
    same = bool(torch.equal(logits(model, row), dense))
    assert same == (policy == "none")
    actual = model.generate(row[:, :12], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert actual.shape[1] > 12


@pytest.mark.parametrize("engine", ["fused", "eager"])
def test_one_token_runs_on_the_skipping_kernel(data, tmp_path, engine):
    worker = work(tmp_path)
    worker.hardware.kernel_name, worker.hardware.engine = "cpu_numba", "auto" if engine == "fused" else "eager"
    rule = method(sparsity=0.7)
    model = rule.apply(tiny_model(), rule.fit(Loaded(tiny_model(), None, {}), data, worker), worker)
    assert engines.choose(model, worker.hardware) == engine
    settings = SimpleNamespace(warmup=3, samples=30, context=16, prompt=16, by_kernel=False, energy=False)
    actual = latency.latency(tiny_model(), model, data.test.rows[:4].flatten(), settings, worker.hardware).latency
    assert (
        actual["kernel"] == "cpu_numba"
        and 0 < actual["parity_relative_error"] < 1e-4
        and actual["decode"]["speedup"] > 0
    )


def test_a_backend_that_can_not_serve_hands_over():
    down, rows = torch.randn(8, 16).t().contiguous().t(), torch.zeros(9, 16)
    assert kernels.serving("cpu_numba", rows[:1], down, "neuron_sparse_ffn") is kernels.load("cpu_numba")
    assert kernels.serving("cpu_numba", rows, down, "neuron_sparse_ffn") is kernels.load("masked_dense")
    assert kernels.providing("cpu_numba", "neuron_sparse_ffn") is kernels.load("cpu_numba")
