"""Products of few rows and attention over kept heads: CUDA kernels built for the CPU, numba, against masked references.

docs/methods/chunk.md, check 10; docs/methods/polar.md, checks 4 and 6.
"""

import ctypes

import pytest
import torch

from sparsebench.kernels import _heads_cuda, _nvrtc, cpu_numba, cuda_gather, cuda_rows, masked_dense
from tests.kernel_checks import LIMIT, check_selective_attention, error, inputs

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture
def on_cpu(emulated, monkeypatch):
    """Both CUDA files with their own host code on CPU tensors: a GPU of 2 processors; shared memory is checked."""

    def built(name, weight, tuning, shared):
        half = {"BF16": 1} if weight.dtype == torch.bfloat16 else {}
        sizes = {"WARPS": tuning.warps, "LOADS": tuning.loads, "WIDE": tuning.wide}
        return emulated(cuda_rows.SOURCE, **sizes, **half, HEAD_DIM=64, GROUP=1, SPLITS=1), name

    def built_heads(name, q, head_dim, group, splits, shared):
        half = {"BF16": 1} if q.dtype == torch.bfloat16 else {}
        sizes = {"WARPS": _heads_cuda.WARPS, "LOADS": _heads_cuda.LOADS, "WIDE": 1}
        return emulated(_heads_cuda.SOURCE, **sizes, **half, HEAD_DIM=head_dim, GROUP=group, SPLITS=splits), name

    def launch(kernel, grid, threads, shared, arguments, overlap):
        library, name = kernel
        getattr(library, f"run_{name}")(*grid, shared, *(ctypes.byref(a) for a in arguments))
        assert library.count_overruns() == 0, f"{name} wrote past its shared memory"

    monkeypatch.setattr(cuda_rows, "built", built)
    monkeypatch.setattr(cuda_rows, "tuning_for", lambda rows: cuda_gather.Tuning(2, 2, 1, 3.0))
    monkeypatch.setattr(cuda_rows, "rows_linear", cuda_rows.run_rows)
    monkeypatch.setattr(cuda_rows, "_workspaces", {})
    monkeypatch.setattr(cuda_gather, "processors", lambda device: 2)
    monkeypatch.setattr(_heads_cuda, "built", built_heads)
    monkeypatch.setattr(_heads_cuda, "WARPS", 2)
    monkeypatch.setattr(_heads_cuda, "POSITIONS_PER_SPLIT", 32)
    monkeypatch.setattr(_heads_cuda, "MAX_SPLITS", 2)
    monkeypatch.setattr(_heads_cuda, "heads_attention", _heads_cuda.run_heads)
    monkeypatch.setattr(_heads_cuda, "_arrived", {})
    monkeypatch.setattr(_nvrtc, "launch", launch)


@pytest.mark.parametrize("dtype", HALVES)
def test_few_rows_equal_masked_dense(on_cpu, dtype):
    """2 to 16 rows, odd sizes past a tile and a chunk, none to all kept; each row's own mask holds inside the union;
    weights of channels that no row keeps may be NaN; workspaces stay zero and a second call is as the first."""
    for m, n, rows in ((264, 37, 2), (8, 131, 3), (40, 150, 8), (16, 20, 16)):
        torch.manual_seed(rows)
        x, weight, bias, scale = inputs(m, n, rows, dtype)
        for threshold in (-1.0, 0.7, 1.6, 1e9):
            limit, c = torch.tensor(threshold), None if threshold == 1.6 else scale
            union = masked_dense.kept(x.float(), threshold, c).flatten(0, 1).any(0)
            poisoned = weight.t().clone()
            poisoned[~union] = float("nan")
            reference = masked_dense.input_sparse_linear(
                x.float(), weight.float(), bias.float(), threshold=threshold, scale=c
            )
            for _ in range(2):
                y = cuda_rows.input_sparse_linear(x, poisoned.t(), bias, threshold=limit, scale=c)
                assert y.shape == (rows, 1, m) and y.dtype == dtype
                assert error(y, reference) < LIMIT[dtype], (m, n, rows, threshold)
            assert not any(t.any() for t in cuda_rows._workspaces[x.device, m])


def test_few_rows_take_a_mask_and_a_low_rank_remainder(on_cpu):
    x, weight, bias, _ = inputs(40, 70, 4, torch.float16)
    low_rank = torch.randn(70, 8).half() / 8, torch.randn(8, 40).half() / 8
    keep = torch.rand(4, 1, 70) > 0.5
    for rule in ({"keep": keep}, {"threshold": torch.tensor(0.6)}):
        y = cuda_rows.input_sparse_linear(x, weight, bias, **rule, low_rank=low_rank)
        wide = tuple(f.float() for f in low_rank)
        reference = masked_dense.input_sparse_linear(x.float(), weight.float(), bias.float(), **rule, low_rank=wide)
        assert error(y, reference) < 5e-3


def test_the_rows_backend_refuses_one_row_and_more_than_it_was_built_for():
    for rows in (1, 17):
        x, weight, *_ = inputs(16, 12, rows, torch.float16)
        with pytest.raises(ValueError, match="2 to 16 rows"):
            cuda_rows.input_sparse_linear(x, weight, threshold=torch.tensor(0.5))


@pytest.mark.parametrize("dtype", HALVES)
def test_cuda_attention_over_kept_heads(on_cpu, dtype):
    """Check 4 of docs/methods/polar.md on the CUDA kernel, one split of the context and several."""
    check_selective_attention(_heads_cuda.selective_attention, dtype, ((2, 2, 2, 32, 20), (3, 1, 2, 32, 70)))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_attention_over_kept_heads(dtype, threads, monkeypatch):
    """Check 4 of docs/methods/polar.md on the CPU kernel."""
    monkeypatch.setattr(cpu_numba, "PARALLEL_BYTES", 1)
    cpu_numba.prepare(threads)
    shapes = ((1, 1, 1, 8, 1), (2, 2, 3, 16, 20), (3, 4, 1, 24, 33), (2, 1, 4, 64, 70))
    check_selective_attention(cpu_numba.selective_attention, dtype, shapes)
    cpu_numba.prepare(1)
