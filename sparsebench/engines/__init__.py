"""Greedy decode at batch 1 with a static KV cache: one engine for dense and sparse models alike.

`reference` runs any model through transformers (eager, or compiled and captured); `fused_cpu` and `fused_cuda` run a
whole step of a Llama-type model in kernels of our own (`tune_cuda` looks for the fastest launch settings of the latter).
Engines share `step(token)`, `rewind()` and the name `engine`. `verified` makes one and compares it with the model first.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
from torch import nn

from sparsebench.engines.check import verified
from sparsebench.engines.reference import Decoder
from sparsebench.kernels._packed import Packed
from sparsebench.modules.base import measured_modules
from sparsebench.modules.gate_sparse import GateSparseFFN
from sparsebench.modules.input_sparse import InputSparseLinear, replace, sparse_of
from sparsebench.modules.quant_sparse import QuantSparseLinear
from sparsebench.modules.rotated_norm import RotatedNorm
from sparsebench.modules.storage import lay
from sparsebench.sites import Block, find_blocks, shape

__all__ = ["Decoder", "choose", "decoder", "verified"]

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
    return "compiled" if compiles(hardware) else "eager"


def dense_engines(module: nn.Module, hardware: Any) -> list[str]:
    """The engines that may run an untouched model here, `eager` first; whatever runs the sparse one."""
    compiled = ["compiled"] if compiles(hardware) or hardware.engine == "compiled" else []
    return ["eager", *compiled, *(["fused"] if fused(hardware).unsupported(module) is None else [])]


def compiles(hardware: Any) -> bool:
    """Whether a compiled step is looked at without being asked for: a CUDA graph is of one device, and what is compiled
    without one is slower than the fused step and takes minutes for the models that need several."""
    return hardware.torch_device.type == "cuda" and hardware.devices == 1


def fused(hardware: Any):
    return importlib.import_module(f"{__name__}.fused_{hardware.torch_device.type}")


def decoder(module: nn.Module, prompt: torch.Tensor, room: int, hardware: Any, engine: str, keep_all: bool = False):
    """A decoder by engine name; `keep_all` runs the fused kernels without skipping (a dense step)."""
    if engine == "fused":
        channel_major(module)
        return fused(hardware).Decoder(module, prompt, room, keep_all)
    return Decoder(module, prompt, room, compiled=engine == "compiled")


def channel_major(module: nn.Module) -> None:
    """Store every block map with its input channels contiguous, in place; maps a method left dense take its kernel, too."""
    kernel = next((sparse.kernel_name for _, sparse in measured_modules(module)), "masked_dense")
    for block in find_blocks(module):
        for site in block.sites.values():
            linear = module.get_submodule(site.path)
            by_neuron = site.role == "up" and gate_sparse_of(module, block) is not None
            if not isinstance(linear, InputSparseLinear) and not by_neuron:
                replace(module, site.path, sparse_of(linear, site.name, -1.0, kernel=kernel))
    lay(module)


def gate_sparse_of(module: nn.Module, block: Block) -> GateSparseFFN | None:
    """The FFN of a block where its gate chooses neurons: it holds the weight of down itself, and `up` stays by neuron."""
    path = block.sites["up"].path.rpartition(".")[0] if "up" in block.sites else ""
    ffn = module.get_submodule(path) if path else None
    return ffn if isinstance(ffn, GateSparseFFN) else None


def llama_type(module: nn.Module, dtypes: tuple, top_k: bool = False) -> str | None:
    """Why a model is not of the type the fused steps know, or None. top_k: a step that selects the largest k, too.

    They know pre-norm blocks with RMSNorm, q, k, v, o with rotary embedding and grouped queries, and a SiLU-gated FFN,
    sparse by input channels with thresholds (or the largest k of a token), with or without a low-rank remainder, or by
    neurons that the gate chooses; norms may rotate what they hand on.
    """
    try:
        blocks = find_blocks(module)
    except ValueError as error:
        return str(error)
    config, dtype = module.config, next(module.parameters()).dtype
    for site, sparse in measured_modules(module):
        if type(sparse) not in (InputSparseLinear, QuantSparseLinear, GateSparseFFN):
            return f"it takes maps that drop input channels by a threshold, got {type(sparse).__name__} at {site}"
    for block in blocks:
        maps = {**block.sites, **block.others, **({"experts": None} if block.experts else {})}
        maps |= {"down": None} if gate_sparse_of(module, block) is not None else {}
        if set(maps) != {"q", "k", "v", "o", "gate", "up", "down"}:
            return f"it takes blocks with q, k, v, o, gate, up and down, got {', '.join(maps)}"
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
            if getattr(linear, "top_k", None) is not None and not top_k:
                return "it takes thresholds, not the largest k of a token"
            if any(isinstance(m, nn.Module) and getattr(m, "q_norm", None) is not None for m in layer.modules()):
                return "it takes no norm on queries and keys"
        ffn = gate_sparse_of(module, block)
        if ffn is not None and (not isinstance(ffn.own_rule, nn.Identity) or type(ffn.up) is not nn.Linear):
            return f"it takes no rule of its own and no quantised maps beside neurons that the gate chooses, got one at {ffn.site}"
    return mixed(module, blocks) or misfit(module, blocks)


def quantisation(module: nn.Module, blocks: list) -> Packed | None:
    """The weight of the first block map where it is quantised; `mixed` says whether it speaks for all."""
    return getattr(module.get_submodule(next(iter(blocks[0].sites.values())).path), "packed", None)


def mixed(module: nn.Module, blocks: list) -> str | None:
    """Why block maps that are quantised in different ways have no fused step, or None."""
    stored = [
        getattr(module.get_submodule(site.path), "packed", None) for block in blocks for site in block.sites.values()
    ]
    kinds = {None if p is None else (p.bits, p.axis, p.grouped and p.group) for p in stored}
    return None if len(kinds) == 1 else "it takes block maps that are all quantised in one way, or none of them"


def misfit(module: nn.Module, blocks: list) -> str | None:
    """Which tensor does not have the shape that a fused step reads at its address, or None.

    The steps read weights, norms, tables and caches by address, so a shape that differs would be read past its end.
    """
    config, base = module.config, module.base_model
    count, groups, head_dim = heads(config)
    hidden, inner = config.hidden_size, config.intermediate_size
    wanted = {
        "q": (count * head_dim, hidden), "k": (groups * head_dim, hidden), "v": (groups * head_dim, hidden),
        "o": (hidden, count * head_dim), "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
    }  # fmt: skip
    for block in blocks:
        for role, site in block.sites.items():
            if shape(module.get_submodule(site.path)) != wanted[role]:
                return f"it takes {role} of shape {wanted[role]}, got {site.path} of another"
        ffn = gate_sparse_of(module, block)
        if ffn is not None and tuple(ffn.down.shape) != wanted["down"]:
            return f"it takes down of shape {wanted['down']}, got that of {ffn.site} of another"
    head = module.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None or head.weight.shape[1] != hidden:
        return f"it takes a head without bias over {hidden} channels"
    if base.get_input_embeddings().weight.shape[1] != hidden:
        return f"it takes embeddings of {hidden} channels"
    norms = [m for layer in (base, *(module.get_submodule(b.path) for b in blocks)) for m in layer.children()]
    norms = [m for m in norms if hasattr(m, "variance_epsilon")]
    if len(norms) != 2 * len(blocks) + 1:
        return "it takes one RMSNorm after the last block"
    if any(getattr(m, "weight", None) is None or tuple(m.weight.shape) != (hidden,) for m in norms):
        return f"it takes RMSNorms with a weight of {hidden} channels"
    rotations = [m.rotation for m in norms if isinstance(m, RotatedNorm)]
    if any(tuple(r.shape) != (hidden, hidden) or not r.is_contiguous() for r in rotations):
        return f"it takes rotations of {hidden} channels"
    if isinstance(norms[0], RotatedNorm):
        return "it takes no rotation after the last block"
    if not any(hasattr(m, "inv_freq") for m in base.modules()):
        return "it takes a rotary embedding, got none"
    try:
        cosine, _ = rotary_tables(module, 1)
    except (TypeError, AttributeError) as error:
        return f"it takes one rotary embedding for all layers ({error})"
    if cosine.shape[-1] != head_dim:
        return f"it takes a rotary embedding of all {head_dim} channels of a head, got {cosine.shape[-1]}"
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
    """A StaticCache that holds `prompt` [1, C] with room for more, and the logits of its last token.

    Raises ValueError where a layer's cache has not one place per position, as a fused step reads it.
    """
    reference = Decoder(module, prompt, room, compiled=False)
    _, groups, head_dim = heads(module.config)
    wanted = (1, groups, prompt.shape[1] + room, head_dim)
    for layer in reference.cache.layers:
        for held in (layer.keys, layer.values):
            if tuple(held.shape) != wanted or not held.is_contiguous():
                raise ValueError(f"it takes a cache of shape {wanted} in every layer, got {tuple(held.shape)}")
    return reference.cache, reference.logits
