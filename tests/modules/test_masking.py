"""The masked input of many tokens is made once, by one kernel on a GPU, and is what masking means."""

import torch

from sparsebench.kernels import masked_dense
from sparsebench.modules import masking
from sparsebench.modules.input_sparse import InputSparseLinear
from tests.helpers import sparse_copy


def counted(monkeypatch):
    calls = []
    made = masking.made
    monkeypatch.setattr(masking, "made", lambda x, sparse: calls.append(sparse.site) or made(x, sparse))
    return calls


def test_maps_that_read_one_tensor_share_its_mask(monkeypatch):
    """q, k, v and gate, up of one threshold: four maskings a block instead of seven, with the same logits."""
    model, ids = sparse_copy(0.4), torch.arange(12)[None]
    apart = model(input_ids=ids, use_cache=False).logits
    masking.share_rules(model, InputSparseLinear)
    calls = counted(monkeypatch)
    together = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(together, apart)
    assert sorted(calls) == sorted(f"{layer}.{role}" for layer in (0, 1) for role in ("q", "o", "gate", "down"))


def test_another_threshold_tensor_or_change_is_never_served_from_before():
    torch.manual_seed(0)
    one, other = (InputSparseLinear(torch.nn.Linear(8, 4), f"0.{role}", t) for role, t in (("q", 0.5), ("k", 0.9)))
    x = torch.randn(1, 3, 8)
    masking.share_rules(torch.nn.ModuleList([one, other]), InputSparseLinear)
    assert one.threshold is not other.threshold
    for sparse in (one, other):
        assert torch.equal(masking.masked(x, sparse), torch.where(x.abs() > sparse.threshold, x, 0))
    one.threshold.fill_(0.1)
    assert torch.equal(masking.masked(x, one), torch.where(x.abs() > 0.1, x, 0))
    x.mul_(3)
    assert torch.equal(masking.masked(x, one), torch.where(x.abs() > 0.1, x, 0))
    del x
    assert masking.Latest.result is None  # let go with its input


def test_a_prompt_policy_is_kept():
    torch.manual_seed(0)
    sparse = InputSparseLinear(torch.nn.Linear(8, 4), "0.q", 0.9, prompt="half")
    x = torch.randn(2, 4, 8)
    kept = masking.masked(x, sparse)
    assert torch.equal(kept[:, :2], x[:, :2]) and torch.equal(kept[:, 2:], torch.where(x.abs() > 0.9, x, 0)[:, 2:])


def test_masked_is_masked_dense():
    x, weight = torch.randn(2, 5, 8), torch.randn(4, 8)
    linear = torch.nn.Linear(8, 4, bias=False)
    linear.weight.data = weight
    sparse = InputSparseLinear(linear, "0.q", 0.7)
    expected = masked_dense.input_sparse_linear(x, weight, threshold=0.7)
    torch.testing.assert_close(sparse(x), expected)
