"""Polar Sparsity's trained router of FFN neurons: what it is taught, what it makes of the model, and what it costs."""

from types import SimpleNamespace

import pytest
import torch

from sparsebench.measure import macs, sparsity, unions
from sparsebench.methods.polar import neuron_router
from sparsebench.methods.prosparse.predictor import Predictor
from sparsebench.models import Loaded
from sparsebench.modules.routed import RoutedLinear
from sparsebench.modules.tokens import follow
from sparsebench.records import state as states
from tests.helpers import built, tiny_model, work

IDS = torch.randint(0, 320, (4, 20), generator=torch.Generator().manual_seed(5))
ROUTER = {
    "rank": 32, "tokens": 160, "epochs": 6, "patience": 6, "batch_size": 32, "lr": 1e-2, "weight_decay": 0.0,
    "held_out": 0.2, "target_recall": 0.99,
}  # fmt: skip
WIDE = {"opt": {"ffn_dim": 384}, "llama": {"intermediate_size": 384, "hidden_act": "relu"}}


class Text:
    sequence_length = 20

    def sequences(self, limit=None):
        return torch.randint(0, 320, (8, 20), generator=torch.Generator().manual_seed(6))[:limit]


def routed(tmp_path, family="opt", batch=None, kernel="cpu_numba"):
    """(model with neuron routers, the dense model, the state) after a fit."""
    dense, model = tiny_model(family, **WIDE[family]), tiny_model(family, **WIDE[family])
    method = built("method", "method=polar", calibration_tokens=160, density=1.0, router="oracle", neurons="router",
                   neuron_batch=batch, neuron_router=ROUTER)  # fmt: skip
    place = work(tmp_path)
    state = method.fit(Loaded(module=model, tokenizer=None, info={}), SimpleNamespace(fit=Text()), place)
    place.hardware.kernel_name = kernel
    return method.apply(model, state, place), dense, state


def routers(model):
    return [m for m in model.modules() if isinstance(m, Predictor)]


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_router_that_wants_all_is_the_dense_model_and_one_that_wants_none_drops_the_ffn(family, tmp_path):
    model, dense, _ = routed(tmp_path, family)
    for router in routers(model):
        router.second.data.zero_(), router.bias2.data.fill_(1.0)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)
    for router in routers(model):
        router.bias2.data.fill_(-1.0)
    assert (logits(model) - logits(dense)).abs().max() > 1e-2
    with sparsity.counting(model) as counters:
        logits(model)
    assert all(site.sparsity == 1 for site in sparsity.summarise(model, counters).values())


def test_it_is_taught_which_neurons_are_not_zero_and_saved(tmp_path):
    """Weighted BCE on x1 != 0: held-out recall beats chance at its own rate; the state file holds all it needs."""
    model, _, state = routed(tmp_path)
    told = state.info["extra"]["polar"]["neurons"]
    assert told["recall"] > (1 - told["predicted_sparsity"]) + 0.1 and 0.2 < told["sparsity"] < 0.8
    states.write(state, tmp_path / "state.safetensors")
    again = states.read(tmp_path / "state.safetensors")
    other = tiny_model("opt", **WIDE["opt"])
    neuron_router.apply(other, again.tensors, None, "masked_dense")
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="models with ReLU, got silu"):
        neuron_router.check(tiny_model(), "router")


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_batch_shares_k_neurons_at_each_position(family, tmp_path):
    """Check 12, second half: the neurons of a token do depend on the batch; k is a multiple of 128 and the same for all."""
    model, _, state = routed(tmp_path, family, batch=4)
    counts = {int(i): each["k"] for i, each in state.info["extra"]["polar"]["neurons"]["per_layer"].items()}
    wanted = []
    for router in routers(model):
        assert router.k == counts[len(wanted)] and router.k % 128 == 0
        router.k = 128
        router.register_forward_hook(lambda module, args, out: wanted.append(out.reshape(-1, 20, 384)))
    logits(model)
    for mask in wanted:
        assert (mask.sum(-1) == 128).all() and (mask == mask[:1]).all() and not (mask[:, 0] == mask[:, 1]).all()
    together, wanted[:] = wanted[0], []
    logits(model, IDS[2:3])
    assert not torch.equal(together[2], wanted[0][0])


def test_padding_has_no_voice(tmp_path):
    """A row whose tokens are padding does not change what the others keep."""
    model, _, _ = routed(tmp_path, batch=4)
    router = routers(model)[0]
    router.k, seen = 128, []
    follow(model)
    router.register_forward_hook(lambda module, args, out: seen.append(out.reshape(-1, 20, 384)))
    mask = torch.ones_like(IDS[:2])
    mask[1, 10:] = 0
    with torch.no_grad():
        model(input_ids=IDS[:2], attention_mask=mask, use_cache=False)
        model(input_ids=IDS[:1], use_cache=False)
    assert torch.equal(seen[0][0, 10:], seen[1][0, 10:]) and not torch.equal(seen[0][0, :10], seen[1][0, :10])


def test_decode_reads_only_wanted_rows_and_is_the_masked_model(tmp_path):
    """One token a sequence goes to the kernel, which never reads the rows of other neurons."""
    model, _, _ = routed(tmp_path)
    (first, *_), x = [m for m in model.modules() if isinstance(m, RoutedLinear)], torch.randn(1, 64)
    with torch.no_grad():
        masked = torch.where(first.router(x), x @ first.weight.t() + first.bias, 0)
        idle = ~first.router(x)[0]
        assert idle.any()
        first.weight.data[idle] = float("nan")
        torch.testing.assert_close(first(x), masked, rtol=1e-5, atol=1e-5)


def test_its_work_is_counted(tmp_path):
    """rank (d + f) products and bytes on top of each first map, which costs its wanted rows; batches keep the union."""
    model, dense, _ = routed(tmp_path)
    with sparsity.counting(model) as counters:
        logits(model)
    measured = sparsity.summarise(model, counters)
    costs = macs.site_costs(model, measured)
    kept = 1 - measured["0.fc1"].sparsity
    assert 0 < kept < 1 and costs["0.fc1"].overhead_macs == 32 * (64 + 384)
    assert costs["0.fc1"].sparse_macs == pytest.approx(kept * 64 * 384)
    assert costs["0.fc1"].sparse_bytes == pytest.approx(4 * (kept * 64 * 384 + 32 * (64 + 384)))
    assert costs["0.fc1"].dense_macs == macs.dense_sites(dense)["0.fc1"].dense_macs == 64 * 384
    assert measured["0.fc2"].sparsity >= measured["0.fc1"].sparsity
    groups = unions.Groups([4])
    with unions.counting(model, groups) as counters:
        groups.of_rows(4)
        logits(model, IDS[:, :1])
    weights = {name: int(cost.dense_macs) for name, cost in macs.dense_sites(dense).items()}
    figures = unions.summarise(model, counters, weights)
    assert figures["4"]["kinds"]["neurons"] < figures["1"]["kinds"]["neurons"]


def test_the_search_needs_a_whole_batch(tmp_path):
    with pytest.raises(ValueError, match="neuron_batch must be at most the 32 held-out tokens of the router, got 64"):
        routed(tmp_path, batch=64)
