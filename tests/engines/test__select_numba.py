"""The largest k inside the fused CPU step: exactly k, those of torch, ties and zeros included; and the whole step."""

import numpy as np
import pytest
import torch

from sparsebench import engines
from sparsebench.engines import fused_cpu
from sparsebench.engines._select_numba import compact_largest
from sparsebench.kernels._packed import quantised
from sparsebench.modules.input_sparse import InputSparseLinear, replace, sparse_of
from sparsebench.modules.quant_sparse import QuantLinear
from sparsebench.sites import find_blocks
from tests.helpers import check_against_the_model, tiny_model

IDS = torch.randint(0, 320, (1, 24), generator=torch.Generator().manual_seed(0))


def selected(x, k, scale=None):
    n = len(x)
    index, values = np.full(n + 1, -1, np.int64), np.full((1, n + 1), np.nan, np.float32)
    given = np.empty(0, np.float32) if scale is None else scale.numpy()
    count = compact_largest(x.numpy(), k, given, index, values)
    return index[:count].tolist(), values[0, :count].tolist()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("n, k", [(1, 1), (64, 1), (64, 32), (64, 64), (1000, 377), (1000, 2000)])
def test_the_largest_are_those_of_torch(n, k, scaled):
    generator = torch.Generator().manual_seed(n + k)
    x = torch.randn(n, generator=generator) * 10 ** torch.randint(-20, 20, (n,), generator=generator).float()
    scale = torch.rand(n, generator=generator) + 0.5 if scaled else None
    score = x.abs() * (1 if scale is None else scale)
    expected = sorted(score.topk(min(k, n)).indices.tolist())
    index, values = selected(x, k, scale)
    assert index == expected and values == x[expected].tolist()


def test_of_equal_ones_exactly_k_are_kept_and_zeros_never():
    assert selected(torch.tensor([1.0, -1.0, 1.0, 2.0, -1.0]), 3)[0] == [0, 1, 3]
    assert selected(torch.tensor([0.0, 3.0, -0.0, 0.0]), 3)[0] == [1]
    assert selected(torch.zeros(5), 2)[0] == []
    assert selected(torch.tensor([1e-45, 0.0, 3e38]), 2)[0] == [0, 2]


def test_none_are_kept_where_k_is_0():
    """Also in a step, where 0 must not be taken for a map without a k."""
    assert selected(torch.tensor([1.0, -1.0, 1.0]), 0)[0] == []
    model = tiny_model(layers=1)
    (block,) = find_blocks(model)
    for site in block.sites.values():
        top_k = 0 if site.role == "down" else 40
        replace(model, site.path, InputSparseLinear(model.get_submodule(site.path), site.name, 0.0, top_k=top_k))
    fused = fused_cpu.Decoder(model, IDS[:, :20], 4)
    assert fused.parity(IDS[:, 20:21])["logits"] < 1e-5
    model.get_submodule(block.sites["down"].path).top_k = 40
    assert fused.parity(IDS[:, 20:21])["logits"] > 1e-3, "down adds nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [False, True])
def test_a_step_with_the_largest_k_is_the_models(dtype, scale):
    model = tiny_model().to(dtype)
    for block in find_blocks(model):
        for i, site in enumerate(block.sites.values()):
            linear = model.get_submodule(site.path)
            n = linear.weight.shape[1]
            norms = torch.rand(n, generator=torch.Generator().manual_seed(i)) + 0.5 if scale else None
            replace(model, site.path, InputSparseLinear(linear, site.name, 0.0, scale=norms, top_k=n // 2 - i))
    assert fused_cpu.unsupported(model) is None
    fused = fused_cpu.Decoder(model, IDS[:, :20], 4)
    assert fused.parity(IDS[:, 20:21])["logits"] < 1e-5
    if dtype == torch.float32:
        check_against_the_model(model, fused, IDS, range(20, 24), 1e-4)
    sparse = fused.parity(IDS[:, 20:21])
    for module in model.modules():
        if isinstance(module, InputSparseLinear):
            module.threshold.fill_(-1)
    assert fused.parity(IDS[:, 20:21])["logits"] < 1e-5 and sparse, "a negative threshold keeps all"


def with_largest(bits=None):
    """A model that keeps the largest k at every map, another k at each; its weights quantised to `bits`."""
    model = tiny_model()
    for block in find_blocks(model):
        for i, site in enumerate(block.sites.values()):
            linear = model.get_submodule(site.path)
            k = linear.weight.shape[1] // 2 - i
            linear = QuantLinear(quantised(linear.weight, bits, 32), linear.bias) if bits else linear
            replace(model, site.path, sparse_of(linear, site.name, 0.0, top_k=k))
    return model


@pytest.mark.parametrize("bits", [8, 4])
def test_a_step_of_quantised_weights_selects_the_largest_k(bits):
    """Scales and zero points have columns of their own beside k: one that overwrote the other would show here."""
    fused = fused_cpu.Decoder(with_largest(bits), IDS[:, :20], 4)
    assert fused.parity(IDS[:, 20:21])["logits"] < 1e-5
    reference = engines.Decoder(fused.module, IDS[:, :20], 4, compiled=False)
    for i in range(20, 24):
        expected, actual = reference.step(IDS[:, i : i + 1]), fused.step(IDS[:, i : i + 1])
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
