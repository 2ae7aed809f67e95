"""Causal language models: perplexity, MACs and bytes per decoded token, latency of decode and prefill."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import nn

from sparsebench import evaluate, macs, measure, neurons, sparsity

KEEPS_DENSE = False  # whether `extra` needs the dense model beside the sparse one
compare = evaluate.compare


def batch_size(evaluation) -> int:
    return evaluation.batch_size


def quality(module: nn.Module, split, evaluation) -> tuple[dict, dict]:
    return evaluate.language_quality(module, split, evaluation.test_sequences, evaluation.batch_size)


def protocol(split, method) -> dict:
    return {
        "split": "test", "window": split.sequence_length, "stride": split.sequence_length,
        "bos": split.bos, "prompt_policy": getattr(method, "prompt", "all"),
    }  # fmt: skip


def dense_costs(module: nn.Module, data) -> dict[str, macs.Cost]:
    return macs.dense_sites(module)


def more(module: nn.Module, data, evaluation) -> dict:
    """Metrics of FFN neurons, where `eval.neurons.enabled`."""
    return {"neurons": neurons.measure(module, data, evaluation)} if evaluation.neurons.enabled else {}


def figures(method, sparse, costs, dense_counts, counts, measurement, skips) -> tuple[dict, dict, dict]:
    measured = sparsity.summarise(sparse, counts)
    traffic = macs.account(costs, sparse, measured, measurement.context, skips)
    return describe_sparsity(method.requested, measured, costs, sparsity.zero_weights(sparse)), *traffic


def latency(dense, sparse, data, measurement, hardware, found: dict) -> dict:
    needed = max(measurement.context + measurement.samples, measurement.prompt)
    tokens = data.test.sequences(-(-needed // data.test.sequence_length)).flatten()
    share = found["model_wide_of_sparse_tokens"]
    return measure.latency(dense, sparse, tokens, measurement, hardware, share)


def extra(dense, sparse, qualities: tuple[dict, dict], data, folder: Path) -> dict:
    return {}


def describe_sparsity(requested: float | None, measured: dict, dense_costs: dict, zero_weights: int) -> dict:
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
        "sparse_token_fraction": tokens.sparse_tokens / total if total else 0.0,
        "per_site": {
            name: dataclasses.asdict(measured[name]) if name in measured else {"sparsity": 0.0, "weight": weight}
            for name, weight in weights.items()
        },
        "definition": "share of (token, input channel) pairs dropped, weighted by parameters of the block maps; "
        "`weights`: share of the block maps' weights that are 0",
    }
