"""Faithfulness checks of TwELL's recipe, the control l1_relu of ProSparse (docs/methods/prosparse.md; the number of each in
its docstring)."""

import pytest
import torch
import torch.nn.functional as F

from sparsebench import config
from sparsebench.config.compose import compose_all
from sparsebench.measure import macs
from sparsebench.methods.prosparse import l1
from sparsebench.models import Loaded
from sparsebench.modules.activations import FATReLU
from sparsebench.modules.base import SiteSparsity
from sparsebench.modules.neuron_sparse import NeuronSparseFFN, swap
from sparsebench.modules.x1 import l1 as l1_norm
from sparsebench.sites import find_blocks
from tests.helpers import KINDS, tiny_model, tiny_tokenizer, work

data = KINDS["language"].data
QUICK = [
    "method.control=l1_relu", "method.train.steps=6", "method.stages=[1,2,4,6]", "method.lambdas=[0,1,8,8]",
    "method.train.warmup=1", "method.train.precision=no", "method.predictor=null", "method.dev_sequences=4",
    "method.train.log_every=2", "method.train.batch_size=4", "method.train.micro_batch=2",
]  # fmt: skip


def build(*overrides):
    return config.build_settings(compose_all(["method=prosparse", "hardware=cpu", *QUICK, *overrides])[0]).method


def fitted(method, folder):
    return method.fit(Loaded(tiny_model(), tiny_tokenizer(), {}), data(), work(folder))


def settings(**changes):
    return l1.Settings(**{"coefficient": 1.0, "reduction": "neuron_sum", "reinit": 0.0, "reinit_std": 0.02, **changes})


def relu_model(layers=2, frozen=False):
    model = tiny_model(layers=layers).requires_grad_(not frozen)
    for block in find_blocks(model):
        swap(model, block, FATReLU(0.0), kernel=None)
    return model


def test_value_and_gradient_of_the_penalty():
    """Check 1: sum = f times mean; a loop by hand; mean over layers; gate and up learn from it, a shut gate does not."""
    model, rows = relu_model(layers=3), torch.arange(24).view(2, 12)
    seen = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    values = {}
    for reduction in ("neuron_sum", "neuron_mean"):
        seen.clear()
        with l1.L1Penalty(model, settings(reduction=reduction), 0) as penalty:
            model(input_ids=rows, use_cache=False)
            for x1 in seen:
                x1.retain_grad()
            term = penalty.value()
            values[reduction] = term.detach()
    assert float(values["neuron_sum"]) == pytest.approx(160 * float(values["neuron_mean"]), rel=1e-5)
    by_hand = 0.0
    for x1 in seen:
        for token in x1.detach().flatten(0, 1):
            by_hand += sum(abs(float(v)) for v in token) / (24 * 3)
    assert float(values["neuron_sum"]) == pytest.approx(by_hand, rel=1e-5)
    term.backward()
    last = seen[-1]  # earlier ones reach later penalties, too
    assert not last.grad[last == 0].any() and last.grad.any()
    mlp = model.model.layers[-1].mlp
    assert mlp.gate_proj.weight.grad.any() and mlp.up_proj.weight.grad.any() and mlp.down_proj.weight.grad is None


def test_lambda_zero_is_plain_training_bit_for_bit(tmp_path):
    """Check 2; and a penalty that is not zero changes the weights."""
    zero = fitted(build("method.l1.coefficient=0.0"), tmp_path / "a")
    plain = fitted(build("method.control=vanilla_relu"), tmp_path / "b")
    assert all(torch.equal(zero.tensors[k], plain.tensors[k]) for k in plain.tensors)
    pushed = fitted(build("method.l1.coefficient=0.1"), tmp_path / "c")
    assert any(not torch.equal(zero.tensors[k], pushed.tensors[k]) for k in plain.tensors)
    history = pushed.info["extra"]["training"]
    assert {row["fit/lambda"] for row in history} == {0.1}  # from the first step on
    assert 0 <= history[-1]["fit/dead"] <= 1 and "fit/dead" not in plain.info["extra"]["training"][-1]


def test_sparse_ffn_is_the_masked_one_and_counts_shut_gates():
    """Check 3."""
    torch.manual_seed(0)
    model = tiny_model(layers=1)
    block, mlp = find_blocks(model)[0], model.model.layers[0].mlp
    x = torch.randn(2, 7, 64)
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    expected = mlp.down_proj(torch.where(gate > 0, gate, 0) * up)
    sparse = NeuronSparseFFN(mlp, block, FATReLU(0.0), kernel="masked_dense")
    assert torch.equal(sparse(x), expected)
    sparse.counter = sparse.new_counter()
    sparse(x)
    assert int(sparse.counter.kept.sum()) == int((gate > 0).sum())


def test_products_of_a_sparse_ffn():
    """Check 4: d f (1 + 2 (1 - S)); at 29 of 5632 active neurons a third is left, nearly all of it the gate."""
    model = tiny_model(layers=1)
    sparse = NeuronSparseFFN(model.model.layers[0].mlp, find_blocks(model)[0], FATReLU(0.0), kernel="masked_dense")
    share = 1 - 29 / 5632
    costs = sparse.costs({f"0.{role}": SiteSparsity(share, share, 64 * 160, 10, 0) for role in ("up", "down")})
    left = sum(c.sparse_macs for c in costs.values()) / sum(c.dense_macs for c in costs.values())
    assert left == pytest.approx((1 + 2 * (1 - share)) / 3) == pytest.approx(0.337, abs=5e-4)
    assert macs.dense_sites(model).keys() >= costs.keys()


