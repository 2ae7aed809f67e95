"""Expert FFNs and routers on a GPU."""

import pytest
import torch

from sparsebench import kernels
from sparsebench.experts import routers
from sparsebench.modules.base import MANY
from sparsebench.modules.expert_ffn import ExpertFFN
from tests.kernel_checks import FFNS, check_fp32, check_half, check_router, model_of, tensors, x_of


def on_gpu(d, num_experts, size, gated, dtype, rows, share, bias=True):
    """(x, keep, maps, float64 result, relative error of a result) with values as in a model; a token without experts."""
    maps = tensors(d=d, f=num_experts * size, n=d, gated=gated, bias=bias, dtype=dtype, device="cuda")
    maps = {k: v * (d**-0.5 / 0.3 if v.dim() == 2 else 1) for k, v in maps.items()}
    x = x_of(rows, d=d, dtype=dtype).cuda()
    keep = torch.rand(rows, num_experts, generator=torch.Generator().manual_seed(3)).cuda() < share
    wide = {k: v.double() for k, v in maps.items()}
    first, last = wide.pop("first"), wide.pop("last")
    expected = kernels.load("masked_dense").expert_ffn(x.double(), keep, first, last, "silu", **wide)
    return x, keep, maps, lambda y: float((y.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_router_on_the_gpu(dtype):
    check_router(dtype, "cuda")


@pytest.mark.gpu
def test_triton_kernels_on_the_gpu():
    for rows in (1, 3, 37, 500):
        for gated, activation in FFNS:
            check_fp32("cuda_triton", rows, gated, activation, "cuda")
        for dtype in (torch.float16, torch.bfloat16):
            check_half("cuda_triton", rows, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_many_tokens_on_the_gpu(dtype, limit, gated):
    """The tiles that are timed: docs/methods/d2dmoe.md's experts of 128, many blocks of tokens; sizes that no tile divides."""
    shapes = (768, 24, 128, 3000), (200, 7, 37, 1111), (256, 70, 16, 777), (128, 3, 200, 300)
    for d, num_experts, size, rows in shapes:
        for share in (0.0, 0.3, 1.0):
            x, keep, maps, error = on_gpu(d, num_experts, size, gated, dtype, rows, share)
            served = kernels.serving("cuda_gather", x, maps["first"], "expert_ffn", maps["last"])
            assert served is kernels.load("cuda_triton")
            y = served.expert_ffn(x, keep, maps.pop("first"), maps.pop("last"), "silu", **maps)
            assert error(y) < limit, (d, share)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype, limit", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_one_token_on_the_gpu(dtype, limit, gated):
    """docs/methods/lte.md's shape and small and odd ones, twice each: buffers are left as they were found."""
    served = kernels.load("cuda_gather")
    for d, num_experts, size in ((4096, 344, 32), (768, 24, 128), (40, 5, 3), (1032, 2000, 1)):
        for share in (0.0, 0.5, 1.0, 0.5):
            x, keep, maps, error = on_gpu(d, num_experts, size, gated, dtype, 1, share, bias=share != 1)
            first, last = maps.pop("first"), maps.pop("last")
            y = served.expert_ffn(x, keep, first, last, "silu", **maps)
            assert error(y) < limit, (d, share)
    for name in ("relu", "gelu", "gelu_tanh"):
        y = served.expert_ffn(x, keep, first, last, name, **maps)
        wide = {k: v.double() for k, v in maps.items()}
        expected = kernels.load("masked_dense").expert_ffn(
            x.double(), keep, first.double(), last.double(), name, **wide
        )
        assert float((y - expected).norm() / expected.norm()) < limit


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 300])
def test_expert_ffn_in_a_cuda_graph(rows, dtype):
    """Captured twice in a row, replayed on new input: router, rule and experts follow it."""
    maps = {k: v.cuda() for k, v in tensors(d=512, f=1024, n=512, gated=True, bias=False, dtype=dtype).items()}
    actual = ExpertFFN(maps, "silu", 32, site="0.ffn", dense_macs={"0.fc1": 1}, kernel="cuda_gather")
    actual.router = routers.random_router(512, None, 32, torch.Generator().manual_seed(0)).cuda()
    routers.harden(model_of(actual), "above", 0.5, kernel="cuda_gather")
    x = x_of(rows, d=512, dtype=dtype).cuda()
    with torch.no_grad():
        actual(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actual(x)
            y = actual(x)
        for seed in (5, 6):
            x.copy_(x_of(rows, d=512, dtype=dtype, seed=seed).cuda())
            for _ in range(20):
                graph.replay()
            keep = (x.double() @ actual.router.first.double().t()) > 0
            wide = {k: v.double() for k, v in maps.items()}
            first, last = wide.pop("first"), wide.pop("last")
            expected = kernels.load("masked_dense").expert_ffn(x.double(), keep, first, last, "silu", **wide)
            assert float((y.double() - expected).norm() / expected.norm()) < 1e-2
            assert torch.equal(actual.keep(x), keep)
    assert actual.kernel(1) == "cuda_gather" and actual.kernel(MANY) == "cuda_triton"


@pytest.mark.gpu
def test_expert_ffn_compiles_for_one_token():
    maps = {k: v.cuda() for k, v in tensors(d=64, f=96, n=64, gated=True, dtype=torch.float16).items()}
    actual = ExpertFFN(maps, "silu", 6, site="0.ffn", dense_macs={"0.fc1": 1}, kernel="cuda_gather")
    actual.router = routers.random_router(64, None, 6, torch.Generator().manual_seed(0)).cuda()
    routers.harden(model_of(actual), "above", 0.5, kernel="cuda_gather")
    x = x_of(1, 1, d=64, dtype=torch.float16).cuda()
    with torch.no_grad():
        expected = actual(x)
        torch.testing.assert_close(torch.compile(actual, fullgraph=True)(x), expected)
