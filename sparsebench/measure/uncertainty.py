"""How sure a figure of the test set is: standard errors from the losses of its parts, and the parts kept compactly.

Tokens of one window share a context and tokens of one document a subject, so neither are independent draws. A text's
losses are kept in pieces (the part of one document in one window), and variances are clustered both ways (Cameron,
Gelbach & Miller 2011: V_window + V_document - V_piece, each with its G / (G - 1)), and never below either one alone.
A difference of dense and sparse is taken piece by piece (paired), which removes most of the spread of the text itself.
"""

from __future__ import annotations

import base64
import functools
import math
from dataclasses import dataclass

import numpy as np

LITTLE_TEXT = 10_000  # scored tokens: below this a perplexity is marked


@dataclass(frozen=True)
class Pieces:
    """Sums over the scored tokens of each piece [P]."""

    window: np.ndarray
    document: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray  # NLL in nats, float64

    @classmethod
    def of(cls, losses: np.ndarray, documents: np.ndarray) -> Pieces:
        """losses, documents [N, T - 1]: NLL of every scored token and the number of its document."""
        windows = np.broadcast_to(np.arange(len(losses))[:, None], losses.shape)
        keys = windows.ravel().astype(np.int64) * (int(documents.max()) + 1) + documents.ravel()
        distinct, place = np.unique(keys, return_inverse=True)
        window, document = np.divmod(distinct, int(documents.max()) + 1)
        tokens = np.bincount(place, minlength=len(distinct))
        loss = np.bincount(place, losses.ravel().astype(np.float64), len(distinct))
        return cls(window, document, tokens, loss)

    @property
    def mean(self) -> float:
        """NLL per token."""
        return float(self.loss.sum() / self.tokens.sum())

    @property
    def influence(self) -> np.ndarray:
        """What each piece adds to the error of the mean [P]: (its loss - its tokens x mean) / all tokens."""
        return (self.loss - self.tokens * self.mean) / self.tokens.sum()

    def stderr(self, influence: np.ndarray) -> float | None:
        """Standard error of a sum of `influence` [P], clustered by window and document; None with a single window."""
        by_window, by_document = (cluster_variance(influence, c) for c in (self.window, self.document))
        if by_window is None:
            return None
        if by_document is None:
            return math.sqrt(by_window)
        both = by_window + by_document - cluster_variance(influence, np.arange(len(influence)))
        return math.sqrt(max(both, by_window, by_document))

    def counts(self) -> dict[str, int]:
        return {"windows": len(np.unique(self.window)), "documents": len(np.unique(self.document))}


def cluster_variance(influence: np.ndarray, clusters: np.ndarray) -> float | None:
    """G / (G - 1) x sum of squared sums over each of G clusters; None for a single one."""
    sums = np.bincount(np.unique(clusters, return_inverse=True)[1], influence)
    return float(np.square(sums).sum()) * len(sums) / (len(sums) - 1) if len(sums) > 1 else None


def perplexities(dense: Pieces, sparse: Pieces) -> dict:
    """Standard errors of both perplexities, of their ratio and difference (paired, first order), and what they rest on."""
    a, b = math.exp(min(dense.mean, 700.0)), math.exp(min(sparse.mean, 700.0))
    ratio = math.exp(min(sparse.mean - dense.mean, 700.0))
    u, v = dense.influence, sparse.influence
    tokens = int(dense.tokens.sum())
    return {
        "dense_stderr": dense.stderr(a * u),
        "sparse_stderr": dense.stderr(b * v),
        "ratio": ratio,
        "ratio_stderr": dense.stderr(ratio * (v - u)),
        "difference_stderr": dense.stderr(b * v - a * u),
        "clusters": dense.counts(),
        "tokens": tokens,
        "little_text": tokens < LITTLE_TEXT,
    }


def mean_stderr(values: np.ndarray) -> float | None:
    """Standard error of a mean over independent examples [N]; of a paired difference where `values` are differences."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def packed(values: np.ndarray, kind: str) -> str:
    """Base64 of an array as little-endian `kind` (f4 or i4), or of single bits (bits)."""
    content = np.packbits(values.astype(bool)) if kind == "bits" else np.asarray(values, f"<{kind}")
    return base64.b64encode(content.tobytes()).decode()


def unpacked(text: str, kind: str) -> np.ndarray:
    """The reverse of `packed`; of bits, with up to seven zeros at the end."""
    content = base64.b64decode(text)
    return np.unpackbits(np.frombuffer(content, np.uint8)) if kind == "bits" else np.frombuffer(content, f"<{kind}")


def kept(dense: Pieces, sparse: Pieces) -> dict:
    """The losses of all pieces for the record, from which everything here can be computed again."""
    return {
        "encoding": "base64; window, document, tokens int32; dense, sparse float32: NLL per token, nats; one value per "
        "piece (the part of a document in a window)",
        "window": packed(dense.window, "i4"),
        "document": packed(dense.document, "i4"),
        "tokens": packed(dense.tokens, "i4"),
        "dense": packed(dense.loss / dense.tokens, "f4"),
        "sparse": packed(sparse.loss / sparse.tokens, "f4"),
    }


def pieces(losses: dict[str, str], side: str) -> Pieces:
    """The reverse of `kept` for one model (dense or sparse). Raises ValueError where its parts don't fit each other."""
    return decoded(*(losses[name] for name in ("window", "document", "tokens", side)))


@functools.cache
def decoded(window: str, document: str, tokens: str, loss: str) -> Pieces:
    counts, values = unpacked(tokens, "i4"), unpacked(loss, "f4").astype(float)
    places = unpacked(window, "i4"), unpacked(document, "i4")
    if not len(counts) == len(values) == len(places[0]) == len(places[1]) or not counts.size or counts.min() <= 0:
        raise ValueError("losses of pieces don't fit each other")
    return Pieces(*places, counts, values * counts)
