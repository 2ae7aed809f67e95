"""Text classifiers: accuracy, MACs per text with padding left out, whole forward passes.

A text of t tokens costs t times the block maps, 2 L d t^2 for attention scores and weighted values, and the pooler and
head once. Padding is neither counted nor charged, though a padded batch does compute it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sparsebench.measure import latency, macs, memory, quality, sparsity
from sparsebench.measure.macs import executed_per_sample
from sparsebench.tasks.base import Assessment, Comparison, Task, beside
from sparsebench.tasks.image_classification import EXPERTS
from sparsebench.tasks.language_modeling import describe_sparsity


@dataclass(kw_only=True)
class TextAssessment(Assessment):
    """Accuracy over texts of known lengths."""

    lengths: torch.Tensor  # tokens of each text, float64 [N]
    linear_macs: int  # products of every linear map, each read once
    attention_macs: float  # scores and weighted values, mean per text
    matrix_bytes: int


class TextClassification(Task[TextAssessment]):
    kind = "classification"
    keepable = ("accuracy",)

    def batch_size(self, evaluation):
        return min(evaluation.classifier.examples_per_batch, 64)

    def assess(self, loaded, module, data, settings):
        limit = settings.eval.classifier.test_examples
        metrics, counters = quality.classification_quality(module, data.test, limit, self.batch_size(settings.eval))
        measured, lengths = sparsity.summarise(module, counters), data.test.lengths(limit)
        size = 2 * module.config.num_hidden_layers * module.config.hidden_size
        return TextAssessment(
            metrics=metrics,
            measured=measured,
            costs=macs.site_costs(module, measured),
            weight_bytes=memory.weight_bytes(module),
            lengths=lengths,
            linear_macs=sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear)),
            attention_macs=size * float(lengths.square().mean()),
            matrix_bytes=macs.matrices_of(module),
        )

    def score(self, module, split, limit, settings, metric):
        return quality.classification_quality(module, split, limit, self.batch_size(settings.eval))

    def compare(self, dense, sparse, data, settings):
        protocol = {"split": "test", "max_tokens": data.test.max_tokens, "padding": "masked, not counted"}
        if settings.eval.classifier.test_examples:
            protocol["subset"] = "stratified by class, seed 0"
        tokens, attention = float(sparse.lengths.mean()), sparse.attention_macs
        blocks = sum(c.dense_macs for c in dense.costs.values())
        head = dense.linear_macs - blocks  # pooler and head, once per text
        whole = tokens * blocks + attention + head
        replaced = sparse.costs if sparse.measured else {}
        section = describe_sparsity(settings.method.requested, sparse.measured, dense.costs, 0)
        return Comparison(
            quality=quality.compare_classes(dense.metrics, sparse.metrics, protocol),
            sparsity=section | {"definition": EXPERTS},
            macs=macs.per_sample("text", whole, attention, tokens, replaced),
            bytes=macs.matrix_bytes(dense.matrix_bytes, sparse.matrix_bytes),
            extra=beside(dense, sparse),
        )

    def time(self, dense, sparse, data, settings, unquantised=None):
        """Whole forward passes at batch 1 and `measure.batch`."""
        measurement, hardware = settings.measure, settings.hardware
        sizes = dict.fromkeys((1, measurement.batch))
        inputs = {size: next(data.test.batches(size, size, hardware.torch_device)).inputs for size in sizes}
        return latency.forward_latency(dense, sparse, inputs, measurement, hardware)

    def executed(self, macs, timing):
        return executed_per_sample(macs, timing.skipping)

    def illustrate(self, dense, sparse, data, folder):
        both = {"dense": dense[1].metrics, "sparse": sparse[1].metrics}
        return {
            "classification": {
                "classes": data.classes,
                "per_class": {name: metrics["per_class"] for name, metrics in both.items()},
                "confusion": {name: metrics["confusion"] for name, metrics in both.items()},
            }
        }
