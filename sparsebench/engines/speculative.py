"""Greedy decode with drafts looked up in the text so far (prompt lookup): no second model, exact by construction.

A verify call takes the last token and up to k - 1 drafts together; of the drafts it keeps those that greedy decode would
have written. Each token of the call is sparse by its own mask, as if it were decoded alone, so what comes out is what
one-token decode writes (docs/methods/chunk.md, mode u1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sparsebench.engines.reference import Decoder
from sparsebench.modules.tokens import rows_apart

LONGEST_MATCH = 3  # tokens that a draft's origin must share with the end of the text; shorter ones where none is found


@dataclass
class Drafts:
    """What speculation did: verify calls, tokens proposed and accepted, tokens written."""

    calls: int = 0
    proposed: int = 0
    accepted: int = 0
    written: int = 0

    def add(self, other: Drafts) -> None:
        self.calls, self.proposed = self.calls + other.calls, self.proposed + other.proposed
        self.accepted, self.written = self.accepted + other.accepted, self.written + other.written


def looked_up(text: list[int], most: int) -> list[int]:
    """Up to `most` tokens that followed the latest earlier occurrence of the text's last tokens."""
    for length in range(min(LONGEST_MATCH, len(text) - 1), 0, -1):
        end = text[-length:]
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == end:
                return text[start + length : start + length + most]
    return []


def one_by_one(module: nn.Module, prompt: torch.Tensor, count: int) -> list[int]:
    """`count` tokens of greedy decode after prompt [1, C]."""
    decoder = Decoder(module, prompt, count, compiled=False)
    tokens = [int(decoder.logits[0, -1].argmax())]
    while len(tokens) < count:
        tokens.append(int(decoder.step(torch.tensor([tokens[-1:]], device=prompt.device))[0, -1].argmax()))
    return tokens


def speculate(module: nn.Module, prompt: torch.Tensor, count: int, chunk: int) -> tuple[list[int], Drafts]:
    """`count` tokens of greedy decode after prompt [1, C], by verify calls of up to `chunk` tokens.

    Raises ValueError for a model with a sliding-window cache, which can't take tokens back.
    """
    decoder = Decoder(module, prompt, count + chunk, compiled=False)
    if decoder.windows:
        raise ValueError("speculation needs a cache that can take tokens back, got one with sliding windows")
    text = [*prompt[0].tolist(), int(decoder.logits[0, -1].argmax())]
    drafts, start = Drafts(), prompt.shape[1]
    while len(text) - start < count:
        guesses = looked_up(text, min(chunk, count - (len(text) - start)) - 1)
        call = torch.tensor([[text[-1], *guesses]], device=prompt.device)
        with rows_apart():
            said = decoder.step(call)[0].argmax(-1).tolist()
        right = next((i for i, (g, s) in enumerate(zip(guesses, said, strict=False)) if g != s), len(guesses))
        text += said[: right + 1]
        decoder.rewind(len(text) - 1)
        drafts.add(Drafts(1, len(guesses), right, right + 1))
    return text[start:], drafts
