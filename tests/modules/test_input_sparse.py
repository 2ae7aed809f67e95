"""The input-sparse linear against plain products."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsebench.modules.input_sparse import InputSparseLinear


def test_strict_comparison_drops_an_element_at_the_threshold():
    layer = InputSparseLinear(nn.Linear(2, 2, bias=False), "0.q", 0.5)
    assert layer.keep(torch.tensor([0.5, -0.5, 0.50001])).tolist() == [False, False, True]


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(12, 7), lambda: nn.Linear(12, 7, bias=False), lambda: Conv1D(7, 12)]
)
@pytest.mark.parametrize("shape", [(1, 12), (2, 5, 12), (1, 1, 12)])
def test_masked_product(make, shape):
    linear, x = make(), torch.randn(shape)
    sparse = InputSparseLinear(linear, "0.q", 0.6)
    torch.testing.assert_close(sparse(x), linear(x * (x.abs() > 0.6)))


def test_weight_is_stored_once_with_channels_contiguous():
    sparse = InputSparseLinear(nn.Linear(12, 7), "0.q", 0.1)
    assert sparse.weight.shape == (7, 12) and sparse.weight.t().is_contiguous()
    assert sum(p.numel() for p in sparse.parameters()) == 7 * 12 + 7
    conv = Conv1D(7, 12)
    assert InputSparseLinear(conv, "0.q", 0.1).weight.data_ptr() == conv.weight.data_ptr()  # no copy at all


def test_a_call_the_kernel_can_not_serve_goes_to_the_next():
    from sparsebench import kernels

    sparse = InputSparseLinear(nn.Linear(12, 7), "0.q", 0.1, kernel="cpu_numba")
    assert sparse.kernel(1) == "cpu_numba"
    x = torch.randn(9, 1, 12)  # more rows than the kernel takes
    torch.testing.assert_close(sparse(x), torch.cat([sparse(row[None]) for row in x]))
    assert kernels.serving("cpu_numba", x, sparse.weight).__name__.endswith("masked_dense")
    assert InputSparseLinear(nn.Linear(12, 7).half(), "0.q", 0.1, kernel="cpu_numba").kernel(1) == "masked_dense"


def test_compiles_without_a_graph_break():
    sparse = InputSparseLinear(nn.Linear(12, 7), "0.q", 0.5)
    x = torch.randn(1, 1, 12)
    compiled = torch.compile(sparse, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), sparse(x))


def test_scale_weighs_the_magnitude():
    scale = torch.tensor([1.0, 10.0, 0.1])
    sparse = InputSparseLinear(nn.Linear(3, 2), "0.q", 0.5, scale=scale)
    assert sparse.keep(torch.tensor([0.6, 0.06, 0.6])).tolist() == [True, True, False]


def test_low_rank_part_acts_on_what_was_dropped():
    linear, x = nn.Linear(6, 4, bias=False), torch.randn(1, 3, 6)
    u, s, vt = torch.linalg.svd(linear.weight, full_matrices=False)
    sparse = InputSparseLinear(linear, "0.q", 0.5, low_rank=((vt.t() * s).contiguous(), u.t().contiguous()))
    torch.testing.assert_close(sparse(x), linear(x), rtol=1e-4, atol=1e-5)  # full rank: dense for any mask


def test_the_first_tokens_of_a_prompt_stay_dense():
    linear, x = nn.Linear(6, 4), torch.randn(2, 5, 6)
    actual, dense = InputSparseLinear(linear, "0.q", 0.8, prompt="half")(x), linear(x)
    torch.testing.assert_close(actual[:, :3], dense[:, :3])
    torch.testing.assert_close(actual[:, 3:], linear(torch.where(x.abs() > 0.8, x, 0))[:, 3:])


@pytest.mark.parametrize("policy", ["none", "half", "p99", "last10", "all"])
def test_one_token_is_always_sparse(policy):
    linear, x = nn.Linear(6, 4), torch.randn(1, 1, 6)
    expected = F.linear(torch.where(x.abs() > 0.5, x, 0), linear.weight, linear.bias)
    torch.testing.assert_close(InputSparseLinear(linear, "0.q", 0.5, prompt=policy)(x), expected)
