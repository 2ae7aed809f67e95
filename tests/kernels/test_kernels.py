"""Kernels against an fp32 masked reference: shapes drawn at random, odd sizes, all kept, none kept (docs/methods/teal.md, check 11)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsebench import kernels
from sparsebench.kernels import cpu_numba, masked_dense
from tests.kernel_checks import KERNEL_SHAPES, LIMIT, error, inputs


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    cpu_numba.prepare(request.param)
    yield request.param
    cpu_numba.prepare(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_input_sparse_linear(dtype, threads, monkeypatch):
    monkeypatch.setattr(cpu_numba, "PARALLEL_BYTES", 1)  # threads take part at every size
    for i, (m, n, rows) in enumerate(KERNEL_SHAPES):
        torch.manual_seed(i)
        x, weight, bias, scale = inputs(m, n, rows, dtype)
        for threshold in (-1.0, 0.3, 0.9, 1e9):
            for use_bias, use_scale in ((None, None), (bias, scale)):
                actual = cpu_numba.input_sparse_linear(x, weight, use_bias, threshold=threshold, scale=use_scale)
                reference = masked_dense.input_sparse_linear(
                    x.float(),
                    weight.float(),
                    None if use_bias is None else bias.float(),
                    threshold=threshold,
                    scale=use_scale,
                )
                assert actual.shape == (rows, 1, m) and actual.dtype == dtype
                assert error(actual, reference) < LIMIT[dtype], (m, n, rows, threshold)


def test_cpu_none_kept_gives_the_bias():
    x, weight, bias, _ = inputs(40, 30, 1, torch.float32)
    assert torch.equal(cpu_numba.input_sparse_linear(x, weight, bias, threshold=1e9)[0, 0], bias)


def test_cpu_mask_and_low_rank():
    for rows in (1, 3):
        x, weight, bias, _ = inputs(45, 70, rows, torch.float32)
        keep = torch.rand(rows, 1, 70) > 0.5
        low_rank = (torch.randn(70, 5), torch.randn(5, 45))
        actual = cpu_numba.input_sparse_linear(x, weight, bias, keep=keep, low_rank=low_rank)
        reference = masked_dense.input_sparse_linear(x, weight, bias, keep=keep, low_rank=low_rank)
        assert error(actual, reference) < 1e-5


def test_cpu_reads_only_kept_channels():
    """NaN in the weights of dropped channels must not matter: they are not read."""
    x, weight, bias, _ = inputs(64, 50, 1, torch.float32)
    dropped = x[0, 0].abs() <= 0.7
    poisoned = weight.clone().t().contiguous().t()
    poisoned[:, dropped] = float("nan")
    actual = cpu_numba.input_sparse_linear(x, poisoned, bias, threshold=0.7)
    assert error(actual, masked_dense.input_sparse_linear(x, weight, bias, threshold=0.7)) < 1e-5


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


def test_cpu_neuron_sparse_ffn(threads, monkeypatch):
    """ProSparse's exact operators, check 6 of docs/methods/prosparse.md: dense result at every sparsity, zeros for zeros."""
    monkeypatch.setattr(cpu_numba, "PARALLEL_BYTES", 1)
    for dtype in (torch.float32, torch.bfloat16):
        for i, (d, f, rows) in enumerate(KERNEL_SHAPES[3:15]):
            torch.manual_seed(i)
            x, up = torch.randn(rows, 1, d).to(dtype), torch.randn(f, d).to(dtype)
            down = torch.randn(f, d).to(dtype).t()
            for share in (0.0, 0.5, 0.9, 1.0):
                gate = torch.rand(rows, 1, f).to(dtype) * (torch.rand(rows, 1, f) >= share)
                actual = cpu_numba.neuron_sparse_ffn(x, gate, up, down)
                reference = masked_dense.neuron_sparse_ffn(x.float(), gate.float(), up.float(), down.float())
                if share == 1.0:
                    assert not actual.any()
                else:
                    assert error(actual, reference) < LIMIT[dtype]


def test_cpu_neuron_sparse_ffn_reads_only_active_neurons():
    x, up, down = torch.randn(1, 1, 20), torch.randn(30, 20), torch.randn(30, 20).t()
    gate = torch.relu(torch.randn(1, 1, 30))
    reference = masked_dense.neuron_sparse_ffn(x, gate, up, down)
    inactive = gate[0, 0] == 0
    up[inactive] = float("nan")
    down.t()[inactive] = float("nan")
    assert error(cpu_numba.neuron_sparse_ffn(x, gate, up, down), reference) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# GPU kernels: the same checks through Triton's interpreter (in a process of its own) and on a GPU


TRITON_ON_CPU = """
import torch
from tests.kernel_checks import KERNEL_SHAPES, TILED, check_largest, check_mask, check_triton
check_triton("cpu", {shapes}, (torch.float32, torch.bfloat16))
check_mask("cpu")
check_largest("cpu")
print("checked")
"""


@pytest.mark.parametrize("shapes", ["TILED", pytest.param("KERNEL_SHAPES[3:6]", marks=pytest.mark.slow)])
def test_triton_kernels_through_the_interpreter(shapes):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", TRITON_ON_CPU.format(shapes=shapes)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=root,
    )
    assert done.stdout.strip() == "checked", done.stderr
