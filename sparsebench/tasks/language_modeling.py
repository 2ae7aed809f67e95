"""Causal language models: perplexity, MACs and bytes per decoded token, latency of decode and prefill."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from sparsebench.measure import (
    continuation,
    few_rows,
    latency,
    lm_eval,
    macs,
    memory,
    neurons,
    prefill,
    quality,
    routing,
    sparsity,
    unions,
)
from sparsebench.modules.base import Cost, SiteSparsity, measured_modules
from sparsebench.tasks import trial
from sparsebench.tasks.base import Assessment, Comparison, Task, beside

CHUNKS = (2, 4, 8, 16, 32)  # tokens whose unions are counted where measure.chunk is set


@dataclass(kw_only=True)
class LanguageAssessment(Assessment):
    """Perplexity and counts over windows of text."""

    outside: macs.Outside  # head, attention and KV cache: what lies outside the block maps
    zero_weights: int
    harness: dict[str, dict[str, Any]]  # scores of lm-eval's tasks
    routing: routing.Routing | None  # of a model with experts
    by_expert: dict[str, Any]
    stored: dict[str, int]  # parameters of all experts by site name


class LanguageModeling(Task[LanguageAssessment]):
    kind = "language"
    keepable = ("perplexity", "next_token")

    def batch_size(self, evaluation):
        return evaluation.text.batch_size

    def problems(self, settings):
        return trial.language(settings)

    def tested(self, data, settings):
        text = settings.eval.text
        sequences = data.test.sequences(text.test_sequences)
        read = [sequences, data.test.scored_documents(len(sequences))]
        read += [data.dev.sequences(text.dev_sequences)] if settings.eval.neurons.enabled else []
        return [hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in read]

    def assess(self, loaded, module, data, settings):
        text, harness = settings.eval.text, settings.eval.lm_eval
        metrics, counters = quality.language_quality(module, data.test, text.test_sequences, text.batch_size)
        measured = sparsity.summarise(module, counters, settings.method.prunes)
        further: dict[str, Any] = {}
        if settings.eval.neurons.enabled:
            further["neurons"] = neurons.measure(module, data, settings.eval)
        if text.prompt != "" and loaded.info.get("source") != "random weights":
            further["continuation"] = continuation.continuation(module, loaded.tokenizer, data.test, text.prompt)
        if settings.measure.chunk:
            further["chunk"] = chunks(module, data.test, text)
        return LanguageAssessment(
            metrics=metrics,
            measured=measured,
            costs=macs.site_costs(module, measured),
            weight_bytes=memory.weight_bytes(module),
            further=further,
            outside=macs.outside_blocks(module, settings.measure.context, measured),
            zero_weights=sparsity.zero_weights(module),
            routing=routing.routing(module, data.test.sequences(text.test_sequences), text.batch_size),
            by_expert=routing.by_expert(counters),
            stored=macs.stored_experts(module),
            harness=lm_eval.score(module, loaded.tokenizer, harness, text.batch_size) if harness.tasks else {},
        )

    def score(self, module, split, limit, settings, metric):
        size = settings.eval.text.batch_size
        return quality.language_quality(module, split, limit, size, guesses=metric == "next_token")

    def dev_limit(self, settings):
        return settings.eval.text.dev_sequences

    def test_limit(self, settings):
        return settings.eval.text.test_sequences

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
        multiplied, traffic = macs.account(dense.costs, costs, sparse.outside, settings.measure.context, dense.outside)
        multiplied["scored"], traffic["scored"] = macs.over_scored_tokens(
            dense.costs, costs, sparse.measured, sparse.outside, settings.measure.context, dense.outside
        )
        multiplied["prefill"], traffic["prefill"] = prefill.account(
            dense.costs, costs, sparse.measured, sparse.outside, settings.measure.prompt,
            method.prompt_policy, settings.measure.latency,
        )  # fmt: skip
        extra = beside(dense, sparse)
        if extra.get("chunk", {}).get("sparse"):
            total = sum(cost.dense_macs for cost in dense.costs.values())
            unions.of_all_maps(extra["chunk"]["sparse"], total)
        return Comparison(
            quality=scores,
            sparsity=describe_sparsity(method.requested, sparse.measured, dense.costs, sparse.zero_weights),
            macs=multiplied,
            bytes=traffic,
            extra=extra | routed(dense, sparse, costs),
        )

    def time(self, dense, sparse, data, settings, unquantised=None):
        measurement = settings.measure
        each = measurement.context + measurement.samples
        needed = max(each * max(measurement.batches or [1]), measurement.prompt)
        tokens = data.test.sequences(-(-needed // data.test.sequence_length)).flatten()
        length = data.test.sequence_length
        few = -(-max(each, measurement.prompt) // length) * length  # what one text needs
        timing = latency.latency(dense, sparse, tokens[:few], measurement, settings.hardware, unquantised)
        given = (tokens.to(settings.hardware.torch_device), timing.latency["decode"], measurement, settings.hardware)
        if measurement.batches:
            timing.latency["batches"], timing.extra["union"] = few_rows.batches(dense, sparse, *given)
        if measurement.chunk:
            timing.latency["verify"] = few_rows.verify(dense, sparse, *given)
        return timing

    def cache_bytes(self, dense, settings):
        rows = max(settings.measure.batches or [1]) if settings.measure.latency else 0
        return int(rows * dense.outside.cache_bytes)

    def executed(self, macs, timing):
        return timing.step_macs


def chunks(module, split, text) -> dict[str, Any] | None:
    """Chunk-level sparsity on the windows that quality is scored on; shares of the weights that the method covers."""
    sequences = split.sequences(text.test_sequences)
    owners = split.scored_documents(len(sequences))  # of every token but a window's first, which the second may follow
    owners = torch.cat([owners[:, :1], owners], 1)
    weights = {site: weight for _, sparse in measured_modules(module) for site, weight in sparse.covers.items()}
    return unions.chunks(module, sequences, owners, text.batch_size, list(CHUNKS), weights)


def routed(dense: LanguageAssessment, sparse: LanguageAssessment, costs: dict[str, Cost]) -> dict[str, Any]:
    """`extra.routing` of a model with experts."""
    if dense.routing is None or sparse.routing is None:
        return {}
    return {
        "routing": routing.describe(dense.routing, sparse.routing)
        | routing.bound(dense.costs, costs, sparse.outside)
        | {
            "model_wide_of_stored": routing.model_wide_of_stored(dense.costs, sparse.measured, dense.stored),
            "by_expert": sparse.by_expert,
        }
    }


def describe_sparsity(
    requested: float | None, measured: dict[str, SiteSparsity], dense_costs: dict[str, Cost], zero_weights: int
) -> dict[str, Any]:
    """The record's sparsity section: what was asked for beside what was counted, per site and model-wide."""
    weights = {name: int(cost.dense_macs) for name, cost in dense_costs.items()}
    shares = {name: site.sparsity for name, site in measured.items()}
    decode = {name: site.sparsity_of_sparse_tokens for name, site in measured.items()}
    zero = dict.fromkeys(weights, 0.0)
    heads = {name: site.sparsity for name, site in measured.items() if name.endswith(".heads")}  # no weights of theirs
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
    } | ({"heads": {"mean": sum(heads.values()) / len(heads), "per_layer": heads}} if heads else {})
