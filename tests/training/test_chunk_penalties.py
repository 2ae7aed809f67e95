"""Penalties for shared activity: docs/methods/chunk.md, checks 8 and 9, and method.neighbours of ProSparse."""

import pytest
import torch

from sparsebench import config
from sparsebench.config.compose import compose_all
from sparsebench.measure import unions
from sparsebench.models import Loaded
from sparsebench.modules.x1 import X1Penalty
from sparsebench.sites import find_blocks
from sparsebench.training import chunk_penalties
from tests.helpers import KINDS, tiny_model, tiny_tokenizer, work

QUICK = [
    "method.train.steps=20", "method.stages=[20]", "method.lambdas=[0]", "method.train.warmup=1", "method.train.lr=3e-3",
    "method.train.precision=no", "method.predictor=null", "method.dev_sequences=4", "method.train.log_every=10",
]  # fmt: skip


def build(*overrides):
    return config.build_settings(compose_all(["method=prosparse", "hardware=cpu", *QUICK, *overrides])[0]).method


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


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_beside_another_penalty_each_term_has_its_own_coefficient(family):
    """Means over layers of the gates before ReLU; the other penalty keeps its coefficient, its counts and its hooks."""
    model = tiny_model(family, layers=2).requires_grad_(True)
    settings = chunk_penalties.Neighbours(locality=0.5, chunk=3.0, length=4, sharpness=10.0)
    gates, ids = [], torch.arange(24).view(2, 12)
    for block in find_blocks(model):
        gate = model.get_submodule(block.sites["gate" if "gate" in block.sites else "fc1"].path)
        gate.register_forward_hook(lambda _, args, z: gates.append(z.detach().reshape(2, 12, -1)))
    with X1Penalty(model, "mean", lambda step: 7.0) as alone:
        model(input_ids=ids, use_cache=False)
        plain = float(alone.value().detach())
    gates.clear()
    with chunk_penalties.Beside(X1Penalty(model, "mean", lambda step: 7.0), model, settings) as penalty:
        scale = penalty.coefficient(0)
        model(input_ids=ids, use_cache=False)
        value = penalty.value()
        value.backward()
        told = penalty.stats()
    near = sum(float(chunk_penalties.locality(z, 10.0)) for z in gates) / 2
    shared = sum(float(chunk_penalties.chunk(z.relu(), 4)) for z in gates) / 2
    assert float(scale * value.detach()) == pytest.approx(7 * plain + 0.5 * near + 3 * shared, rel=1e-5)
    assert told["lambda"] == 7 and told["chunk"] == pytest.approx(shared) and "x1_zero" in told
    before = len(gates)
    model(input_ids=ids, use_cache=False)
    assert len(gates) == before + 2 and not penalty.terms["chunk"], "its hooks are gone"


def test_a_model_trained_with_them_shares_more_neurons(tmp_path):
    """method.neighbours.*: the same few steps with a heavy penalty leave neighbours whose neurons differ less."""
    jaccard = {}
    for weight in (0.0, 3.0):
        method = build(f"method.neighbours.locality={weight}", "method.neighbours.sharpness=10")
        loaded = Loaded(tiny_model(layers=1), tiny_tokenizer(), {})
        state = method.fit(loaded, KINDS["language"].data(), work(tmp_path / str(weight)))
        rows = state.info["extra"]["training"]
        assert ("fit/locality" in rows[-1]) == bool(weight)
        module = method.apply(tiny_model(layers=1), state, work(tmp_path / "x"))
        ids, groups = torch.randint(0, 320, (4, 32), generator=torch.Generator().manual_seed(1)), unions.Groups([2])
        with unions.counting(module, groups) as counters, torch.no_grad():
            groups.of_chunks(torch.zeros(4, 32, dtype=torch.int64))
            module(input_ids=ids, use_cache=False)
        jaccard[weight] = unions.neighbours(counters)["jaccard"]
    assert jaccard[3.0] > jaccard[0.0] + 0.02, jaccard


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["method.control=continued", "method.neighbours.chunk=1"],
            "neighbours must be off with method.control=continued",
        ),
        (["method.neighbours.length=0"], "method.neighbours.length"),
    ],
)
def test_settings_that_mean_nothing_are_refused(overrides, message):
    with pytest.raises(config.ConfigError, match=message):
        build(*overrides)


def test_chunks_must_fill_the_window(tmp_path):
    method = build("method.neighbours.chunk=1", "method.neighbours.length=7")
    with pytest.raises(ValueError, match="length must divide dataset.sequence_length=32, got 7"):
        method.fit(Loaded(tiny_model(layers=1), tiny_tokenizer(), {}), KINDS["language"].data(), work(tmp_path))
