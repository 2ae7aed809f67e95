"""The neuron-sparse FFN and its activations against plain formulas; every kernel against masked dense."""

import copy

import pytest
import torch

from sparsebench import engines, kernels
from sparsebench.engines import check
from sparsebench.measure import latency, macs, sparsity
from sparsebench.modules.activations import Activation, FATReLU, ShiftedReLU
from sparsebench.modules.neuron_sparse import NeuronSparseFFN, ffn_path, neuron_norms, product, swap
from sparsebench.sites import find_blocks
from tests.helpers import CPU_KERNELS, accounted, tiny_model, work


def ffn_of(kind="llama", activation=None, kernel=None, **arguments):
    """(the model's own first FFN, a neuron-sparse one with copies of its weights)."""
    model = tiny_model(kind, layers=1)
    block = find_blocks(model)[0]
    own = copy.deepcopy(model.get_submodule(ffn_path(block)))
    return own, swap(model, block, activation or FATReLU(), kernel=kernel, **arguments)


def x_of(*shape):
    return torch.randn(*shape, 64, generator=torch.Generator().manual_seed(1))


def test_silu_without_zeros_is_the_ffn_it_replaced():
    own, sparse = ffn_of(activation=Activation("silu"))
    x = x_of(2, 5)
    assert torch.equal(own(x), sparse(x))


def test_relu_gated_formula():
    own, sparse = ffn_of()
    x = x_of(2, 5)
    torch.testing.assert_close(sparse(x), own.down_proj(own.gate_proj(x).relu() * own.up_proj(x)), rtol=1e-5, atol=1e-5)


