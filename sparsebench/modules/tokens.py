"""Which tokens a module's input holds: the shape [B, T] of the model's present call, and what of it is padding.

A map inside a block sees [B, T, n] without the attention mask, or [B T, n] where the model flattens its tokens (OPT).
Prompt policies need more: the real length of each row. `follow` notes both at the model, once per call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Call:
    """The call that a followed model is in; all None outside of one."""

    shape: tuple[int, int] | None = None  # (B, T)
    mask: torch.Tensor | None = None  # bool [B, T], False on padding; None = no padding


CALLS: list[Call] = [Call()]  # the innermost call last


def follow(model: nn.Module) -> None:
    """Note shape and padding of every call of `model`, from now on. A second time it changes nothing."""
    for module in {id(m): m for m in (model, getattr(model, "base_model", model))}.values():
        if enter not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(leave, always_call=True)


def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Hook before a call; a call without tokens of its own keeps what is known from around it."""
    call, around = Call(), CALLS[-1]
    ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
    call.shape, call.mask = around.shape, around.mask
    if isinstance(ids, torch.Tensor) and ids.dim() >= 2:
        call.shape, mask = tuple(ids.shape[:2]), kwargs.get("attention_mask")
        known = isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] >= call.shape[1]
        if known:
            call.mask = mask[:, -call.shape[1] :].bool()  # with a cache, the mask covers earlier tokens, too
        elif around.shape != call.shape:
            call.mask = None
    CALLS.append(call)


def leave(module: nn.Module, args: tuple, output) -> None:
    """Hook after a call, also one that failed."""
    CALLS.pop()


class Apart:
    """Whether the tokens of a call are judged one by one, as in decode."""

    on = False


@contextmanager
def rows_apart() -> Iterator[None]:
    """Every token of a call is a decoded one of its own while the block runs: a verify step of speculation.

    All are sparse, each by its own mask, and kernels for few rows serve them together.
    """
    before, Apart.on = Apart.on, True
    try:
        yield
    finally:
        Apart.on = before


def per_row(x: torch.Tensor) -> int:
    """T: the positions of each sequence in a module's input [..., T, n] or [B T, n]; 1 where nothing says more."""
    if Apart.on:
        return 1
    if x.dim() > 2:
        return x.shape[-2]
    shape = CALLS[-1].shape
    return shape[1] if shape and x.dim() == 2 and x.shape[0] == shape[0] * shape[1] else 1


def dense_prefix(policy: str, tokens: int) -> int:
    """How many leading tokens of a sequence of `tokens` stay dense. One-token calls are always sparse.

    none: all stay dense; half: the last T//2 are sparse; last10: the last T - int(0.9 T) (R-Sparse's release);
    p99: the last int(0.99 T); all: every token is sparse. (TEAL, official code, `--prefill`; R-Sparse, prefill_ratio.)
    """
    if tokens == 1:
        return 0
    sparse = {
        "none": 0,
        "half": tokens // 2,
        "last10": tokens - int(0.9 * tokens),
        "p99": int(0.99 * tokens),
        "all": tokens,
    }
    return tokens - sparse[policy]


def left_dense(policy: str, x: torch.Tensor) -> torch.Tensor | None:
    """bool, the shape of x without its channels: tokens that `policy` leaves dense; None where all are sparse.

    Rows of a padded call are judged by their own lengths, wherever their padding stands, so that a row's tokens are
    the same in any batch.
    """
    tokens = per_row(x)
    if policy == "all" or tokens == 1:
        return None
    mask = CALLS[-1].mask
    if mask is None or mask.numel() != x.shape[:-1].numel():
        dense = torch.arange(tokens, device=x.device) < dense_prefix(policy, tokens)
        return dense.expand(x.shape[:-1].numel() // tokens, tokens).reshape(x.shape[:-1])
    mask = mask.to(x.device)
    prefixes = [dense_prefix(policy, length) for length in mask.sum(1).tolist()]
    dense = mask & (mask.cumsum(1) <= torch.tensor(prefixes, device=x.device).unsqueeze(1))
    return dense.reshape(x.shape[:-1])
