"""Quality on held-out data, dense and sparse by the same protocol, and the counts of sparsity taken on the way.

Language models: perplexity. Classifiers: accuracy, NLL, expected calibration error, confusion matrix.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sparsebench.data.text import batches
from sparsebench.measure import sparsity, uncertainty
from sparsebench.records import progress

ECE_BINS = 15  # of equal width (docs/methods/metrics.md, Accuracy and ECE)


def perplexity(module: nn.Module, sequences: torch.Tensor, batch_size: int, guesses: bool = False) -> dict:
    """exp of the token-mean NLL over disjoint windows `sequences` [N, T]; every token but a window's first is scored.

    Sums are taken in float64 over tokens (never a mean of window means). `losses`: NLL of every scored token, float32
    array [N, T - 1]. guesses: also `right` bool [N, T - 1], tokens whose logit is the largest. Raises FloatingPointError
    where the NLL is not finite.
    """
    total, count, losses, right = 0.0, 0, [], []
    for batch in progress.shown(batches(sequences, batch_size, module), -(-len(sequences) // batch_size)):
        logits = module(input_ids=batch, use_cache=False).logits[:, :-1]
        nll = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        total += float(nll.double().sum())
        count += nll.numel()
        losses.append(nll.view(len(batch), -1).float().cpu().numpy())
        if guesses:
            right.append((logits.argmax(-1) == batch[:, 1:]).cpu().numpy())
    if not math.isfinite(total):
        raise FloatingPointError("the model's negative log-likelihood is not finite (NaN or infinite weights?)")
    nll = total / count
    return {
        "perplexity": math.exp(min(nll, 700.0)), "nll": nll, "tokens": count, "losses": np.concatenate(losses),
        **({"right": np.concatenate(right)} if guesses else {}),
    }  # fmt: skip


def language_quality(
    module: nn.Module, split, limit: int | None, batch_size: int, guesses: bool = False
) -> tuple[dict, dict]:
    """(metrics, counters): perplexity on a split, with sparsity counted at every sparse module in the same pass.

    guesses: also `right_pieces`, whose mean is the share of tokens that the model ranks first.
    """
    sequences = split.sequences(limit)
    with sparsity.counting(module) as counters:
        metrics = perplexity(module, sequences, batch_size, guesses)
    documents = split.scored_documents(len(sequences)).numpy()
    metrics["pieces"] = uncertainty.Pieces.of(metrics.pop("losses"), documents)
    if guesses:
        metrics["right_pieces"] = uncertainty.Pieces.of(metrics.pop("right"), documents)
    metrics["sequences"] = len(sequences)
    metrics["fingerprint"] = hashlib.sha256(sequences.numpy().tobytes()).hexdigest()
    return metrics, counters


def compare(dense: dict, sparse: dict, protocol: dict) -> dict:
    """The record's quality section from the metrics of both models."""
    both = (dense["pieces"], sparse["pieces"])
    metrics = uncertainty.perplexities(*both)
    return {
        "perplexity": {
            "dense": dense["perplexity"],
            "sparse": sparse["perplexity"],
            **metrics,
            "higher_is_better": False,
            "protocol": {**protocol, "tokens": dense["tokens"], "sequences": dense["sequences"],
                         "fingerprint": dense["fingerprint"]},
            "losses": uncertainty.kept(*both),
        },
        "nll": {
            "dense": dense["nll"], "sparse": sparse["nll"],
            **{f"{n}_stderr": m["pieces"].stderr(m["pieces"].influence) for n, m in (("dense", dense), ("sparse", sparse))},
            "difference_stderr": both[0].stderr(both[1].influence - both[0].influence),
            "higher_is_better": False, "protocol": "as perplexity",
        },
    }  # fmt: skip


def logits(module: nn.Module, inputs) -> torch.Tensor:
    """Class logits [N, C] of any classifier; `inputs` is a tensor or a dict of keywords."""
    if isinstance(inputs, dict):
        return module(**inputs).logits
    output = module(inputs.to(next(module.parameters()).dtype))
    return getattr(output, "logits", output)