def test_plain_ffn_with_bias():
    own, sparse = ffn_of("gpt2")
    x = x_of(2, 5)
    expected = own.c_proj(own.c_fc(x).relu())
    torch.testing.assert_close(sparse(x), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for kernel in CPU_KERNELS:
            one = ffn_of("gpt2", kernel=kernel)[1](x[:1, :1])
            torch.testing.assert_close(one, expected[:1, :1], rtol=1e-4, atol=1e-5)


class MagnitudeThreshold(Activation):
    """phi(z) where |phi(z)| > threshold: any share of zeros, and gates of both signs."""

    def keep(self, z, a):
        return a.abs() > self.threshold


@pytest.mark.parametrize("kernel", CPU_KERNELS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_sparse_equals_dense_at_every_sparsity(kernel, dtype, tolerance, share):
    """docs/methods/prosparse.md check 6: steps 1-3 with zeros skipped against the dense product of the same gates."""
    _, sparse = ffn_of(activation=MagnitudeThreshold("silu"), kernel=kernel)
    sparse = sparse.to(dtype)
    sparse.lay_out()
    x = x_of(1, 1).to(dtype)
    with torch.no_grad():
        gates = torch.nn.functional.silu(sparse.map("gate")(x)).abs().flatten()
        cut = gates.sort().values[max(int(share * len(gates)) - 1, 0)] if share else torch.tensor(-0.5)
        sparse.threshold.fill_(float(cut))
        sparse.activation.threshold.clamp_(min=0)  # below 0 would mean: skip nothing
        a = sparse.gates(x).double()
        dense = (a * (x.double() @ sparse.map("up").weight.double().t())) @ sparse.map("down").weight.double().t()
        y = sparse(x).double()
    assert float((a == 0).double().mean()) == pytest.approx(share, abs=0.02)
    assert float((y - dense).norm()) <= tolerance * float(dense.norm())
    if share == 1.0:
        assert not y.any()


def test_triton_skips_the_same(monkeypatch):
    """The GPU kernel in its interpreter, through the module."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1 before Python starts")
    _, sparse = ffn_of(kernel="cuda_triton")
    x = x_of(1, 1)
    with torch.no_grad():
        y = sparse(x)
        sparse.kernel_name = "masked_dense"
        torch.testing.assert_close(y, sparse(x), rtol=1e-4, atol=1e-4)


def test_drelu_formula_and_its_one_token_call():
    own, sparse = ffn_of(up_activation="relu", kernel=CPU_KERNELS[0])
    x = x_of(1, 4)
    expected = own.down_proj(own.gate_proj(x).relu() * own.up_proj(x).relu())
    torch.testing.assert_close(sparse(x), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x[:, :1]), expected[:, :1], rtol=1e-4, atol=1e-5)
    assert set(sparse.covers) == {"0.down"}  # rows of up are not known to be unused before they are computed


def test_fatrelu():
    """docs/methods/prosparse.md check 5: t = 0 is ReLU; zeros never fall with t; z >= t is kept, ties included, and only that."""
    z = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(FATReLU(0.0)(z), z.relu())
    counts = [int((FATReLU(t)(z) == 0).sum()) for t in (0.0, 0.005, 0.01, 0.5, 1.0)]
    assert counts == sorted(counts)
    assert FATReLU(0.5)(torch.tensor([0.5, 0.4999, -1.0, 2.0])).tolist() == [0.5, 0.0, 0.0, 2.0]
    _, sparse = ffn_of(activation=FATReLU(0.3))
    x = x_of(2, 5)
    seen = []
    sparse.map("down").register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    sparse(x)
    gates = sparse.map("gate")(x)
    assert not seen[0][gates < 0.3].any() and seen[0][gates >= 0.3].all()


def test_shifted_relu():
    z = torch.tensor([-1.0, 0.05, 0.1, 0.6])
    torch.testing.assert_close(ShiftedReLU(0.1)(z), torch.tensor([0.0, 0.0, 0.0, 0.5]))


def test_counts_go_to_the_sites_that_skip():
    model = tiny_model(layers=2)
    for block in find_blocks(model):
        swap(model, block, FATReLU(), kernel="masked_dense")
    dense = macs.dense_sites(model)
    with sparsity.counting(model) as counters, torch.no_grad():
        model(input_ids=torch.arange(12).view(2, 6), use_cache=False)
    actual = sparsity.summarise(model, counters)
    assert set(actual) == {"0.up", "0.down", "1.up", "1.down"}
    assert actual["0.up"].weight == 64 * 160 and actual["0.up"].sparse_tokens == 12
    assert actual["0.up"].sparsity == actual["0.down"].sparsity
    for skips in (True, False):
        costs, _ = accounted(dense, model, actual, 8, skips)
        share = {s: 1 - f.sparsity for s, f in actual.items()}
        blocks = sum(c.dense_macs * share.get(s, 1.0) for s, c in dense.items())
        assert costs["sparse"] - costs["parts"]["head"] - costs["parts"]["attention"] == pytest.approx(blocks)
        assert costs["executed"] == pytest.approx(costs["sparse"] if skips else costs["dense"])


def test_find_blocks_sees_the_maps_as_before():
    model = tiny_model()
    before = [b.sites for b in find_blocks(model)]
    for block in find_blocks(model):
        swap(model, block, FATReLU(), kernel="masked_dense")
    assert [b.sites for b in find_blocks(model)] == before


def test_parity_and_nothing_skipped():
    """measure's two hooks: kernel against masked dense, and thresholds at -1 keep every neuron."""
    model = tiny_model()
    for block in find_blocks(model):
        swap(model, block, FATReLU(), kernel=CPU_KERNELS[0])
    step = lambda: model(input_ids=torch.tensor([[3]]), use_cache=False)  # noqa: E731
    with torch.no_grad():
        errors = check.parity(model, step)
        assert set(errors) == {"0.ffn", "1.ffn"} and max(errors.values()) < 1e-4
        ffn = next(m for m in model.modules() if isinstance(m, NeuronSparseFFN))
        x = x_of(1, 1)
        with latency.dial(model) as turn:
            turn(0.0)
            assert (ffn.gates(x) != 0).all()
        assert (ffn.gates(x) == 0).any()


def test_decode_falls_back_from_the_fused_step(tmp_path):
    model = tiny_model()
    hardware = work(tmp_path).hardware
    hardware.kernel_name = CPU_KERNELS[0]
    block = find_blocks(model)[0]
    swap(model, block, FATReLU(), kernel=CPU_KERNELS[0])
    assert engines.choose(model, hardware) == "eager"


def test_a_fused_ffn_is_refused():
    from dataclasses import replace

    block = find_blocks(tiny_model(layers=1))[0]
    sites = {r: s for r, s in block.sites.items() if r not in ("gate", "up")} | {"gate_up": block.sites["up"]}
    with pytest.raises(ValueError, match="need gate, up, down or fc1, fc2"):
        ffn_path(replace(block, sites=sites))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_neuron_norms_are_those_of_the_outputs(kind):
    """docs/methods/metrics.md check 6: |x1_i| ||W_d[:, i]|| = ||W_d[:, i] x1_i||."""
    model = tiny_model(kind, layers=1)
    block = find_blocks(model)[0]
    last = model.get_submodule(block.sites["down" if kind == "llama" else "fc2"].path)
    norms = neuron_norms(model, block)
    x1 = torch.randn(len(norms), generator=torch.Generator().manual_seed(2))
    explicit = torch.stack(
        [product(last, x1 * torch.nn.functional.one_hot(torch.tensor(i), len(x1))).norm() for i in range(len(x1))]
    )
    torch.testing.assert_close(norms * x1.abs(), explicit, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", [*CPU_KERNELS, "cuda_triton"])
@pytest.mark.parametrize("rows", [1, 3])
def test_output_sparse_linear(kernel, rows):
    """Only kept rows of the weight, in every backend that has it."""
    if kernel == "cuda_triton" and not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1 before Python starts")
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(rows, 1, 64, generator=generator), torch.randn(48, 64, generator=generator)
    for share in (0.0, 0.4, 1.0):
        keep = torch.rand(rows, 1, 48, generator=generator) < share
        y = kernels.load(kernel).output_sparse_linear(x, weight, keep)
        torch.testing.assert_close(y, torch.where(keep, x @ weight.t(), 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arguments", [{}, {"up_activation": "relu"}])
def test_can_be_compiled_without_graph_breaks(arguments):
    """decode's compiled engine needs fullgraph."""
    _, sparse = ffn_of(kernel="masked_dense", **arguments)
    x = x_of(1, 1)
    with torch.no_grad():
        compiled = torch.compile(sparse, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), sparse(x))
