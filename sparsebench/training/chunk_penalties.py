"""Penalties that make neighbouring tokens share their active neurons (arXiv 2507.08771): locality and chunks.

Both read the gates' pre-activations z and are means over layers; their coefficients are constant. The paper adapts the
chunk's to its loss, which a run that was killed could not go on with exactly [choice].
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sparsebench.config import setting
from sparsebench.modules.tokens import CALLS, follow
from sparsebench.sites import find_blocks


@dataclass(kw_only=True)
class Neighbours:
    """The block `neighbours` of conf/method/prosparse.yaml."""

    locality: float = setting(ge=0)
    chunk: float = setting(ge=0)
    length: int = setting(gt=0)
    sharpness: float = setting(gt=0)

    @property
    def on(self) -> bool:
        return bool(self.locality or self.chunk)


def locality(scores: torch.Tensor, alpha: float = 100.0) -> torch.Tensor:
    """L_al: cross-entropy of sigmoid(alpha a) between each token and the one before it; scores a [B, T, N] before ReLU.

    Neither side is detached: gradients reach both tokens, as in the published code.
    """
    logits = alpha * scores
    return F.binary_cross_entropy_with_logits(logits[:, 1:], logits[:, :-1].sigmoid())


def chunk(activations: torch.Tensor, length: int) -> torch.Tensor:
    """L_cs: mean over units of P = 1 - prod over a chunk of (1 - p), p a token's activations [B, T, N] >= 0 scaled to sum 1.

    It falls with sharing and with concentration. Raises ValueError where the chunks do not fill the sequence.
    """
    if activations.shape[1] % length:
        raise ValueError(f"the chunk's length must divide the sequence's {activations.shape[1]} tokens, got {length}")
    p = activations / activations.sum(-1, keepdim=True).clamp_min(1e-20)
    logs = torch.log1p(-p.clamp(max=1 - 1e-5)).unflatten(1, (-1, length))
    return (1 - logs.sum(2).exp()).mean()


class Beside:
    """A penalty (training/loop.py) with those of neighbours added to it. To be used as a context, which enters it too."""

    def __init__(self, penalty: Any, module: nn.Module, settings: Neighbours):
        self.penalty, self.module, self.settings = penalty, module, settings
        self.scale = 0.0  # the other penalty's coefficient in this step
        self.terms: dict[str, list[torch.Tensor]] = {"locality": [], "chunk": []}
        self.last: dict[str, float] = {}
        self.stack = ExitStack()

    def __enter__(self):
        self.stack.enter_context(self.penalty)
        follow(self.module)  # a model may flatten its tokens before its FFNs
        see = torch.compiler.disable(self.see)
        for block in find_blocks(self.module):
            gate = self.module.get_submodule(block.sites["gate" if "gate" in block.sites else "fc1"].path)
            self.stack.callback(gate.register_forward_hook(lambda _, args, z: see(z)).remove)
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    def see(self, z: torch.Tensor) -> None:
        """Note the terms of one layer, z [B, T, f] or [B T, f] before ReLU."""
        if not torch.is_grad_enabled():
            return
        z = z.float().reshape(*(CALLS[-1].shape or z.shape[:2]), -1)
        if self.settings.locality:
            self.terms["locality"].append(locality(z, self.settings.sharpness))
        if self.settings.chunk:
            self.terms["chunk"].append(chunk(z.relu(), self.settings.length))

    def coefficient(self, step: int) -> float:
        self.scale = self.penalty.coefficient(step)
        return 1.0

    def value(self) -> torch.Tensor:
        """All terms, each with its own coefficient."""
        means = {name: torch.stack(terms).mean() for name, terms in self.terms.items() if terms}
        self.terms = {name: [] for name in self.terms}
        self.last = {name: float(mean.detach()) for name, mean in means.items()}
        return self.scale * self.penalty.value() + sum(getattr(self.settings, name) * m for name, m in means.items())

    def after_step(self, step: int) -> None:
        self.penalty.after_step(step)

    def stats(self) -> dict[str, float]:
        """The other penalty's, its coefficient, and the last value of each term of neighbours."""
        return {**self.penalty.stats(), "lambda": self.scale, **self.last}
