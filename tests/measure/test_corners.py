"""Four corners of quantisation and sparsity, and their interaction (docs/quantisation.md, check 11)."""

import numpy as np
import pytest
import torch

from sparsebench.measure import corners
from sparsebench.measure.uncertainty import Pieces


def metrics(losses):
    pieces = Pieces.of(losses, np.repeat(np.arange(len(losses))[:, None] // 2, losses.shape[1], 1))
    return {"nll": pieces.mean, "pieces": pieces}


def test_the_interaction_is_of_the_four_losses():
    nll = {"dense": 2.0, "sparse": 2.3, "quantised": 2.1, "sparse_quantised": 2.5}
    losses = [metrics(np.full((6, 9), nll[n])) for n in ("dense", "sparse", "quantised", "sparse_quantised")]
    section = corners.four(*losses)
    assert section["interaction"] == pytest.approx(0.1) and section["nll"] == pytest.approx(nll)
    assert section["delta_nll"] == pytest.approx({"sparse": 0.3, "quantised": 0.1, "sparse_quantised": 0.5})
    assert section["interaction_stderr"] == pytest.approx(0, abs=1e-12)


def test_errors_that_add_up_do_not_interact():
    """A linear model whose output errors by quantisation and by sparsity are small and independent: I is about 0."""
    torch.manual_seed(0)
    weight, x, targets = torch.randn(30, 200) / 14, torch.randn(4000, 200), torch.randint(0, 30, (4000,))
    rounded = weight + 0.05 * torch.randn_like(weight) / 14
    dropped = torch.where(x.abs() > 0.1, x, 0)

    def losses(w, inputs):
        nll = torch.nn.functional.cross_entropy(inputs @ w.t(), targets, reduction="none")
        return metrics(nll.view(40, 100).numpy())

    section = corners.four(losses(weight, x), losses(weight, dropped), losses(rounded, x), losses(rounded, dropped))
    assert abs(section["interaction"]) < 3 * section["interaction_stderr"] + 1e-4
    assert abs(section["interaction"]) < 0.1 * max(map(abs, section["delta_nll"].values()))
