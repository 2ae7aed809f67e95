"""The masked input of a call of many tokens, made once for all maps that read it and drop the same of it.

Nothing is skipped there, so masking must cost next to nothing: q, k and v (gate and up) of one threshold take the result
of the first of them, and on a GPU it is one kernel that compares and selects. Compiled code needs neither: the compiler
joins the masking to what stands before it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from sparsebench.kernels import masked_dense
from sparsebench.modules.tokens import CALLS, left_dense
from sparsebench.sites import GROUP_OF


class Latest:
    """The last masked input: of what tensor, by what rule. It is let go with that tensor."""

    of: weakref.ref | None = None
    key: tuple | None = None
    result: torch.Tensor | None = None


def masked(x: torch.Tensor, sparse: Any) -> torch.Tensor:
    """x [..., T, n] where `sparse` (an InputSparseLinear with thresholds) keeps it or its prompt policy says dense."""
    if torch.compiler.is_compiling() or x.requires_grad or x.is_inference():
        return made(x, sparse)
    mask = CALLS[-1].mask
    rule = (sparse.threshold, sparse.scale)
    key = (x._version, *((id(t), t._version) for t in rule if t is not None), sparse.prompt, id(mask))
    if Latest.of is None or Latest.of() is not x or Latest.key != key:
        Latest.of, Latest.key, Latest.result = weakref.ref(x, forget), key, made(x, sparse)
    return Latest.result


def forget(gone: weakref.ref) -> None:
    if Latest.of is gone:
        Latest.of = Latest.key = Latest.result = None


def made(x: torch.Tensor, sparse: Any) -> torch.Tensor:
    dense = left_dense(sparse.prompt, x)
    if x.is_cuda and not torch.compiler.is_compiling():
        from sparsebench.kernels._triton_mask import keep_or_zero

        return keep_or_zero(x, sparse.threshold, sparse.scale, dense)
    keep = masked_dense.kept(x, sparse.threshold, sparse.scale)
    return torch.where(keep if dense is None else keep | dense.unsqueeze(-1), x, 0)


def share_rules(model: torch.nn.Module, kind: type) -> None:
    """Maps of `kind` that read one tensor and drop the same of it get one threshold and scale between them."""
    owners: dict[tuple, list] = {}
    for sparse in (m for m in model.modules() if type(m) is kind and m.top_k is None):
        layer, _, role = sparse.site.partition(".")
        if role not in GROUP_OF:
            continue
        for first in owners.setdefault((layer, GROUP_OF[role], sparse.prompt), []):
            if torch.equal(first.threshold, sparse.threshold) and same(first.scale, sparse.scale):
                sparse.threshold, sparse.scale = first.threshold, first.scale
                break
        else:
            owners[layer, GROUP_OF[role], sparse.prompt].append(sparse)


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))