class ClassCounts:
    """Sums over examples that all figures of a classifier are made of: integers, and float64 for NLL and confidence.

    Calibration bins are equal in width over [0, 1]: bin b holds confidences in (b/15, (b+1)/15].
    """

    def __init__(self, classes: int):
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)  # [true, predicted]
        self.nll = 0.0
        self.losses: list[np.ndarray] = []  # NLL of each example
        self.right: list[np.ndarray] = []
        self.gaps: list[np.ndarray] = []  # bin, and right minus confidence, of each example
        self.bins = torch.zeros(3, ECE_BINS, dtype=torch.float64)  # examples, right ones, summed confidence

    def add(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """Count one batch: scores [N, C], labels [N]."""
        scores, labels = scores.detach().double().cpu(), labels.cpu()
        losses = F.cross_entropy(scores, labels, reduction="none")
        self.nll += float(losses.sum())
        confidence, predicted = scores.softmax(-1).max(-1)
        self.losses.append(losses.numpy())
        self.right.append((predicted == labels).numpy())
        classes = len(self.confusion)
        pairs = torch.bincount(labels * classes + predicted, minlength=classes**2)
        self.confusion += pairs.view(classes, classes)
        index = ((confidence * ECE_BINS).ceil().long() - 1).clamp(0, ECE_BINS - 1)
        self.gaps.append(torch.stack([index.double(), (predicted == labels).double() - confidence]).numpy())
        rows = torch.stack([torch.ones_like(confidence), (predicted == labels).double(), confidence])
        self.bins.index_add_(1, index, rows)

    def metrics(self) -> dict:
        """accuracy, nll (nats), ece, per_class accuracy (None for a class without examples), confusion [true][predicted].

        Raises FloatingPointError where the NLL is not finite.
        """
        if not math.isfinite(self.nll):
            raise FloatingPointError("the model's negative log-likelihood is not finite (NaN or infinite weights?)")
        count, right = int(self.confusion.sum()), self.confusion.diagonal()
        totals = self.confusion.sum(1).tolist()
        return {
            "accuracy": int(right.sum()) / count,
            "nll": self.nll / count,
            "ece": float((self.bins[1] - self.bins[2]).abs().sum()) / count,
            "per_class": [r / n if n else None for r, n in zip(right.tolist(), totals, strict=True)],
            "confusion": self.confusion.tolist(),
            "examples": count,
            "losses": np.concatenate(self.losses),
            "right": np.concatenate(self.right),
            "gaps": self.signed_gaps(),
        }

    def signed_gaps(self) -> np.ndarray:
        """What each example adds to N x ECE [N]: right minus confidence, with the sign of its bin's sum.

        Their mean is the ECE. Their spread is its uncertainty to first order: as long as no bin's sum changes its sign.
        """
        index, gaps = np.concatenate(self.gaps, axis=1)
        signs = np.sign((self.bins[1] - self.bins[2]).numpy())
        return signs[index.astype(int)] * gaps


def classification_quality(module: nn.Module, split, limit: int | None, batch_size: int) -> tuple[dict, dict]:
    """(metrics, counters) of a classifier on a split, with sparsity counted at every sparse module in the same pass."""
    counts, device = ClassCounts(split.classes), next(module.parameters()).device
    with torch.no_grad(), sparsity.counting(module) as counters:
        count = len(split) if limit is None else min(limit, len(split))
        for batch in progress.shown(split.batches(limit, batch_size, device), -(-count // batch_size)):
            if isinstance(batch.inputs, dict):
                sparsity.set_token_mask(module, batch.inputs["attention_mask"].bool())
            counts.add(logits(module, batch.inputs), batch.labels)
    return counts.metrics(), counters


def compare_classes(dense: dict, sparse: dict, protocol: dict) -> dict:
    """The record's quality section of a classifier; accuracy in [0, 1].

    Standard errors are over examples, those of differences paired: an example that both models get right adds nothing.
    `discordant` counts the others, from which McNemar's test can be made.
    """
    right = {"dense": dense["right"].astype(float), "sparse": sparse["right"].astype(float)}
    change = right["sparse"] - right["dense"]
    losses = {"dense": dense["losses"], "sparse": sparse["losses"]}
    section = {
        "accuracy": {
            "dense": dense["accuracy"], "sparse": sparse["accuracy"],
            **{f"{name}_stderr": uncertainty.mean_stderr(values) for name, values in right.items()},
            "difference_stderr": uncertainty.mean_stderr(change),
            "discordant": {"gained": int((change > 0).sum()), "lost": int((change < 0).sum())},
            "higher_is_better": True,
            "protocol": {**protocol, "examples": dense["examples"]},
            "losses": {
                "encoding": "base64, one value per example: `right` one bit each, `nll` float32 in nats",
                **{f"{name}_right": uncertainty.packed(values, "bits") for name, values in right.items()},
                **{f"{name}_nll": uncertainty.packed(values, "f4") for name, values in losses.items()},
            },
        }
    }  # fmt: skip
    for name in ("nll", "ece"):
        section[name] = {
            "dense": dense[name], "sparse": sparse[name], "higher_is_better": False, "protocol": "as accuracy",
        }  # fmt: skip
    section["nll"] |= {f"{name}_stderr": uncertainty.mean_stderr(values) for name, values in losses.items()}
    section["nll"]["difference_stderr"] = uncertainty.mean_stderr(losses["sparse"] - losses["dense"])
    gaps = {"dense": dense["gaps"], "sparse": sparse["gaps"]}
    section["ece"] |= {f"{name}_stderr": uncertainty.mean_stderr(values) for name, values in gaps.items()}
    section["ece"]["difference_stderr"] = uncertainty.mean_stderr(gaps["sparse"] - gaps["dense"])
    return section
