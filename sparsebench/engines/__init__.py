"""Greedy decode at batch 1 with a static KV cache: one engine for dense and sparse models alike.

`reference` runs any model through transformers (eager, or compiled and captured); `fused_cpu` and `fused_cuda` run a
whole step of a Llama-type model in kernels of our own (`tune_cuda` looks for the fastest launch settings of the latter).
Engines share `step(token)`, `rewind()` and the name `engine`.
"""

from __future__ import annotations

import copy
import importlib
import logging
from typing import Any

import torch
from torch import nn

from sparsebench.engines.reference import Decoder
from sparsebench.modules.base import measured_modules
from sparsebench.modules.input_sparse import InputSparseLinear, replace
from sparsebench.sites import find_blocks

log = logging.getLogger(__name__)


def choose(module: nn.Module, hardware: Any) -> str:
    """The engine for a sparse model. Raises ValueError where hardware.engine=fused is asked for and can't be had."""
    if hardware.engine not in ("auto", "fused"):
        return hardware.engine
    problem = fused(hardware).unsupported(module) if hardware.skips else "the kernel is masked_dense"
    if problem is None:
        return "fused"
    if hardware.engine == "fused":
        raise ValueError(f"hardware.engine=fused: {problem}")
    log.info("decode: no fused step (%s)", problem)
    return "compiled" if hardware.torch_device.type == "cuda" else "eager"


def dense_engines(module: nn.Module, hardware: Any) -> list[str]:
    """The engines that may run an untouched model here, `eager` first; whatever runs the sparse one."""
    on_gpu = hardware.torch_device.type == "cuda"
    compiled = ["compiled"] if on_gpu or hardware.engine == "compiled" else []
    return ["eager", *compiled, *(["fused"] if fused(hardware).unsupported(module) is None else [])]


def sharing_copy(module: nn.Module) -> nn.Module:
    """The same modules with the same tensors, so that a map can be replaced without touching `module`."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(t): t for t in tensors})


def fused(hardware: Any):
    return importlib.import_module(f"{__name__}.fused_{hardware.torch_device.type}")


def decoder(module: nn.Module, prompt: torch.Tensor, room: int, hardware: Any, engine: str, keep_all: bool = False):
    """A decoder by engine name; `keep_all` runs the fused kernels without skipping (a dense step)."""
    if engine == "fused":
        channel_major(module)
        return fused(hardware).Decoder(module, prompt, room, keep_all)
    return Decoder(module, prompt, room, compiled=engine == "compiled")


def channel_major(module: nn.Module) -> None:
    """Store every block map with its input channels contiguous (the maps a method left dense, too), in place."""
    for block in find_blocks(module):
        for site in block.sites.values():
            linear = module.get_submodule(site.path)
            if not isinstance(linear, InputSparseLinear):
                replace(module, site.path, InputSparseLinear(linear, site.name, -1.0))


def llama_type(module: nn.Module, dtypes: tuple) -> str | None:
    """Why a model is not of the type the fused steps know, or None.

    They know pre-norm blocks with RMSNorm, q, k, v, o with rotary embedding and grouped queries, and a SiLU-gated FFN,
    sparse by input channels with thresholds only, with or without a low-rank remainder.
    """
    try:
        blocks = find_blocks(module)
    except ValueError as error:
        return str(error)
    config, dtype = module.config, next(module.parameters()).dtype
    for site, sparse in measured_modules(module):
        if type(sparse) is not InputSparseLinear:
            return f"it takes maps that drop input channels by a threshold, got {type(sparse).__name__} at {site}"
    if set(blocks[0].sites) != {"q", "k", "v", "o", "gate", "up", "down"}:
        return f"it takes blocks with q, k, v, o, gate, up and down, got {', '.join(blocks[0].sites)}"
    if dtype not in dtypes:
        return f"it takes {' and '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {dtype}"
    if getattr(config, "hidden_act", None) != "silu":
        return f"it takes SiLU, got {getattr(config, 'hidden_act', None)}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ("default", "linear", "llama3", "yarn"):
        return f"it takes a fixed rotary embedding, got {rope}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"it takes no sliding window, got {config.sliding_window}"
    for block in blocks:
        layer = module.get_submodule(block.path)
        if len([m for m in layer.children() if hasattr(m, "variance_epsilon")]) != 2:
            return "it takes two RMSNorms per block"
        for role, site in block.sites.items():
            linear = module.get_submodule(site.path)
            if linear.bias is not None and role not in ("q", "k", "v"):
                return f"it takes no bias at {role}"
            if getattr(linear, "top_k", None) is not None:
                return "it takes thresholds, not the largest k of a token"
            if any(isinstance(m, nn.Module) and getattr(m, "q_norm", None) is not None for m in layer.modules()):
                return "it takes no norm on queries and keys"
    return None


def heads(config: Any) -> tuple[int, int, int]:
    """(query heads, key-value heads, head size)."""
    count = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // count
    return count, getattr(config, "num_key_value_heads", None) or count, head_dim


def rotary_tables(module: nn.Module, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cosine and sine [positions, head size], fp32, as the model's own rotary embedding gives them."""
    device = next(module.parameters()).device
    rotary = next(m for m in module.base_model.modules() if hasattr(m, "inv_freq"))
    with torch.no_grad():
        pair = rotary(torch.zeros(1, device=device), torch.arange(positions, device=device)[None])
    return tuple(t[0].float().contiguous() for t in pair)


def prefilled(module: nn.Module, prompt: torch.Tensor, room: int):
    """A StaticCache that holds `prompt` [1, C] with room for more, and the logits of its last token."""
    reference = Decoder(module, prompt, room, compiled=False)
    return reference.cache, reference.logits
