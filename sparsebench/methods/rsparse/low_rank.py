"""Truncated singular value decompositions of weights, computed once per weight and kept on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from filelock import FileLock

from sparsebench.config import digests
from sparsebench.records import state
from sparsebench.records.state import State


def factors(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(A [n, r], B [r, m]), float64, with x A B = x W_r^T for every x, where W_r is the best rank-r part of W [m, n].

    Eigenvectors of the smaller Gram matrix give U_r or V_r; the other factor is the product with W, so no singular value
    is divided by: A = W^T U_r, B = U_r^T where m < n, else A = V_r, B = (W V_r)^T.
    """
    w = weight.double()
    m, n = w.shape
    if m < n:
        basis = torch.linalg.eigh(w @ w.T).eigenvectors.flip(-1)[:, :rank]
        return w.T @ basis, basis.T
    basis = torch.linalg.eigh(w.T @ w).eigenvectors.flip(-1)[:, :rank]
    return basis, (w @ basis).T


def largest_rank(m: int, n: int) -> int:
    """No budget of at most m n weights can pay for a higher rank: r (m + n) <= m n."""
    return m * n // (m + n)


def fingerprint(weight: torch.Tensor) -> str:
    """Hash of a weight's bits and dtype, and of what computes its factors: this source and torch's version."""
    bits = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    made_by = (*digests.of_files([Path(__file__)]), torch.__version__)
    digest = hashlib.sha256(f"{made_by}{weight.dtype}{tuple(weight.shape)}".encode())
    digest.update(bits)
    return digest.hexdigest()[:24]


def cached(weight: torch.Tensor, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """`factors` of a weight [m, n] up to `largest_rank`, in its dtype and on the CPU; from `folder` where they are there."""
    path = folder / f"{fingerprint(weight)}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        saved = state.read(path)
        if saved is None:
            a, b = factors(weight, largest_rank(*weight.shape))
            saved = State({"a": a.to(weight.dtype).cpu(), "b": b.to(weight.dtype).cpu()})
            state.write(saved, path)
    return saved.tensors["a"], saved.tensors["b"]
