"""2:4 activations on sparse tensor cores against the masked product."""

import time

import pytest
import torch

from sparsebench.kernels import cuda_semi24, masked_dense
from sparsebench.modules.group_sparse import GroupSparseLinear, Selection
from tests.kernel_checks import LIMIT, error


def fits(x, weight):
    problem = cuda_semi24.unsupported(x, weight)
    if problem:
        pytest.skip(problem)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "n", "m"), [(32, 64, 8), (128, 576, 1536), (96, 1536, 576), (2048, 4096, 4096)])
def test_gpu_semi24_equals_masked_dense(dtype, rows, n, m):
    """Check 9."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, n, device="cuda").to(dtype), (torch.randn(m, n, device="cuda") / n**0.5).to(dtype)
    bias, two = torch.randn(m, device="cuda").to(dtype), Selection(2, 4).read(x)
    fits(two, weight)
    reference = masked_dense.semi_structured_linear(two.float(), weight.float(), bias.float())
    for _ in range(2):
        assert error(cuda_semi24.semi_structured_linear(two, weight, bias), reference) < LIMIT[dtype]
    with pytest.raises(ValueError, match="prunes none itself"):
        cuda_semi24.semi_structured_linear(x, weight, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("correction", ["none", "shift", "variance"])
def test_gpu_prompt_of_a_map(correction):
    torch.manual_seed(0)
    linear = torch.nn.Linear(1536, 576, device="cuda", dtype=torch.float16).requires_grad_(False)
    sparse = GroupSparseLinear(linear, "0.down", Selection(2, 4, correction=correction), kernel="cuda_gather")
    x = torch.randn(2, 64, 1536, device="cuda").half()
    fits(x, sparse.weight)
    assert sparse.kernel(128) == "cuda_semi24" and sparse.kernel(1) == "masked_dense"
    y = sparse(x)
    sparse.kernel_name = "masked_dense"
    assert error(y, sparse(x).float()) < 1e-2


@pytest.mark.gpu
def test_gpu_tiles_are_another_mask():
    """Check 11, torch's own pruning by tiles: tokens decide on each other's masks there."""
    torch.manual_seed(0)
    x = torch.randn(128, 128, device="cuda").half()
    fits(x, x)
    kind = torch.sparse.SparseSemiStructuredTensorCUSPARSELT  # CUTLASS's runs on compute capability 8.x alone
    tiled = kind.prune_dense_static_sort(x).to_dense()
    assert not torch.equal(tiled != 0, Selection(2, 4).keep(x))


@pytest.mark.gpu
def test_gpu_time_of_a_product_with_packing(capsys):
    """Printed, not judged: dense, packing, packed product alone, and the whole call with its selection (run with -s)."""
    for rows in (128, 512, 2048, 8192):
        x = torch.randn(1, rows, 4096, device="cuda").half()
        linear = torch.nn.Linear(4096, 11008, bias=False, device="cuda", dtype=torch.float16).requires_grad_(False)
        sparse = GroupSparseLinear(linear, "0.up", Selection(2, 4), kernel="cuda_gather")
        fits(x[0], sparse.weight)
        two = Selection(2, 4).read(x[0])
        packed = cuda_semi24.packed(two)
        calls = {
            "dense": lambda linear=linear, x=x: linear(x), "pack": lambda two=two: cuda_semi24.packed(two),
            "product": lambda packed=packed, w=sparse.weight: torch.mm(packed, w.t()),
            "whole": lambda sparse=sparse, x=x: sparse(x),
        }  # fmt: skip
        times = {name: median_us(call) for name, call in calls.items()}
        with capsys.disabled():
            print(rows, {name: f"{t:.0f} us" for name, t in times.items()})
        assert all(t > 0 for t in times.values())


def median_us(call, count=20):
    samples = []
    for i in range(count + 5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if i >= 5:
            samples.append(1e6 * (time.perf_counter() - start))
    return sorted(samples)[count // 2]
