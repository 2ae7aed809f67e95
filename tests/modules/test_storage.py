"""One storage for the dense and the sparse model: the same values whichever way they lie, and no second copy."""

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsebench import engines
from sparsebench.measure import latency
from sparsebench.methods.base import Work
from sparsebench.models import Loaded
from sparsebench.modules import storage
from sparsebench.modules.base import sparse_modules
from sparsebench.sites import find_blocks
from tests.helpers import built, sparse_copy, tiny_model

NOTHING = ("teal", "cats", "topp", "nm", "rsparse", "wisparse", "polar", "wina_plain")  # methods that change no weight
CHANGING = ("wina", "larosa", "duogpt")
QUICK = {"wisparse": {"allocation": "uniform", "alpha": [1.0], "ladder": False}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_turned_weight_has_its_values_and_its_address(dtype):
    parameter = nn.Parameter(torch.randn(7, 12).to(dtype), requires_grad=False)
    before, address = parameter.data.clone(), parameter.data_ptr()
    for channels in (True, True, False, True):
        storage.turn(parameter, channels)
        assert torch.equal(parameter.data, before) and parameter.data_ptr() == address
        assert storage.by_channels(parameter.data) == channels


def test_a_trainable_weight_a_strided_one_and_a_vector_are_no_parameter_to_turn():
    linear = nn.Linear(6, 4)
    before = linear.weight.data.clone()
    assert storage.channel_major(linear.weight).data_ptr() != linear.weight.data_ptr()
    strided = nn.Parameter(torch.randn(4, 12)[:, ::2], requires_grad=False)
    turned = storage.channel_major(strided)
    assert torch.equal(turned, strided) and storage.by_channels(turned) and torch.equal(before, linear.weight)
    row = nn.Parameter(torch.randn(1, 5), requires_grad=False)
    assert torch.equal(storage.channel_major(row), row)


def distinct_bytes(tensors) -> int:
    stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(stores.values())


@pytest.fixture
def watch():
    """What was there before is left out of `living`, which then takes no time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def living() -> int:
    """Bytes of all tensors that Python can reach and that were made since the test began (`watch`)."""
    gc.collect()
    return distinct_bytes(t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.device.type == "cpu")


@pytest.fixture(scope="module")
def target():
    hardware = built("hardware", "hardware=cpu", threads=1)
    hardware.prepare()
    return hardware


def applied(name, model, data, target, folder):
    """(method, what keeps the dense model, the sparse one) as a run makes them."""
    method = built("method", f"method={name}", calibration_tokens=512, **QUICK.get(name, {}))
    work = Work(0, target, folder, folder, 8, lambda row: None)
    dense = storage.beside(model, method.changes)
    return method, dense, method.apply(model, method.fit(Loaded(model, None, {}), data, work), work)


@pytest.mark.parametrize("name", ["teal", "cats", "topp", "nm", "rsparse"])
def test_a_timed_run_holds_the_weights_once(name, data, target, tmp_path, monkeypatch, watch):
    """All living tensors while dense and sparse steps and prompts are timed in turn: the model, what the method adds
    (R-Sparse's factors), caches and a little more; a second copy of the block maps would be 0.6 of the model."""
    model = tiny_model(hidden_size=128, intermediate_size=384)
    size = distinct_bytes([*model.parameters(), *model.buffers()])
    most, interleaved = [], latency.interleaved
    _, dense, sparse = applied(name, model, data, target, tmp_path)
    assert any(True for _ in sparse_modules(sparse))

    def watched(*arguments):
        most.append(living())
        return interleaved(*arguments)

    monkeypatch.setattr(latency, "interleaved", watched)
    settings = SimpleNamespace(context=8, prompt=8, warmup=0, samples=2, by_kernel=False, energy=False)
    latency.latency(dense, sparse, torch.arange(64), settings, target)
    extra = distinct_bytes(sparse.buffers())  # low-rank factors, scales, thresholds
    assert len(most) == 2 and max(most) <= 1.15 * size + extra, (max(most) / size, extra / size)


@pytest.mark.parametrize("name", [*NOTHING, *CHANGING])
def test_what_a_method_says_it_changes_is_true(name, data, target, tmp_path):
    """The dense model beside the sparse one has the values and the logits it had, and shares all weights or has its own."""
    ids, model = torch.arange(16)[None], tiny_model(hidden_size=128, intermediate_size=384)
    untouched = copy.deepcopy(model)
    method, dense, sparse = applied(name, model, data, target, tmp_path)
    assert (method.changes is None) == (name in NOTHING)
    for (key, parameter), (_, before) in zip(dense.named_parameters(), untouched.named_parameters(), strict=True):
        assert torch.equal(parameter, before), key
    with torch.no_grad():
        torch.testing.assert_close(dense(input_ids=ids).logits, untouched(input_ids=ids).logits)
        assert not torch.equal(sparse(input_ids=ids).logits, dense(input_ids=ids).logits) or name == "rsparse"
    own = {p.data_ptr() for p in dense.parameters()}
    assert all(p.data_ptr() in own for n, p in sparse.named_parameters() if n.endswith("proj.weight")) == (
        method.changes is None
    )


def test_decoders_that_share_weights_each_read_them_their_own_way(target):
    """Eager and fused, dense and sparse, in any order: each lays the weights before its turn and computes its own logits."""
    ids, dense = torch.arange(20)[None] % 320, tiny_model()
    sparse = sparse_copy(0.3, model=storage.sharing_copy(dense))
    step = storage.sharing_copy(dense)
    made = {
        "dense": engines.decoder(dense, ids[:, :8], 4, target, "eager"),
        "sparse": engines.decoder(sparse, ids[:, :8], 4, target, "fused"),
        "dense fused": engines.decoder(step, ids[:, :8], 4, target, "fused", keep_all=True),
    }
    expected = {}
    for order in (list(made), list(made)[::-1]):
        for name in order:
            made[name].rewind()
            weight = dense.get_submodule(find_blocks(dense)[0].sites["q"].path).weight
            assert storage.by_channels(weight) == (name != "dense")
            logits = made[name].step(ids[:, 8:9]).clone()
            torch.testing.assert_close(logits, expected.setdefault(name, logits))
    torch.testing.assert_close(expected["dense"], expected["dense fused"], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(expected["dense"], expected["sparse"], atol=1e-2)
