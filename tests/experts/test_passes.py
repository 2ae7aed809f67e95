"""Passes over data: experts and routers learn on fit, their quality on the way is of dev."""

from types import SimpleNamespace

import torch

from sparsebench.experts import passes
from sparsebench.measure import quality
from sparsebench.training.loop import classification_loss, next_token_loss
from tests.helpers import Rows, tiny_images, tiny_model, training_settings, work

TEXT = SimpleNamespace(fit=Rows(torch.arange(96).view(8, 12)), dev=Rows(torch.arange(96, 144).view(4, 12)), test=None)


def test_experts_learn_on_the_fit_split():
    rows, loss = passes.rows_and_loss(TEXT, training_settings(steps=2, batch_size=2, warmup=0))
    assert torch.equal(rows, TEXT.fit.rows[:4]) and loss is next_token_loss
    assert torch.equal(torch.cat(list(passes.probe(TEXT, 8, "cpu"))), TEXT.fit.rows)
    images = tiny_images()
    rows, loss = passes.rows_and_loss(images, training_settings())
    assert rows is images.fit and loss is classification_loss
    (batch,) = passes.probe(images, 8, "cpu")
    assert torch.equal(batch.inputs, next(images.fit.batches(8, 8, "cpu")).inputs)


def test_quality_on_the_way_is_of_dev(tmp_path):
    actual = passes.dev_quality(tiny_model(), TEXT, work(tmp_path), 4)
    assert actual["perplexity"] == quality.perplexity(tiny_model(), TEXT.dev.rows, 4)["perplexity"]
