"""Text classifiers: accuracy, MACs per text with padding left out, whole forward passes.

A text of t tokens costs t times the block maps, 2 L d t^2 for attention scores and weighted values, and the pooler and
head once. Padding is neither counted nor charged, though a padded batch does compute it.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from sparsebench import evaluate, macs, measure, sparsity
from sparsebench.kinds import language
from sparsebench.kinds.vision import EXPERTS
from sparsebench.models.sites import find_blocks

KEEPS_DENSE = False
compare = evaluate.compare_classes


def batch_size(evaluation) -> int:
    return min(evaluation.examples_per_batch, 64)


def quality(module: nn.Module, split, evaluation) -> tuple[dict, tuple]:
    """(metrics, (shares of experts by site, tokens of each text))."""
    limit = evaluation.test_examples
    metrics, counters = evaluate.classification_quality(module, split, limit, batch_size(evaluation))
    return metrics, (sparsity.summarise(module, counters), split.lengths(limit))


def protocol(split, method) -> dict:
    return {"split": "test", "max_tokens": split.max_tokens, "padding": "masked, not counted"}


def dense_costs(module: nn.Module, data) -> tuple[dict[str, macs.Cost], int]:
    """(costs per token of the block maps, products of pooler and head per text)."""
    inside = tuple(f"{block.path}." for block in find_blocks(module))
    head = [m for n, m in module.named_modules() if isinstance(m, nn.Linear) and not n.startswith(inside)]
    return macs.dense_sites(module), sum(m.weight.numel() for m in head)


def more(module: nn.Module, data, evaluation) -> dict:
    return {}


def figures(method, sparse, costs, dense_counts, counts, measurement, skips) -> tuple[dict, dict, dict]:
    (sites, head), (measured, lengths) = costs, counts
    tokens, settings = float(lengths.mean()), sparse.config
    attention = 2 * settings.num_hidden_layers * settings.hidden_size * float(lengths.square().mean())
    dense = tokens * sum(c.dense_macs for c in sites.values()) + attention + head
    section = language.describe_sparsity(method.requested, measured, sites, 0) | {"definition": EXPERTS}
    multiplied = macs.per_sample("text", dense, attention, tokens, sparse, measured, skips)
    return section, multiplied, macs.matrix_bytes(sites, sparse, "embeddings")


def latency(dense, sparse, data, measurement, hardware, found: dict) -> dict:
    """Whole forward passes at batch 1 and `measure.batch`."""
    sizes = dict.fromkeys((1, measurement.batch))
    inputs = {size: next(data.test.batches(size, size, hardware.torch_device)).inputs for size in sizes}
    return measure.forward_latency(dense, sparse, inputs, measurement, hardware)


def extra(dense, sparse, qualities: tuple[dict, dict], data, folder: Path) -> dict:
    names = ("dense", "sparse")
    return {
        "classification": {
            "classes": data.classes,
            "per_class": {n: q["per_class"] for n, q in zip(names, qualities, strict=True)},
            "confusion": {n: q["confusion"] for n, q in zip(names, qualities, strict=True)},
        }
    }