def test_backward_on_kept_entries():
    """Check 8: dL/dh_u = dL/dh h_g, dL/dh_g = dL/dh h_u where the gate is open, with lambda sign(h) / (M L) in dL/dh."""
    torch.manual_seed(0)
    layers, tokens, weight = 3, 10, 0.7
    z, up, out = (
        torch.randn(tokens, 20, requires_grad=True),
        torch.randn(tokens, 20, requires_grad=True),
        torch.randn(20, 8),
    )
    gate = F.relu(z)
    h = gate * up
    target = torch.randn(tokens, 8)
    loss = (h @ out * target).sum() + weight * l1_norm(h[None], "token_sum") / layers
    loss.backward()
    dh = target @ out.T + weight * h.detach().sign() / (tokens * layers)
    torch.testing.assert_close(up.grad, dh * gate.detach())
    torch.testing.assert_close(z.grad, dh * up.detach() * (z.detach() > 0))


def test_dead_neurons_are_counted_and_started_anew():
    """Check 9: never active in a step = dead; only their rows move, by r towards noise; r = 0 moves nothing."""
    rows = torch.arange(6).view(2, 3)  # so few tokens that parts of a step differ
    for share in (0.0, 0.1, 1.0):
        model = relu_model(layers=2)
        gates = [layer.mlp.gate_proj.weight for layer in model.model.layers]
        with torch.no_grad():
            gates[1][5:9] = 0.0  # z = 0 never fires
        before = [g.detach().clone() for g in gates]
        seen = []
        for layer in model.model.layers:
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, a, seen=seen: seen.append(a[0][0] != 0))
        with l1.L1Penalty(model, settings(reinit=share), 3) as penalty:
            for part in rows:  # the micro-batches of one step
                model(input_ids=part[None], use_cache=False)
                penalty.value()
            active = [penalty.active[i].clone() for i in (0, 1)]
            penalty.after_step(7)
        fired = [torch.cat(seen[i::2]).any(0) for i in (0, 1)]
        assert all(map(torch.equal, active, fired))  # of the step, not of its last micro-batch
        assert not active[1][5:9].any() and penalty.dead == {i: int((~a).sum()) for i, a in enumerate(active)}
        assert penalty.stats()["dead"] == sum(penalty.dead.values()) / 320 and not penalty.active
        for gate, old, live in zip(gates, before, active, strict=True):
            assert torch.equal(gate[live], old[live])
            if not live.all():
                assert torch.equal(gate[~live], old[~live]) == (share == 0)
        moved = (gates[1][5:9].detach() - (1 - share) * before[1][5:9]) / max(share, 1e-9)
        assert share == 0 or float(moved.std()) == pytest.approx(0.02, rel=0.2)


def test_non_zeros_fall_with_lambda(tmp_path):
    """Check 10: over two decades, ends only."""
    longer = ["method.train.steps=25", "method.stages=[5,10,15,25]", "method.train.lr=3e-3"]
    means = []
    for weight in (0.002, 0.2):
        said = fitted(build(*longer, f"method.l1.coefficient={weight}"), tmp_path / str(weight)).info["extra"]
        means.append(sum(said["non_zeros_on_dev"]["mean"].values()))
    assert means[1] < 0.8 * means[0]


def test_a_relu_state_is_not_applied_with_another_activation(tmp_path):
    """Check 11: the released configurations still say silu, which would be another function."""
    state = fitted(build(), tmp_path)
    with pytest.raises(
        ValueError, match="control=continued ends the gate with the model's own, this state was trained with ReLU"
    ):
        build("method.control=continued").apply(tiny_model(), state, work(tmp_path))
    build().apply(tiny_model(), state, work(tmp_path))


def test_non_zeros_by_position_without_padding():
    """Check 12: means by position and layer by hand; padding counts nowhere."""
    model, rows = relu_model(frozen=True), torch.arange(60).view(3, 20)
    seen, live = [], []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, a: seen.append((a[0] != 0).sum(-1)))
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, a: live.append(a[0] != 0))
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1, 12:], mask[2, 1:] = False, False
    few = torch.zeros_like(mask)
    few[0, :2] = True
    never = l1.non_zeros(model, rows, 3, few)["never_active"]
    assert never == sum(int((~x1[few].any(0)).sum()) for x1 in live) / 320 > 0
    seen.clear()
    actual = l1.non_zeros(model, rows, 3, mask)
    by_layer = torch.stack(seen).double()  # [layers, N, T]
    both = by_layer.mean(0)
    assert actual["by_position"]["0"] == pytest.approx(float(both[:, 0].mean()))
    assert actual["by_position"]["3"] == pytest.approx(float(both[:2, 3].mean()))
    assert actual["by_position"]["later"] == pytest.approx(float(both[:, 8:][mask[:, 8:]].mean()))
    assert actual["mean"][1] == pytest.approx(float(by_layer[1][mask].mean()))
    assert actual["most"][0] == int(by_layer[0][mask].max())
    seen.clear()
    assert l1.non_zeros(model, rows, 2, mask) == actual  # batches do not matter
    seen.clear()
    assert l1.non_zeros(model, rows, 3)["mean"] != actual["mean"]


def test_training_products_by_hand():
    """Forward and backward: 3 products a map; with zeros of h skipped the gate's forward and the active part of the rest."""
    model = tiny_model(layers=1)
    d, f, head = 64, 160, 320 * 64
    attention = 3 * (64 * 64 + 32 * 64 + 32 * 64 + 64 * 64)
    cost = l1.training_macs(model, 10, 0.9)
    assert cost["dense"] == pytest.approx(10 * (9 * d * f + attention + 3 * head))
    assert cost["with_zeros_skipped"] == pytest.approx(10 * (d * f * (1 + 8 * 0.1) + attention + 3 * head))
    assert l1.training_macs(model, 10, 0.0)["with_zeros_skipped"] == cost["dense"]
