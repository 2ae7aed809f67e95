"""Passes over data of any kind: windows of text, or labelled images and texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from sparsebench.data.labelled import Labelled
from sparsebench.measure import quality
from sparsebench.training import finetune
from sparsebench.training.loop import Training, classification_loss, next_token_loss


def rows_and_loss(data, settings: Training) -> tuple[Any, Callable]:
    """(rows for train.train, loss of the task): windows of text, or labelled examples."""
    if hasattr(data.fit, "sequences"):
        return finetune.rows(data.fit, settings), next_token_loss
    return data.fit, classification_loss


def forward(module: nn.Module, batch) -> None:
    """One forward pass whose output nobody needs."""
    if isinstance(batch, Labelled):
        quality.logits(module, batch.inputs)
    else:
        module.base_model(input_ids=batch, use_cache=False)


def valid(batch) -> torch.Tensor | None:
    """bool [B, T], False on padding; None where there is none."""
    inputs = getattr(batch, "inputs", None)
    return inputs["attention_mask"].bool() if isinstance(inputs, dict) else None


def probe(data, count: int, device) -> Iterator:
    """A few batches of fit data."""
    if hasattr(data.fit, "sequences"):
        yield from (b.to(device) for b in data.fit.sequences(count).split(4))
    else:
        yield from data.fit.batches(count, 32, device)


def dev_quality(module: nn.Module, data, work, limit: int) -> dict[str, float]:
    """Perplexity or accuracy on dev, and the share of experts skipped."""
    if hasattr(data.dev, "sequences"):
        metrics, counters = quality.language_quality(module, data.dev, limit, work.batch_size)
    else:
        metrics, counters = quality.classification_quality(module, data.dev, limit * 8, work.batch_size)
    shares = [1 - float(c.kept.sum()) / max(1, c.kept.numel() * c.sparse_tokens) for c in counters.values()]
    name = "perplexity" if "perplexity" in metrics else "accuracy"
    return {name: metrics[name], "nll": metrics["nll"], "sparsity": sum(shares) / max(1, len(shares))}
