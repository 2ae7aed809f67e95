"""What a model says: its greedy continuation of a prompt, to be read beside the dense model's. No figure is made of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsebench.engines.reference import Decoder

OPENING = 16  # tokens of the test split that are the prompt where none is given
TOKENS = 40  # that follow, fewer where the text ends


def continuation(module: nn.Module, tokenizer: Any, split: Any, prompt: str | None) -> dict[str, Any]:
    """{prompt, text}: what follows a prompt, each token the likeliest, with a cache as in decode.

    prompt: None = the opening of `split`. A BOS stands before it where the tokenizer or the split puts one. The tokens of
    the prompt stay dense or not as the method's prompt policy says, all later ones are sparse.
    """
    if prompt is None:
        prompt = tokenizer.decode(split.sequences(1)[0, :OPENING], skip_special_tokens=True)
    ids = tokenizer(prompt)["input_ids"]
    if split.bos != "none" and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    room = getattr(module.config, "max_position_embeddings", None) or len(ids) + TOKENS
    given = torch.tensor([ids[-max(1, room - TOKENS) :]], device=next(module.parameters()).device)
    return {
        "prompt": prompt,
        "text": tokenizer.decode(greedy(module, given, min(TOKENS, room - 1)), skip_special_tokens=True),
    }


def greedy(module: nn.Module, prompt: torch.Tensor, count: int) -> list[int]:
    """The `count` likeliest tokens after `prompt` [1, C], each given those before; the end of a text ends them."""
    ends = getattr(module.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    decoder, tokens = Decoder(module, prompt, count, compiled=False), []
    logits = decoder.logits
    while True:
        token = int(logits[0, -1].argmax())
        if token in ends:
            return tokens
        tokens.append(token)
        if len(tokens) == count:
            return tokens
        logits = decoder.step(torch.tensor([[token]], device=prompt.device))
