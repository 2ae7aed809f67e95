"""Causal language models: perplexity, MACs and bytes per decoded token, latency of decode and prefill."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from sparsebench.measure import continuation, latency, lm_eval, macs, memory, neurons, quality, sparsity
from sparsebench.modules.base import Cost, SiteSparsity
from sparsebench.tasks import trial
from sparsebench.tasks.base import Assessment, Comparison, Task, beside


@dataclass(kw_only=True)
class LanguageAssessment(Assessment):
    """Perplexity and counts over windows of text."""

    outside: macs.Outside  # head, attention and KV cache: what lies outside the block maps
    zero_weights: int
    harness: dict[str, dict[str, Any]]  # scores of lm-eval's tasks


class LanguageModeling(Task[LanguageAssessment]):
    kind = "language"

    def batch_size(self, evaluation):
        return evaluation.text.batch_size

    def problems(self, settings):
        return trial.language(settings)

    def assess(self, loaded, module, data, settings):
        text, harness = settings.eval.text, settings.eval.lm_eval
        metrics, counters = quality.language_quality(module, data.test, text.test_sequences, text.batch_size)
        measured = sparsity.summarise(module, counters, settings.method.prunes)
        further: dict[str, Any] = {}
        if settings.eval.neurons.enabled:
            further["neurons"] = neurons.measure(module, data, settings.eval)
        if text.prompt != "" and loaded.info.get("source") != "random weights":
            further["continuation"] = continuation.continuation(module, loaded.tokenizer, data.test, text.prompt)
        return LanguageAssessment(
            metrics=metrics,
            measured=measured,
            costs=macs.site_costs(module, measured),
            weight_bytes=memory.weight_bytes(module),
            further=further,
            outside=macs.outside_blocks(module, settings.measure.context),
            zero_weights=sparsity.zero_weights(module),
            harness=lm_eval.score(module, loaded.tokenizer, harness, text.batch_size) if harness.tasks else {},
        )

    def compare(self, dense, sparse, data, settings):
        method, test = settings.method, data.test
        protocol = {
            "split": "test", "window": test.sequence_length, "stride": test.sequence_length,
            "bos": test.bos, "prompt_policy": method.prompt_policy,
        }  # fmt: skip
        scores = quality.compare(dense.metrics, sparse.metrics, protocol)
        if dense.harness:
            scores |= lm_eval.compare(dense.harness, sparse.harness, settings.eval.lm_eval, method.prompt_policy)
        costs = dense.costs | sparse.costs
        multiplied, traffic = macs.account(dense.costs, costs, sparse.outside, settings.measure.context)
        multiplied["scored"], traffic["scored"] = macs.over_scored_tokens(
            dense.costs, costs, sparse.measured, sparse.outside, settings.measure.context
        )
        return Comparison(
            quality=scores,
            sparsity=describe_sparsity(method.requested, sparse.measured, dense.costs, sparse.zero_weights),
            macs=multiplied,
            bytes=traffic,
            extra=beside(dense, sparse),
        )

    def time(self, dense, sparse, data, settings, unquantised=None):
        measurement = settings.measure
        needed = max(measurement.context + measurement.samples, measurement.prompt)
        tokens = data.test.sequences(-(-needed // data.test.sequence_length)).flatten()
        return latency.latency(dense, sparse, tokens, measurement, settings.hardware, unquantised)

    def executed(self, macs, timing):
        return timing.step_macs


def describe_sparsity(
    requested: float | None, measured: dict[str, SiteSparsity], dense_costs: dict[str, Cost], zero_weights: int
) -> dict[str, Any]:
    """The record's sparsity section: what was asked for beside what was counted, per site and model-wide."""
    weights = {name: int(cost.dense_macs) for name, cost in dense_costs.items()}
    shares = {name: site.sparsity for name, site in measured.items()}
    decode = {name: site.sparsity_of_sparse_tokens for name, site in measured.items()}
    zero = dict.fromkeys(weights, 0.0)
    tokens = next(iter(measured.values()), None)
    total = tokens.sparse_tokens + tokens.dense_tokens if tokens else 0
    return {
        "requested": requested,
        "model_wide": sparsity.model_wide(zero | shares, weights),
        "model_wide_of_sparse_tokens": sparsity.model_wide(zero | decode, weights),
        "weights": zero_weights / sum(weights.values()) if weights else 0.0,
        "sparse_token_fraction": tokens.sparse_tokens / total if tokens and total else 0.0,
        "per_site": {
            name: dataclasses.asdict(measured[name]) if name in measured else {"sparsity": 0.0, "weight": weight}
            for name, weight in weights.items()
        },
        "definition": "share of (token, input channel) pairs dropped, weighted by parameters of the block maps; "
        "`weights`: share of the block maps' weights that are 0",
    }
