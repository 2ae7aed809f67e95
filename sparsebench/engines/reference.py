"""The decode engine of transformers: any model, a static KV cache, eager or compiled and captured in a CUDA graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import nn
from transformers import StaticCache

from sparsebench.engines import marks
from sparsebench.modules import storage


def cache_argument(module: nn.Module) -> str:
    """What a model calls its cache: `cache` in new versions of transformers, `past_key_values` before and in code of its own."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


class Decoder:
    """A model with a prompt in its cache, ready to take one token at a time.

    Args:
        module: a causal LM of transformers, dense or with sparse modules.
        prompt: int64 [B, C], put into the cache at once; B rows are B texts.
        room: tokens that may follow.
        compiled: torch.compile(mode="reduce-overhead", fullgraph=True) of the one-token step.
    """

    def __init__(self, module: nn.Module, prompt: torch.Tensor, room: int, compiled: bool):
        self.module, self.length = module, prompt.shape[1]
        self.lying = storage.lie(module)
        storage.put(self.lying)
        self.engine = "compiled" if compiled else "eager"
        self.cache = StaticCache(config=module.config, max_cache_len=self.length + room)
        self.given = {cache_argument(module): self.cache}
        with torch.no_grad():
            self.logits = module(input_ids=prompt, **self.given, use_cache=True, logits_to_keep=1).logits
        # layers that read another layer's keys hold none of their own (Gemma-3n)
        self.holding = [layer for layer in self.cache.layers if layer.keys is not None]
        # a full sliding window moves its keys, so what the prompt left must be put back
        self.windows = [
            (held, held.clone())
            for layer in self.holding
            if getattr(layer, "is_sliding", False)
            for held in (layer.keys, layer.values)
        ]
        self.forward = (
            torch.compile(module.forward, mode="reduce-overhead", fullgraph=True) if compiled else module.forward
        )

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Logits [B, k, V] after k more tokens of each text [B, k]."""
        with torch.no_grad():
            return self.forward(input_ids=token, **self.given, use_cache=True).logits

    @property
    def marked_by(self) -> str:
        return "kernels by name, profiler" if self.engine == "compiled" else "modules, marks around each"

    def marked(self, take: Callable[[], object], steps: int) -> dict[str, float]:
        """Milliseconds of a step by role (or, compiled, by kind of kernel) while `take` takes so many.

        Raises ValueError where nothing can be told: on a CPU a compiled step has no marks.
        """
        if len({parameter.device for parameter in self.module.parameters()}) > 1:
            raise ValueError("an eager step over several devices has no marks")
        if self.engine == "eager":
            return marks.by_module(self.module, take, steps)
        if next(self.module.parameters()).device.type != "cuda":
            raise ValueError("a compiled step on a CPU has no marks")
        return marks.by_name(take, steps)

    def rewind(self, length: int | None = None) -> None:
        """Back to the end of the prompt, or to so many tokens (no sliding windows); the weights lie as the model wants them."""
        storage.put(self.lying)
        length = self.length if length is None else length
        for layer in self.holding:
            layer.cumulative_length.fill_(length)
            if hasattr(layer, "cumulative_length_int"):  # sliding-window layers keep a Python copy
                layer.cumulative_length_int = length
        for held, kept in self.windows:
            held.copy_(kept)
