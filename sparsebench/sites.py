"""Where a transformer can be sparse: finds the blocks and which linear map of a block is q, k, v, o, gate, up, down.

Structure decides, not the model's name: the attribute paths of a block's linear maps are matched with the layouts
below, and their shapes must agree with the roles. An unknown layout is an error that lists what was found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

# role -> path inside one block. Fused maps have a role of their own: qkv, gate_up.
LAYOUTS = {  # by the families that have it; docs/families.md lists what was tried
    "Llama, Mistral, Qwen2, Qwen3, Gemma": {
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    },
    "Phi-3, Phi-4": {
        "qkv": "self_attn.qkv_proj", "o": "self_attn.o_proj", "gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj",
    },
    "Phi-1, Phi-2": {
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.dense",
        "fc1": "mlp.fc1", "fc2": "mlp.fc2",
    },
    "GPT-2": {
        "qkv": "attn.c_attn", "o": "attn.c_proj", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj",
    },
    "OPT": {
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.out_proj",
        "fc1": "fc1", "fc2": "fc2",
    },
    "GPT-NeoX, Pythia": {
        "qkv": "attention.query_key_value", "o": "attention.dense",
        "fc1": "mlp.dense_h_to_4h", "fc2": "mlp.dense_4h_to_h",
    },
    "ViT": {
        "q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj", "o": "attention.o_proj",
        "fc1": "mlp.fc1", "fc2": "mlp.fc2",
    },
    "BERT, RoBERTa": {
        "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
        "o": "attention.output.dense", "fc1": "intermediate.dense", "fc2": "output.dense",
    },
    "DistilBERT": {
        "q": "attention.q_lin", "k": "attention.k_lin", "v": "attention.v_lin", "o": "attention.out_lin",
        "fc1": "ffn.lin1", "fc2": "ffn.lin2",
    },
}  # fmt: skip

# Roles that read the same tensor share one group; TEAL's four distributions per block.
GROUP_OF = {
    "q": "attn_in", "k": "attn_in", "v": "attn_in", "qkv": "attn_in", "o": "attn_out",
    "gate": "mlp_in", "up": "mlp_in", "gate_up": "mlp_in", "fc1": "mlp_in", "down": "mlp_mid", "fc2": "mlp_mid",
}  # fmt: skip


class LinearMap:
    """Says that a module stands in the place of a linear map: it has `weight` [m, n] and `bias`."""


@dataclass(frozen=True)
class Site:
    """One linear map inside a block."""

    layer: int
    role: str
    path: str  # inside the whole model

    @property
    def name(self) -> str:
        """The name used in records, e.g. `3.gate`."""
        return f"{self.layer}.{self.role}"

    @property
    def group(self) -> str:
        """Which of the block's tensors feeds it: attn_in, attn_out, mlp_in or mlp_mid."""
        return GROUP_OF[self.role]


@dataclass(frozen=True)
class Block:
    """One decoder or encoder layer and its sites."""

    index: int
    path: str
    sites: dict[str, Site]  # by role


def is_linear(module: nn.Module) -> bool:
    """A linear map, or a sparse module that stands in the place of one."""
    return isinstance(module, (nn.Linear, Conv1D, LinearMap))


def shape(module: nn.Module) -> tuple[int, int]:
    """(out features m, in features n) of a linear map, whichever way round its weight is stored."""
    rows, columns = stored_shape(module)
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def stored_shape(module: nn.Module) -> tuple[int, int]:
    """The shape of a map's weight as its module has it; a map that says it need not be unpacked for that."""
    return getattr(module, "shape", None) or tuple(module.weight.shape)


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a map's weight: of a quantised one what is stored, scales and zero points included."""
    packed = getattr(module, "packed", None)
    return module.weight.numel() * module.weight.element_size() if packed is None else packed.bytes


def exact_weight(module: nn.Module) -> torch.Tensor:
    """The weight [m, n] of a map in float32, of a quantised one before it is rounded to the activations' dtype."""
    packed = getattr(module, "packed", None)
    return weight_of(module).float() if packed is None else packed.dequantised(torch.float32)


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight of a linear map as [m, n], a view whichever way round it is stored."""
    return module.weight.data.t() if isinstance(module, Conv1D) else module.weight.data


def find_blocks(model: nn.Module) -> list[Block]:
    """The model's blocks in order. Raises ValueError where no list of equal blocks with a known layout is found."""
    stacks = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    nearest: tuple[int, str, nn.Module, str | None] | None = (
        None  # blocks that fit, the first that does not, the layout
    )
    for name, stack in stacks:
        for family, layout in LAYOUTS.items():
            fitting = [fits(block, layout) for block in stack]
            if all(fitting):
                return [
                    Block(i, f"{name}.{i}", {r: Site(i, r, f"{name}.{i}.{p}") for r, p in layout.items()})
                    for i in range(len(stack))
                ]
            first = fitting.index(False)
            linears = any(is_linear(m) for m in stack[first].modules())
            if linears and (nearest is None or sum(fitting) > nearest[0]):
                nearest = (sum(fitting), f"{name}.{first}", stack[first], family if any(fitting) else None)
    raise ValueError(unknown(nearest))


def unknown(nearest: tuple[int, str, nn.Module, str | None] | None) -> str:
    """What a model without known blocks is told: the block that does not fit, its linear maps, the families known."""
    known = f"known families: {'; '.join(LAYOUTS)}, and what has their structure"
    if nearest is None:
        return f"model: blocks of an unknown structure, no list of blocks with linear maps was found; {known}"
    count, path, block, family = nearest
    linears = ", ".join(sorted(n for n, m in block.named_modules() if is_linear(m)))
    beside = f" ({count} other blocks are those of {family})" if family else ""
    return f"model: {path} is a block of an unknown structure{beside}; its linear maps: {linears}; {known}"


def fits(block: nn.Module, layout: dict[str, str]) -> bool:
    """Whether `block` has exactly the linear maps of `layout`, with shapes that agree with their roles."""
    linears = {n: m for n, m in block.named_modules() if is_linear(m)}
    if set(linears) != set(layout.values()):
        return False
    size = {role: shape(linears[path]) for role, path in layout.items()}
    up, down = next((size[r] for r in ("up", "fc1") if r in size), None), size.get("down", size.get("fc2"))
    if "gate" in size and size["gate"] != size["up"]:
        return False
    if "gate_up" in size:
        up = (size["gate_up"][0] // 2, size["gate_up"][1])
    if up != down[::-1]:
        return False
    readers = [size[r][1] for r in size if GROUP_OF[r] in ("attn_in", "mlp_in")]
    writers = [size[r][0] for r in size if GROUP_OF[r] in ("attn_out", "mlp_mid")]
    return len({*readers, *writers}) == 1  # all read from and write to the residual stream


def sites(model: nn.Module) -> Iterator[Site]:
    for block in find_blocks(model):
        yield from block.sites.values()
