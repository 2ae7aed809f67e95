"""Kernels against an fp32 masked reference: shapes drawn at random, odd sizes, all kept, none kept (teal.md, check 11)."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsebench import kernels
from sparsebench.kernels import cpu_numba, masked_dense
from sparsebench.modules.input_sparse import InputSparseLinear

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
                    x.float(),
                    weight.float(),
                    None if use_bias is None else bias.float(),
                    threshold=threshold,
                    scale=use_scale,
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


def test_cpu_neuron_sparse_ffn(threads, monkeypatch):
    """ProSparse's exact operators, check 6 of prosparse.md: dense result at every sparsity, zeros for zeros."""
    monkeypatch.setattr(cpu_numba, "PARALLEL_BYTES", 1)
    for dtype in (torch.float32, torch.bfloat16):
        for i, (d, f, rows) in enumerate(SHAPES[3:15]):
            torch.manual_seed(i)
            x, up = torch.randn(rows, 1, d).to(dtype), torch.randn(f, d).to(dtype)
            down = torch.randn(f, d).to(dtype).t()
            for share in (0.0, 0.5, 0.9, 1.0):
                gate = torch.rand(rows, 1, f).to(dtype) * (torch.rand(rows, 1, f) >= share)
                found = cpu_numba.neuron_sparse_ffn(x, gate, up, down)
                reference = masked_dense.neuron_sparse_ffn(x.float(), gate.float(), up.float(), down.float())
                if share == 1.0:
                    assert not found.any()
                else:
                    assert error(found, reference) < LIMIT[dtype]


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


def check_triton(device: str, shapes, dtypes) -> None:
    from sparsebench.kernels import cuda_triton

    for i, (m, n, rows) in enumerate(shapes):
        for dtype in dtypes:
            torch.manual_seed(i)
            x, weight, bias, scale = (t.to(device) for t in inputs(m, n, rows, dtype))
            weight = weight.t().contiguous().t()
            low_rank = tuple(t.to(device, dtype) for t in (torch.randn(n, 3), torch.randn(3, m)))
            for threshold in (-1.0, 0.7, 1e9):
                found = cuda_triton.input_sparse_linear(
                    x, weight, bias, threshold=threshold, scale=scale, low_rank=low_rank
                )
                wide = tuple(t.float() for t in low_rank)
                reference = masked_dense.input_sparse_linear(
                    x.float(), weight.float(), bias.float(), threshold=threshold, scale=scale, low_rank=wide
                )
                assert error(found, reference) < LIMIT[dtype], (m, n, rows, dtype, threshold)
            gate, up = torch.relu(torch.randn(rows, 1, m)).to(device, dtype), torch.randn(m, n).to(device, dtype)
            down = torch.randn(m, n).to(device, dtype).t()
            found = cuda_triton.neuron_sparse_ffn(x, gate, up, down)
            reference = masked_dense.neuron_sparse_ffn(x.float(), gate.float(), up.float(), down.float())
            assert error(found, reference) < LIMIT[dtype], (m, n, rows, dtype)
            assert not cuda_triton.neuron_sparse_ffn(x, torch.zeros_like(gate), up, down).any()


TRITON_ON_CPU = """
import torch
from tests.test_kernels import SHAPES, check_triton
check_triton("cpu", SHAPES[:1] + SHAPES[3:6], (torch.float32, torch.bfloat16))
print("checked")
"""


