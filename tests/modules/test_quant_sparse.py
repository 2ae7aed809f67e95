"""Quantised maps as modules: dense, sparse, counted, and beside torch's own products."""

import pytest
import torch

from sparsebench import kernels
from sparsebench.kernels import masked_dense
from sparsebench.kernels._packed import quantised
from sparsebench.measure import macs, memory
from sparsebench.measure.sparsity import counting, summarise, zero_weights
from sparsebench.models.quantised import quantise
from sparsebench.modules import storage
from sparsebench.modules.input_sparse import InputSparseLinear, sparse_of, swap
from sparsebench.modules.quant_sparse import QuantLinear, QuantSparseLinear, TorchQuantLinear, with_torch_products
from sparsebench.sites import find_blocks, shape, weight_of
from tests.helpers import tiny_model
from tests.kernel_checks import error

IDS = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(5))


def quantised_map(bits, m=70, n=45, **options):
    linear = torch.nn.Linear(n, m)
    return linear, QuantLinear(quantised(linear.weight, bits, 16), linear.bias, **options)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_dense_map_is_its_dequantised_weight(bits):
    linear, dense = quantised_map(bits, kernel="cpu_numba")
    x = torch.randn(2, 5, 45)
    torch.testing.assert_close(dense(x), torch.nn.functional.linear(x, dense.weight, linear.bias))
    torch.testing.assert_close(dense(x[:, :1]), dense(x)[:, :1], rtol=1e-4, atol=1e-5)
    assert shape(dense) == (70, 45) and torch.equal(weight_of(dense), dense.packed.dequantised())
    assert "int" in repr(dense)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("top_k", [None, 9])
def test_a_sparse_map_is_the_input_sparse_map_of_the_dequantised_weight(bits, top_k):
    linear, dense = quantised_map(bits)
    scale = torch.rand(45) + 0.5
    sparse = sparse_of(dense, "0.q", 0.6, scale=scale, top_k=top_k, kernel="cpu_numba")
    plain = torch.nn.Linear(45, 70)
    plain.weight.data, plain.bias = dense.weight.contiguous(), linear.bias
    reference = InputSparseLinear(plain, "0.q", 0.6, scale=scale, top_k=top_k)
    x = torch.randn(3, 6, 45)
    torch.testing.assert_close(sparse(x), reference(x))
    torch.testing.assert_close(sparse(x[:, :1]), reference(x[:, :1]), rtol=1e-4, atol=1e-5)
    assert sparse.kernel(1) == "cpu_packed" and sparse.kernel(5) == "masked_dense"
    assert sparse.packed_q.data_ptr() == dense.packed_q.data_ptr()  # shared, not copied
    with pytest.raises(ValueError, match="low-rank"):
        sparse_of(dense, "0.q", 0.6, low_rank=(torch.randn(45, 2), torch.randn(2, 70)))


@pytest.mark.parametrize("bits", [8, 4])
def test_costs_are_of_the_packed_tensors(bits):
    """Payload of kept channels, scales of touched groups; a packed weight's element size says nothing."""
    _, dense = quantised_map(bits)
    sparse = sparse_of(dense, "0.q", 0.7)
    with counting(torch.nn.ModuleList([sparse])) as counters:
        sparse(torch.randn(4, 30, 45))
    measured = summarise(torch.nn.ModuleList([sparse]), counters)
    cost, share = sparse.costs(measured)["0.q"], 1 - measured["0.q"].sparsity
    assert cost.dense_bytes == sum(t.nbytes for t in dense.packed.tensors) and cost.dense_macs == 70 * 45
    groups = 1 - (1 - share) ** 45 if bits == 8 else sum(1 - (1 - share) ** size for size in (16, 16, 13))
    aside = 70 * (4 if bits == 8 else 2)
    assert cost.sparse_bytes == pytest.approx(share * 45 * (128 if bits == 8 else 64) + groups * aside)
    assert zero_weights(torch.nn.ModuleList([sparse])) == 0  # what rounding made 0 is no pruning


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_model_keeps_its_structure(kind):
    model = tiny_model()
    before = memory.weight_bytes(model)
    weights = {s.path: model.get_submodule(s.path).weight.clone() for b in find_blocks(model) for s in b.sites.values()}
    about = quantise(model, kind, 32, "input", "cpu_numba")
    maps = {path: model.get_submodule(path) for path in weights}
    assert all(isinstance(m, QuantLinear) for m in maps.values()) and memory.weight_bytes(model) < before
    off = sum(float((maps[p].weight - w).square().sum()) for p, w in weights.items())
    assert about["relative_weight_error"] == pytest.approx(
        (off / sum(float(w.square().sum()) for w in weights.values())) ** 0.5
    )
    assert 0 < about["zero_weights"] < 0.3 and about["bits_per_weight"] >= (8 if kind == "int8" else 4.5)
    costs = macs.dense_sites(model)
    assert sum(c.dense_bytes for c in costs.values()) == sum(m.packed.bytes for m in maps.values())
    site = find_blocks(model)[0].sites["gate"]
    assert type(swap(model, site, 0.3)) is QuantSparseLinear


@pytest.mark.parametrize("bits", [8, 4])
def test_the_product_with_nothing_skipped_is_the_dense_one(bits):
    """Check 10: the sparse map at p = 0 and the dense map give the same logits through the same kernel, to the bit."""
    model = tiny_model()
    quantise(model, f"int{bits}", 32, "input", "cpu_numba")
    sparse = storage.sharing_copy(model)
    for block in find_blocks(sparse):
        for site in block.sites.values():
            swap(sparse, site, -1.0, kernel="cpu_numba")
    tokens = IDS[:1, :1]
    assert torch.equal(model(input_ids=tokens).logits, sparse(input_ids=tokens).logits)
    torch.testing.assert_close(model(input_ids=IDS).logits, sparse(input_ids=IDS).logits)


@pytest.mark.parametrize("bits", [8, 4])
def test_torch_s_own_products_are_of_the_same_weights(bits):
    linear = torch.nn.Linear(128, 96)
    dense = QuantLinear(quantised(linear.weight, bits, 32), linear.bias)
    x = torch.randn(1, 3, 128)
    assert error(TorchQuantLinear(dense)(x), dense(x)) < 1e-4
    with pytest.raises(ValueError, match="torch has no quantised product for"):
        TorchQuantLinear(QuantLinear(quantised(linear.weight, 4, 48), None))
    model = tiny_model(hidden_size=64, intermediate_size=128)
    quantise(model, f"int{bits}", 32, "input", "cpu_numba")
    expected = model(input_ids=IDS).logits
    with_torch_products(model)
    assert error(model(input_ids=IDS).logits, expected) < 1e-3


def test_what_no_kernel_serves_is_unpacked_and_masked():
    narrow = QuantLinear(quantised(torch.randn(20, 30), 4, 16, "output"), None, kernel="cpu_numba")
    assert kernels.ran("cpu_numba", narrow.packed, "quantised_linear") == "masked_dense"
    x = torch.randn(1, 1, 30)
    expected = masked_dense.quantised_linear(x, narrow.packed, threshold=-1.0)
    torch.testing.assert_close(narrow(x), expected)
