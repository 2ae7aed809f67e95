"""One model over several devices of a kind: its blocks in order, in shares of equal bytes, each device's after the other's.

What a block is given is moved to its device before it runs, and logits go back to the first: whoever uses the model sees
one device. transformers and accelerate place the weights of checkpoints the same way (`device_map`); their hooks are
taken off, since a compiler can't look into them and kernels of our own need the device to be the current one.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import torch
import transformers
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

from sparsebench.sites import Block, find_blocks

Placement = dict[str, torch.device]  # by the path of a part


def placed(module: nn.Module, devices: list[torch.device]) -> Placement:
    """Where each part of a model goes: blocks in order by bytes, what stands before them to the first device, the last norm
    and the head to the last one (a head that is tied to the embeddings stays with them).
    """
    blocks = [block.path for block in find_blocks(module)]
    inside = tuple(f"{path}." for path in blocks)
    outside = {
        name: part
        for name, part in module.named_modules()
        if name not in blocks and not f"{name}.".startswith(inside) and own_bytes(part)
    }
    holder = next((name for name in outside if f"{blocks[0]}.".startswith(f"{name}.") or not name), None)
    if holder is not None:
        raise ValueError(f"hardware.devices must be 1 for a model whose {holder!r} holds blocks and tensors of its own")
    embedding, order = module.get_input_embeddings().weight, [name for name, _ in module.named_modules()]
    behind = {
        name for name in order[order.index(blocks[-1]) :]
        if name in outside and outside[name]._parameters and getattr(outside[name], "weight", None) is not embedding
    }  # fmt: skip
    sizes = {path: sum(own_bytes(part) for part in module.get_submodule(path).modules()) for path in blocks}
    before = sum(own_bytes(part) for name, part in outside.items() if name not in behind)
    share = (before + sum(sizes.values()) + sum(own_bytes(outside[name]) for name in behind)) / len(devices)
    placement = {name: devices[-1 if name in behind else 0] for name in outside}
    for path in blocks:
        placement[path] = devices[min(len(devices) - 1, int((before + sizes[path] / 2) / share))]
        before += sizes[path]
    return placement


def own_bytes(part: nn.Module) -> int:
    """Bytes of a module's own parameters and buffers."""
    return sum(
        t.numel() * t.element_size() for t in (*part._parameters.values(), *part._buffers.values()) if t is not None
    )


def skeleton(config: transformers.PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    """A model's modules with shapes and no content."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def made_random(
    config: transformers.PretrainedConfig, dtype: torch.dtype, devices: list[torch.device], seed: int
) -> nn.Module:
    """The architecture with random weights, drawn on the devices where they stay."""
    torch.manual_seed(seed)
    if len(devices) == 1:
        with devices[0]:
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    module = skeleton(config, dtype)
    placement = placed(module, devices)
    for path, device in placement.items():
        module.get_submodule(path).to_empty(device=device)
    module.init_weights()
    return spread(module, placement)


def moved_to(module: nn.Module, devices: list[torch.device]) -> nn.Module:
    """A model on its devices."""
    return module.to(devices[0]) if len(devices) == 1 else spread(module, placed(module, devices))


def map_of(config: transformers.PretrainedConfig, dtype: torch.dtype, devices: list[torch.device]) -> dict[str, Any]:
    """The `device_map` of `from_pretrained`: each weight is read onto the device where it stays."""
    return {path: str(device) for path, device in placed(skeleton(config, dtype), devices).items()}


def check_room(config: transformers.PretrainedConfig, dtype: torch.dtype, devices: list[torch.device]) -> None:
    """Raise ValueError where a model's weights don't fit: a part on the CPU would be timed as the bus between them."""
    if devices[0].type != "cuda":
        return
    needed = sum(own_bytes(part) for part in skeleton(config, dtype).modules())
    there = sum(torch.cuda.mem_get_info(device)[0] for device in devices)
    if needed > there:
        raise ValueError(
            f"hardware.devices={len(devices)}: the weights take {needed / 1e9:.1f} GB, {there / 1e9:.1f} GB are free; nothing "
            "is left on the CPU, since a time would be that of moving weights: take more devices or model.num_layers=N"
        )


def spread(module: nn.Module, placement: Placement) -> nn.Module:
    """Move a model's parts to their devices, where they aren't, and let what they are given follow."""
    remove_hook_from_submodules(module)
    for path, device in placement.items():
        part = module.get_submodule(path)
        if any(t.device != device for t in (*part.parameters(), *part.buffers())):
            part.to(device)
        part.register_forward_pre_hook(functools.partial(arrive, device), with_kwargs=True)
    for whole in {module, module.base_model}:
        whole.register_forward_hook(functools.partial(leave, module.get_input_embeddings().weight.device))
    return module


def arrive(device: torch.device, _: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Hook before a part: its inputs on its device, which becomes the current one for kernels that are launched there."""
    if device.type == "cuda" and not torch.compiler.is_compiling():
        torch.cuda.set_device(device)
    return moved(args, device), moved(kwargs, device)


def leave(device: torch.device, _: nn.Module, args: tuple, output: Any) -> Any:
    """Hook behind the whole model: logits on the first device, which is the current one again."""
    if device.type == "cuda" and not torch.compiler.is_compiling():
        torch.cuda.set_device(device)
    if getattr(output, "logits", None) is not None:
        output.logits = output.logits.to(device)
    return output


def moved(value: Any, device: torch.device) -> Any:
    """Tensors of nested tuples, lists and dicts on a device; a cache, whose layers each have their own, stays."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(moved(each, device) for each in value)
    if type(value) is dict:
        return {key: moved(each, device) for key, each in value.items()}
    return value


def device_of(module: nn.Module, block: Block) -> torch.device:
    return next(module.get_submodule(block.path).parameters()).device


def devices_of(module: nn.Module) -> list[torch.device]:
    """The devices of a model's blocks, in order, each once."""
    return list(dict.fromkeys(device_of(module, block) for block in find_blocks(module)))


def blocks_on(module: nn.Module) -> dict[str, int]:
    """How many blocks lie on each device, for the record."""
    return dict(Counter(str(device_of(module, block)) for block in find_blocks(module)))