def test_triton_kernels_through_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", TRITON_ON_CPU], capture_output=True, text=True, env=environment, cwd=root
    )
    assert done.stdout.strip() == "checked", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triton_kernels_on_the_gpu(dtype):
    check_triton("cuda", SHAPES, (dtype,))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cuda_product(dtype):
    """50 shapes at random, fresh inputs, outputs poisoned, twice in a row: nothing is left over."""
    from sparsebench.kernels import cuda_gather

    for i, (m, n, _) in enumerate(SHAPES):
        torch.manual_seed(i)
        m = -(-m // 8) * 8  # noqa: PLW2901
        x, weight, bias, scale = (t.cuda() for t in inputs(m, n, 1, dtype))
        weight = weight.t().contiguous().t()
        for threshold in (-1.0, 0.7, 1e9):
            limit = torch.tensor(threshold, device="cuda")
            reference = masked_dense.input_sparse_linear(
                x.float(), weight.float(), bias.float(), threshold=threshold, scale=scale
            )
            for _ in range(2):
                torch.full((m,), float("nan"), device="cuda", dtype=dtype)
                found = cuda_gather.input_sparse_linear(x, weight, bias, threshold=limit, scale=scale)
                assert error(found, reference) < LIMIT[dtype], (m, n, threshold)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda_gather", "cuda_triton"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_gpu_neuron_sparse_ffn(name, share):
    backend = kernels.load(name)
    for dtype in (torch.float16, torch.bfloat16):
        x, up, down = (torch.randn(*s, device="cuda").to(dtype) / 8 for s in ((1, 1, 72), (136, 72), (72, 136)))
        activation = torch.randn(1, 1, 136, device="cuda").to(dtype)
        activation = torch.where(torch.rand_like(activation) < share, activation, 0)
        reference = masked_dense.neuron_sparse_ffn(x.float(), activation.float(), up.float(), down.float())
        for _ in range(2):
            torch.full((72,), float("nan"), device="cuda", dtype=dtype)
            found = backend.neuron_sparse_ffn(x, activation, up, down.t().contiguous().t())
            assert error(found, reference) < LIMIT[dtype] or not share


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("top_k", [None, 40])
def test_gpu_hybrid_map_of_any_rank(top_k, dtype):
    """R-Sparse's remainder, by threshold and by count, with ranks that fill no whole row of 16 bytes."""
    for rank in (1, 51, 64):
        torch.manual_seed(rank)
        x, weight, bias, scale = (t.cuda() for t in inputs(264, 136, 1, dtype))
        linear = torch.nn.Linear(136, 264, device="cuda", dtype=dtype)
        linear.weight.data, linear.bias.data = weight, bias
        low_rank = tuple((torch.randn(*s, device="cuda") / 8).to(dtype) for s in ((136, rank), (rank, 264)))
        sparse = InputSparseLinear(
            linear, "0.q", 0.7, scale=scale, top_k=top_k, low_rank=low_rank, kernel="cuda_gather"
        )
        keep, wide = sparse.keep(x), [t.float() for t in low_rank]
        reference = masked_dense.input_sparse_linear(x.float(), weight.float(), bias.float(), keep=keep, low_rank=wide)
        for _ in range(2):
            assert error(sparse(x[None]), reference) < LIMIT[dtype], rank


@pytest.mark.gpu
@pytest.mark.parametrize("remainder", [False, True])
@pytest.mark.parametrize("name", ["cuda_gather", "cuda_triton"])
def test_gpu_products_compile_and_capture(name, remainder):
    """Compiled before it ever ran, and really captured in a CUDA graph."""
    from torch._dynamo.utils import counters

    backend = kernels.load(name)
    x, weight, bias, _ = (t.cuda() for t in inputs(1256, 128, 1, torch.float16))
    weight, limit = weight.t().contiguous().t(), torch.tensor(0.7, device="cuda")
    factors = [torch.randn(*s, device="cuda").half() / 8 for s in ((128, 24), (24, 1256))] if remainder else None

    def product(x):
        return backend.input_sparse_linear(x, weight, bias, threshold=limit, low_rank=factors) + 1

    counters.clear()
    compiled = torch.compile(product, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(compiled(x).clone(), product(x), rtol=1e-2, atol=1e-2)
    assert not counters["inductor"]["cudagraph_skips"]


@pytest.mark.gpu
def test_cuda_product_refuses_what_it_can_not_do():
    from sparsebench.kernels import cuda_gather

    x, weight, *_ = (t.cuda() for t in inputs(16, 12, 2, torch.float16))
    with pytest.raises(ValueError, match="one row"):
        cuda_gather.input_sparse_linear(x, weight.t().contiguous().t(), threshold=torch.tensor(0.5, device="cuda"))
