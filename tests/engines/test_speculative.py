"""Greedy decode with looked-up drafts is greedy decode (docs/methods/chunk.md, check 11)."""

import pytest
import torch

from sparsebench.engines import speculative
from tests.helpers import sparse_copy, tiny_model


@pytest.mark.parametrize("sparse", [False, True])
def test_speculation_writes_what_one_token_decode_writes(sparse):
    """Check 11: token for token, fp32, each token of a verify call sparse by its own mask."""
    model = sparse_copy(0.6) if sparse else tiny_model()
    pattern = torch.randint(0, 320, (5,), generator=torch.Generator().manual_seed(1))
    prompt = pattern.repeat(3)[None]
    expected = speculative.one_by_one(model, prompt, 40)
    tokens, drafts = speculative.speculate(model, prompt, 40, 6)
    assert tokens[:40] == expected
    assert drafts.written == len(tokens) - 1 and drafts.proposed > 0 and 0 <= drafts.accepted <= drafts.proposed
    assert drafts.written == drafts.accepted + drafts.calls


def test_a_loop_is_drafted_right():
    """A text that repeats is accepted whole: fewer calls than tokens."""
    model = tiny_model()
    start = speculative.one_by_one(model, torch.tensor([[1, 2, 3]]), 80)
    tokens, drafts = speculative.speculate(model, torch.tensor([[1, 2, 3, *start]]), 24, 4)
    assert drafts.calls <= len(tokens)
    assert speculative.looked_up([1, 2, 3, 9, 1, 2, 3], 3) == [9, 1, 2]
    assert speculative.looked_up([1, 2, 3], 3) == [] and speculative.looked_up([5, 5], 2) == [5]
