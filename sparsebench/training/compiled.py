"""Training through torch.compile: the blocks of a model one by one, and the loss of the next token in one pass.

Blocks are compiled in place for as long as the context lasts, so weights, names, hooks and what wraps the model stay
as they are. A hook or module that keeps figures of a pass says `torch.compiler.disable` and runs as written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import nn

VERSIONS = 256  # of one block's code: one for each layer where their hooks differ
BACKEND = "inductor"
ACTIVE = ContextVar("compiled", default=False)


def next_token_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in float32 of logits [B, T, V] against the tokens [B, T] that follow; scalar.

    Inside of `compiled` one fused pass without a float32 copy of the logits."""
    if ACTIVE.get():
        return torch.compile(plain_entropy, dynamic=False, backend=BACKEND)(logits, tokens)
    return plain_entropy(logits, tokens)


def plain_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: what its lists of modules hold, the outermost lists only."""
    inside: set[nn.Module] = set()
    outermost = []
    for part in module.modules():
        if isinstance(part, nn.ModuleList) and part not in inside:
            outermost += part
            inside |= set(part.modules())
    return outermost


@contextmanager
def compiled(module: nn.Module, on: bool) -> Iterator[None]:
    """Compile the blocks of `module` in place, and next_token_entropy, while the context lasts, if `on`."""
    if not on:
        yield
        return
    chosen = blocks(module)
    token = ACTIVE.set(True)
    with torch._dynamo.config.patch(recompile_limit=VERSIONS, accumulated_recompile_limit=VERSIONS * 4):
        for block in chosen:
            block.compile(dynamic=False, backend=BACKEND)
        try:
            yield
        finally:
            ACTIVE.reset(token)
            for block in chosen:
                block._compiled_call_impl = None
