"""A whole decode step of a Llama-type model on an NVIDIA GPU, dense or sparse, as five kernels a layer (decode.cu).

What surrounds the projections is fused into them (_step_cuda.py has the kernels in their order). The step is captured
once in a CUDA graph; the next token and the position live on the device.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from sparsebench import cache
from sparsebench.engines import heads, llama_type, marks, prefilled, quantisation
from sparsebench.engines._launch_cuda import DEFAULTS, MAPS, Launch
from sparsebench.engines._step_cuda import Step
from sparsebench.kernels import cuda_packed
from sparsebench.kernels.cuda_gather import SOURCE, Tuning
from sparsebench.sites import find_blocks

__all__ = ["DEFAULTS", "MAPS", "SOURCE", "Decoder", "Launch", "Step", "tuned", "tuning_file", "unsupported"]

DTYPES = (torch.float16, torch.bfloat16)


def unsupported(module: nn.Module) -> str | None:
    """Why this model's step can't be fused, or None."""
    problem = llama_type(module, DTYPES, top_k=True)
    if problem:
        return problem
    config = module.config
    head_dim = heads(config)[2]
    if head_dim % 8 or head_dim > 256 or 32 % (head_dim // 8):
        return f"it takes head sizes 8, 16, 32, 64, 128 and 256, got {head_dim}"
    if any(size % 8 for size in (config.hidden_size, config.intermediate_size)):
        return "it takes sizes that are multiples of 8"
    packed = quantisation(module, find_blocks(module))
    return None if packed is None else cuda_packed.unserved(packed)


def tuning_file(module: nn.Module, gpu: str, keep_all: bool = False) -> Path:
    """Where the tuning of a model shape on a GPU is remembered, in the user's cache folder."""
    config = module.config
    shape = [config.hidden_size, config.intermediate_size, *heads(config), config.vocab_size]
    name = "-".join(
        [gpu.replace(" ", "_"), *map(str, shape), str(next(module.parameters()).dtype).removeprefix("torch.")]
    )
    packed = quantisation(module, find_blocks(module))
    name += f"-int{packed.bits}-{packed.group}" if packed else ""
    name += "-dense" if keep_all else ""
    return cache.folder() / f"tuning-{name}.json"


def tuned(module: nn.Module, gpu: str, keep_all: bool = False) -> dict[str, Tuning]:
    """The remembered tuning, or none where tune_cuda.py has not run for this shape and GPU."""
    try:
        return {
            kind: Tuning(**values)
            for kind, values in json.loads(tuning_file(module, gpu, keep_all).read_text()).items()
        }
    except (OSError, ValueError, TypeError):
        return {}


class Decoder:
    """A fused step with its prompt, captured in a CUDA graph. The interface of engines.reference.Decoder.

    Raises ValueError for a model that `unsupported` names.
    """

    engine, marked_by = "fused", "kernels in their order, profiler"

    def __init__(self, module: nn.Module, prompt: torch.Tensor, room: int, keep_all: bool = False):
        problem = unsupported(module)
        if problem:
            raise ValueError(f"no fused decode step: {problem}")
        self.length = prompt.shape[1]
        self.cache, self.logits = prefilled(module, prompt, room)
        device = torch.cuda.get_device_properties(prompt.device)
        remembered = tuned(module, device.name, keep_all)
        self.steps = Step(module, self.cache, device.multi_processor_count, keep_all, remembered)
        self.rewind()
        self.steps.token.copy_(prompt[0, -1:])
        self.steps.enqueue()  # compiles what is not compiled yet
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.steps.enqueue()
        self.rewind()

    def step(self, token: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [1, 1, V] after one more token [1, 1]; without an argument after the token chosen last (greedy)."""
        if token is not None:
            self.steps.token.copy_(token.view(1))
        self.graph.replay()
        return self.steps.logits.view(1, 1, -1)

    def rewind(self) -> None:
        """Back to the end of the prompt."""
        self.steps.position.fill_(self.length)

    def marked(self, take: Callable[[], object], steps: int) -> dict[str, float]:
        """Milliseconds of a step by role while `take` takes so many; norms are inside the products that they stand before.

        Raises ValueError where the profiler does not see the graph's kernels.
        """
        launches = self.steps.launches
        return marks.by_order(take, steps, [each.name for each in launches], [each.role for each in launches])

    def parity(self, token: torch.Tensor) -> dict[str, float]:
        """Relative error per projection of a step taken kernel by kernel; rewinds afterwards."""
        self.rewind()
        self.steps.token.copy_(token.view(1))
        errors = self.steps.check(self.steps.start, torch.cuda.synchronize)
        self.rewind()
        return errors
