"""2:4 on sparse tensor cores, as far as it can be seen without one: what is refused, who is asked, what packing does."""

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparsebench import kernels
from sparsebench.kernels import cuda_semi24, masked_dense
from sparsebench.modules.group_sparse import SEMI24, GroupSparseLinear, Selection


def packed_on_a_processor(x):
    """What a packed x stands for: torch's own packing for CUTLASS and back."""
    return sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(x))


@pytest.fixture
def emulated(monkeypatch):
    """The kernel with its limits of shape and dtype, but on a processor."""
    limits = cuda_semi24.unsupported

    def without_device(x, weight, *others):
        problem = limits(x, weight, *others)
        return None if problem and "runs on cuda" in problem else problem

    calls = []
    monkeypatch.setattr(cuda_semi24, "unsupported", without_device)
    monkeypatch.setattr(cuda_semi24, "packed", lambda x: calls.append(x.shape) or packed_on_a_processor(x))
    return calls


def sparse_map(width=64, outputs=32, kernel="cuda_semi24", **options):
    torch.manual_seed(0)
    linear = torch.nn.Linear(width, outputs).half().requires_grad_(False)
    selection = Selection(*options.pop("pattern", (2, 4)), correction=options.pop("correction", "none"))
    return GroupSparseLinear(linear, "0.q", selection, kernel=kernel, **options)


def test_shapes_and_dtypes_outside_the_limits_are_refused():
    """Check 9."""
    x, weight = torch.randn(64, 128).half(), torch.randn(32, 128).half()
    wrong = [(x[:63], weight), (x[:, :100], weight[:, :100]), (x, weight[:30]), (x.float(), weight.float())]
    for inputs in wrong:
        assert cuda_semi24.unsupported(*inputs)
        with pytest.raises(ValueError, match="cuda_semi24 (takes|serves)"):
            cuda_semi24.semi_structured_linear(*inputs)
    assert "runs on cuda, got cpu" in cuda_semi24.unsupported(x, weight)


def test_it_prunes_nothing_itself(emulated):
    """Check 9: packing alone would drop silently what is too much, so such an input is an error."""
    torch.manual_seed(0)
    x, weight = torch.randn(32, 64).half(), torch.randn(32, 64).half()
    assert not torch.equal(packed_on_a_processor(x), x)
    with pytest.raises(ValueError, match="prunes none itself, got 4 of 4"):
        cuda_semi24.semi_structured_linear(x, weight)
    two = Selection(2, 4).read(x)
    assert torch.equal(packed_on_a_processor(two), two)
    torch.testing.assert_close(
        cuda_semi24.semi_structured_linear(two, weight),
        masked_dense.semi_structured_linear(two, weight),
        rtol=1e-2,
        atol=1e-2,
    )


@pytest.mark.parametrize("correction", ["none", "shift", "variance"])
def test_a_prompt_goes_to_it_and_equals_masked_dense(emulated, correction):
    sparse, x = sparse_map(correction=correction), torch.randn(2, 32, 64).half()
    assert sparse.kernel(64) == "cuda_semi24" and sparse.kernel(1) == "masked_dense"
    y = sparse(x)
    assert emulated == [(64, 64)]
    sparse.kernel_name = "masked_dense"
    torch.testing.assert_close(y, sparse(x), rtol=1e-2, atol=1e-2)
    assert len(emulated) == 1
    (cost,) = sparse.costs({"0.q": of_tokens(64)}).values()
    assert cost.prompt.executed_macs == cost.dense_macs  # masked_dense was asked for


def of_tokens(count, sparsity=0.5):
    from sparsebench.modules.base import SiteSparsity

    return SiteSparsity(sparsity, sparsity, 64 * 32, count, 0)


def test_what_it_can_not_serve_is_simulated(emulated):
    x = torch.randn(1, 64, 64).half()
    for options in ({"pattern": (4, 8)}, {"pattern": (1, 4)}, {"prompt": "p99"}):
        sparse = sparse_map(**options)
        sparse(x)
        assert sparse.kernel(64) == "masked_dense" and not kernels.load(sparse.kernel(64)).SKIPS
        (cost,) = sparse.costs({"0.q": of_tokens(64)}).values()
        assert cost.prompt.executed_macs == cost.dense_macs > cost.prompt.sparse_macs
    odd = sparse_map()
    odd(x[:, :40])
    assert odd.kernel(40) == "masked_dense" and not emulated
    (cost,) = odd.costs({"0.q": of_tokens(64)}).values()
    assert cost.prompt.executed_macs == cost.prompt.sparse_macs  # of prompts it serves


def test_nothing_dropped_and_counting_pass_it_by(emulated):
    """A negative threshold keeps everything, which is no 2:4; the threshold is read again after it was written."""
    sparse, x = sparse_map(), torch.randn(1, 32, 64).half()
    sparse.threshold.fill_(-1)
    torch.testing.assert_close(sparse(x), torch.nn.functional.linear(x, sparse.weight, sparse.bias))
    sparse.threshold.fill_(0)
    assert not emulated
    sparse(x)
    assert len(emulated) == 1
    sparse.counter = sparse.new_counter()
    sparse(x)
    assert len(emulated) == 1


def test_every_gpu_backend_falls_back_to_it():
    """In the chain of the kernels for one token, below them: it serves prompts only."""
    for name in ("cuda_gather", "cuda_triton"):
        ranks = [kernels.name_of(b) for b in kernels.chain(name)]
        assert ranks.index("cuda_semi24") == len(ranks) - 2 and kernels.best("cuda") != "cuda_semi24"
    assert kernels.name_of(kernels.serving("cuda_semi24", torch.randn(1, 1, 8), torch.randn(4, 8))) == "masked_dense"
    assert kernels.providing("masked_dense", SEMI24) is masked_dense
