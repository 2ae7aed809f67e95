"""Quality on held-out data, dense and sparse by the same protocol, and the counts of sparsity taken on the way."""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import nn

from sparsebench import sparsity
from sparsebench.calibrate import batches


def perplexity(module: nn.Module, sequences: torch.Tensor, batch_size: int) -> dict:
    """exp of the token-mean NLL over disjoint windows `sequences` [N, T]; every token but a window's first is scored.

    Sums are taken in float64 over tokens (never a mean of window means). Raises FloatingPointError where the NLL is not
    finite.
    """
    total, count = 0.0, 0
    for batch in batches(sequences, batch_size, module):
        logits = module(input_ids=batch, use_cache=False).logits[:, :-1]
        nll = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        total += float(nll.double().sum())
        count += nll.numel()
    if not math.isfinite(total):
        raise FloatingPointError("the model's negative log-likelihood is not finite (NaN or infinite weights?)")
    return {"perplexity": math.exp(min(total / count, 700.0)), "nll": total / count, "tokens": count}


def language_quality(module: nn.Module, split, limit: int | None, batch_size: int) -> tuple[dict, dict]:
    """(metrics, counters): perplexity on a split, with sparsity counted at every sparse module in the same pass."""
    sequences = split.sequences(limit)
    with sparsity.counting(module) as counters:
        metrics = perplexity(module, sequences, batch_size)
    metrics["sequences"] = len(sequences)
    metrics["fingerprint"] = hashlib.sha256(sequences.numpy().tobytes()).hexdigest()
    return metrics, counters


def compare(dense: dict, sparse: dict, protocol: dict) -> dict:
    """The record's quality section from the metrics of both models."""
    ratio = math.exp(min(sparse["nll"] - dense["nll"], 700.0))
    return {
        "perplexity": {
            "dense": dense["perplexity"],
            "sparse": sparse["perplexity"],
            "ratio": ratio,
            "higher_is_better": False,
            "protocol": {**protocol, "tokens": dense["tokens"], "sequences": dense["sequences"],
                         "fingerprint": dense["fingerprint"]},
        },
        "nll": {"dense": dense["nll"], "sparse": sparse["nll"], "higher_is_better": False, "protocol": "as perplexity"},
    }  # fmt: skip
