"""Kernels on a GPU against an fp32 masked reference."""

import pytest
import torch

from sparsebench import kernels
from sparsebench.kernels import masked_dense
from sparsebench.modules.cut import Cut, CutFFN, CutLinear, Shared
from sparsebench.modules.input_sparse import InputSparseLinear
from tests.helpers import tiny_model
from tests.kernel_checks import KERNEL_SHAPES, LIMIT, check_largest, check_mask, check_triton, error, inputs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triton_kernels_on_the_gpu(dtype):
    check_triton("cuda", KERNEL_SHAPES, (dtype,))


@pytest.mark.gpu
def test_selection_on_the_gpu():
    check_mask("cuda")
    check_largest("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cuda_product(dtype):
    """50 shapes at random, fresh inputs, outputs poisoned, twice in a row: nothing is left over."""
    from sparsebench.kernels import cuda_gather

    for i, (m, n, _) in enumerate(KERNEL_SHAPES):
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
                actual = cuda_gather.input_sparse_linear(x, weight, bias, threshold=limit, scale=scale)
                assert error(actual, reference) < LIMIT[dtype], (m, n, threshold)


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
            actual = backend.neuron_sparse_ffn(x, activation, up, down.t().contiguous().t())
            assert error(actual, reference) < LIMIT[dtype] or not share


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["cuda_triton", "cuda_gather"])
def test_gpu_cuts_of_one_token(kernel, dtype):
    """Top-p: the mask of a token goes to the kernels that skip, for a map and for a gated FFN chosen by gate or by up."""
    x, cut = torch.randn(1, 1, 64, device="cuda", dtype=dtype), Cut("topp", 0.7)
    mlp = tiny_model().to("cuda", dtype).model.layers[0].mlp
    linear = CutLinear(torch.nn.Linear(64, 136, device="cuda", dtype=dtype), "0.up", Shared(cut, 1), kernel=kernel)
    with torch.no_grad():
        for module in (linear, *(CutFFN(mlp, 0, by, cut=cut, kernel=kernel) for by in ("gate", "up"))):
            assert module.kernel(1).startswith("cuda_")
            actual, module.kernel_name = module(x), "masked_dense"
            assert error(actual, module(x).float()) < LIMIT[dtype]
