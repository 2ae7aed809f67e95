"""Kernels against an fp32 masked reference: shapes drawn at random, odd sizes, all kept, none kept (teal.md, check 11)."""

import random

import pytest
import torch

from sparsebench import kernels
from sparsebench.kernels import cpu_numba, masked_dense

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
RANDOM = random.Random(0)
SHAPES = [(1, 1, 1), (33, 8, 2), (4096, 17, 1)] + [
    (RANDOM.randrange(1, 700), RANDOM.randrange(1, 700), RANDOM.randrange(1, 9)) for _ in range(50)
]


def inputs(m, n, rows, dtype):
    weight = torch.randn(m, n).to(dtype).t().contiguous().t()
    return torch.randn(rows, 1, n).to(dtype), weight, torch.randn(m).to(dtype), torch.rand(n) + 0.5


def error(found, reference):
    return float((found.float() - reference).norm() / reference.norm().clamp_min(1e-30))


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    cpu_numba.prepare(request.param)
    yield request.param
    cpu_numba.prepare(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_input_sparse_linear(dtype, threads, monkeypatch):
    monkeypatch.setattr(cpu_numba, "PARALLEL_BYTES", 1)  # threads take part at every size
    for i, (m, n, rows) in enumerate(SHAPES):
        torch.manual_seed(i)
        x, weight, bias, scale = inputs(m, n, rows, dtype)
        for threshold in (-1.0, 0.3, 0.9, 1e9):
            for use_bias, use_scale in ((None, None), (bias, scale)):
                found = cpu_numba.input_sparse_linear(x, weight, use_bias, threshold=threshold, scale=use_scale)
                reference = masked_dense.input_sparse_linear(
                    x.float(), weight.float(), None if use_bias is None else bias.float(), threshold=threshold, scale=use_scale
                )
                assert found.shape == (rows, 1, m) and found.dtype == dtype
                assert error(found, reference) < LIMIT[dtype], (m, n, rows, threshold)


def test_cpu_none_kept_gives_the_bias():
    x, weight, bias, _ = inputs(40, 30, 1, torch.float32)
    assert torch.equal(cpu_numba.input_sparse_linear(x, weight, bias, threshold=1e9)[0, 0], bias)


def test_cpu_mask_and_low_rank():
    for rows in (1, 3):
        x, weight, bias, _ = inputs(45, 70, rows, torch.float32)
        keep = torch.rand(rows, 1, 70) > 0.5
        low_rank = (torch.randn(70, 5), torch.randn(5, 45))
        found = cpu_numba.input_sparse_linear(x, weight, bias, keep=keep, low_rank=low_rank)
        reference = masked_dense.input_sparse_linear(x, weight, bias, keep=keep, low_rank=low_rank)
        assert error(found, reference) < 1e-5


def test_cpu_reads_only_kept_channels():
    """NaN in the weights of dropped channels must not matter: they are not read."""
    x, weight, bias, _ = inputs(64, 50, 1, torch.float32)
    dropped = x[0, 0].abs() <= 0.7
    poisoned = weight.clone().t().contiguous().t()
    poisoned[:, dropped] = float("nan")
    found = cpu_numba.input_sparse_linear(x, poisoned, bias, threshold=0.7)
    assert error(found, masked_dense.input_sparse_linear(x, weight, bias, threshold=0.7)) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: (x.half(), w.half()), "float32 and bfloat16"),
        (lambda x, w: (x, w.contiguous()), "channels contiguous"),
        (lambda x, w: (x.repeat(9, 1, 1), w), "1 to 8 rows"),
        (lambda x, w: (x.bfloat16(), w), "float32 and bfloat16"),
    ],
)
def test_cpu_refuses_what_it_can_not_do(change, message):
    x, weight, *_ = inputs(16, 12, 1, torch.float32)
    with pytest.raises(ValueError, match=message):
        cpu_numba.input_sparse_linear(*change(x, weight), threshold=0.5)


def test_backends_are_found_by_their_files():
    assert {"masked_dense", "cpu_numba"} <= set(kernels.names())
    assert kernels.best("cpu") == "cpu_numba" and not kernels.load("masked_dense").SKIPS
    for name in kernels.names():
        backend = kernels.load(name)
        assert isinstance(backend.RANK, int) and isinstance(backend.SKIPS, bool) and callable(backend.prepare)
