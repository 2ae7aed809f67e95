"""A whole decode step of a Llama-type model on an NVIDIA GPU, dense or sparse, as five kernels a layer (decode.cu).

What surrounds the projections is fused into them (_step_cuda.py has the kernels in their order). The step is captured
once in a CUDA graph, or one on each device of a model that is spread over several; the next token and the position live
on the device.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsebench import cache
from sparsebench.engines import heads, llama_type, marks, prefilled, quantisation
from sparsebench.engines._launch_cuda import DEFAULTS, MAPS, Launch
from sparsebench.engines._step_cuda import Step
from sparsebench.kernels import cuda_packed
from sparsebench.kernels.cuda_gather import SOURCE, Tuning
from sparsebench.modules import storage
from sparsebench.sites import Block, find_blocks

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
    blocks = find_blocks(module)
    packed = quantisation(module, blocks)
    return elsewhere(module, blocks) or (None if packed is None else cuda_packed.unserved(packed))


def elsewhere(module: nn.Module, blocks: list[Block]) -> str | None:
    """Why a step can't read embeddings or head by address, since they lie on another device than their blocks, or None."""
    first, last = (next(module.get_submodule(blocks[i].path).parameters()).device for i in (0, -1))
    if module.get_input_embeddings().weight.device != first:
        return "it takes embeddings on the device of the first block"
    return (
        None
        if module.get_output_embeddings().weight.device == last
        else "it takes a head on the device of the last block"
    )


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


def steps_of(module: nn.Module, cache: Any, keep_all: bool) -> list[Step]:
    """The step's parts, one to each device that holds blocks, in order."""
    by_device: dict[torch.device, list[Block]] = {}
    for block in find_blocks(module):
        by_device.setdefault(next(module.get_submodule(block.path).parameters()).device, []).append(block)
    parts = []
    for device, blocks in by_device.items():
        about = torch.cuda.get_device_properties(device)
        remembered = tuned(module, about.name, keep_all)
        parts.append(Step(module, cache, about.multi_processor_count, keep_all, remembered, blocks))
    return parts


class Decoder:
    """A fused step with its prompt, captured in a CUDA graph. The interface of engines.reference.Decoder.

    A model over several devices has a part of the step, and a graph, on each: the residual stream is handed on. Raises
    ValueError for a model that `unsupported` names.
    """

    engine, marked_by = "fused", "kernels in their order, profiler"

    def __init__(self, module: nn.Module, prompt: torch.Tensor, room: int, keep_all: bool = False):
        problem = unsupported(module)
        if problem:
            raise ValueError(f"no fused decode step: {problem}")
        self.length, self.lying, self.device = prompt.shape[1], storage.lie(module), prompt.device
        self.cache, self.logits = prefilled(module, prompt, room)
        self.parts = steps_of(module, self.cache, keep_all)
        self.rewind()
        self.parts[0].token.copy_(prompt[0, -1:])
        for i, part in enumerate(self.parts):  # compiles what is not compiled yet
            self.hand_on(i)
            with torch.cuda.device(part.device):
                part.enqueue()
                torch.cuda.synchronize()
        self.graphs = [captured(part) for part in self.parts]
        self.rewind()

    def hand_on(self, i: int) -> None:
        """Give part i the residual stream that the part before it has left."""
        if i:
            self.parts[i].residual.copy_(self.parts[i - 1].residual)

    def step(self, token: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [1, 1, V] after one more token [1, 1]; without an argument after the token chosen last (greedy)."""
        first, last = self.parts[0], self.parts[-1]
        if token is not None:
            first.token.copy_(token.view(1))
        elif first is not last:
            first.token.copy_(last.token)
        for i, (part, graph) in enumerate(zip(self.parts, self.graphs, strict=True)):
            self.hand_on(i)
            with torch.cuda.device(part.device):
                graph.replay()
        for part in self.parts[:-1]:  # the last one's head has moved on
            part.position.copy_(last.position)
        return last.logits.view(1, 1, -1).to(self.device)

    def rewind(self) -> None:
        """Back to the end of the prompt, with the weights as the step reads them."""
        storage.put(self.lying)
        for part in self.parts:
            part.position.fill_(self.length)

    def marked(self, take: Callable[[], object], steps: int) -> dict[str, float]:
        """Milliseconds of a step by role while `take` takes so many; norms are inside the products that they stand before.

        Raises ValueError where the profiler does not see the graph's kernels.
        """
        launches = [launch for part in self.parts for launch in part.launches]
        return marks.by_order(take, steps, [each.name for each in launches], [each.role for each in launches])

    def parity(self, token: torch.Tensor) -> dict[str, float]:
        """Relative error per projection of a step taken kernel by kernel; rewinds afterwards."""
        self.rewind()
        self.parts[0].token.copy_(token.view(1))
        errors: dict[str, float] = {}
        for i, part in enumerate(self.parts):
            self.hand_on(i)
            with torch.cuda.device(part.device):
                errors |= part.check(part.start, torch.cuda.synchronize)
        self.rewind()
        return errors


def captured(part: Step) -> torch.cuda.CUDAGraph:
    """A part of the step as a CUDA graph of its device."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(part.device), torch.cuda.graph(graph, stream=torch.cuda.Stream(part.device)):
        part.enqueue()
    return graph
