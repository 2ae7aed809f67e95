"""Perplexity: a uniform model, a formula, unequal batches (docs/methods/metrics.md, check 10)."""

import math

import pytest
import torch
import torch.nn.functional as F

from sparsebench.measure import quality
from tests.helpers import tiny_model


def test_uniform_model_has_the_vocabulary_as_perplexity():
    model = tiny_model()
    model.lm_head.weight.zero_()
    assert quality.perplexity(model, torch.randint(0, 320, (5, 24)), 2)["perplexity"] == pytest.approx(320, rel=1e-4)


def test_token_mean_whatever_the_batches():
    model, rows = tiny_model(), torch.randint(0, 320, (7, 20))
    with torch.no_grad():
        logits = model(input_ids=rows).logits
    by_hand = F.cross_entropy(logits[:, :-1].reshape(-1, 320), rows[:, 1:].reshape(-1)).item()
    for batch in (1, 3, 7):  # 3 leaves a last batch of one row: a mean of batch means would differ
        actual = quality.perplexity(model, rows, batch)
        assert actual["nll"] == pytest.approx(by_hand, rel=1e-5) and actual["tokens"] == 7 * 19
        assert actual["perplexity"] == pytest.approx(math.exp(by_hand), rel=1e-5)


def test_nan_weights_are_an_error():
    model = tiny_model()
    model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        quality.perplexity(model, torch.randint(0, 320, (1, 8)), 1)
