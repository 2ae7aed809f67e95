"""Prompt policies by real lengths: padding on either side, any batch, models that flatten their tokens."""

import pytest
import torch
from torch import nn

from sparsebench.engines.reference import cache_argument
from sparsebench.measure import sparsity
from sparsebench.modules import tokens
from sparsebench.modules.input_sparse import swap
from sparsebench.sites import find_blocks
from tests.helpers import tiny_model


def sparse_model(kind="llama", prompt="half"):
    model = tiny_model(kind)
    for block in find_blocks(model):
        for site in block.sites.values():
            swap(model, site, 0.5, prompt=prompt)
    return model


def padded(rows, side):
    """Rows as one batch: (ids [B, T], attention mask)."""
    length = max(map(len, rows))
    gaps = [(length - len(r), 0) if side == "left" else (0, length - len(r)) for r in rows]
    ids = torch.stack([nn.functional.pad(r, gap) for r, gap in zip(rows, gaps, strict=True)])
    ones = [nn.functional.pad(torch.ones_like(r), gap) for r, gap in zip(rows, gaps, strict=True)]
    return ids, torch.stack(ones)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompt", ["half", "last10", "p99", "none"])
def test_a_row_has_the_same_logits_in_any_batch(side, prompt):
    torch.manual_seed(0)
    model = sparse_model(prompt=prompt)
    rows = [torch.randint(1, 300, (n,)) for n in (5, 12, 23, 8)]
    with torch.no_grad():
        alone = [model(input_ids=r[None]).logits[0] for r in rows]
        ids, mask = padded(rows, side)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        together = model(input_ids=ids, attention_mask=mask, position_ids=places).logits
    for i, expected in enumerate(alone):
        torch.testing.assert_close(together[i][mask[i].bool()], expected, rtol=1e-4, atol=1e-4)


def test_padding_is_counted_nowhere_and_dense_tokens_are_those_of_the_rows_alone():
    model, rows = sparse_model(), [torch.randint(1, 300, (n,)) for n in (5, 12, 23, 8)]
    ids, mask = padded(rows, "right")
    with torch.no_grad(), sparsity.counting(model) as counters:
        sparsity.set_token_mask(model, mask.bool())
        model(input_ids=ids, attention_mask=mask)
    actual = next(iter(counters.values()))
    assert (actual.sparse_tokens, actual.dense_tokens) == (2 + 6 + 11 + 4, 3 + 6 + 12 + 4)


def test_flattened_tokens_keep_their_rows():
    """OPT hands [B T, n] to its FFN: with prompt=none nothing of it may be sparse, as nowhere else."""
    rows = torch.randint(1, 300, (3, 16))
    with torch.no_grad():
        dense = tiny_model("opt")(input_ids=rows).logits
        assert torch.equal(sparse_model("opt", "none")(input_ids=rows).logits, dense)
        assert not torch.allclose(sparse_model("opt", "all")(input_ids=rows).logits, dense)


def test_a_failed_call_leaves_nothing_behind():
    model = sparse_model()
    with pytest.raises(IndexError):
        model(input_ids=torch.full((2, 8), 10**6))
    assert len(tokens.CALLS) == 1 and tokens.per_row(torch.zeros(16, 4)) == 1


def test_with_a_cache_the_mask_of_the_new_tokens_counts():
    model = sparse_model()
    ids, mask = padded([torch.randint(1, 300, (n,)) for n in (4, 9)], "left")
    with torch.no_grad():
        first = model(input_ids=ids, attention_mask=mask, use_cache=True)
        more = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
        given = {cache_argument(model): first.past_key_values}
        step = model(input_ids=ids[:, -1:], attention_mask=more, **given)
    assert step.logits.shape == (2, 1, 320) and len(tokens.CALLS) == 1
