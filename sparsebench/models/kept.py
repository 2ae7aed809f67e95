"""Checkpoints that are stored in 8 or 4 bits, kept so (`model.quantize=keep`): GGUF files, AWQ and GPTQ folders.

The model is built from the dequantised weights first, so that it is as whole as any other; then the stored integers, scales
and zero points of its block maps take their places, repacked without rounding anything. What can't be kept as it is stored
is refused in one line: other types and bits, groups that interleave (GPTQ's act-order), maps in more than one type.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from torch import nn

from sparsebench.kernels._packed import Packed, packed
from sparsebench.models import gguf
from sparsebench.models.quantised import maps_of, zero_levels
from sparsebench.modules.input_sparse import replace
from sparsebench.modules.quant_sparse import QuantLinear

FORMATS = ("awq", "gptq")
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where output 8k + i of a word stands (AutoAWQ's gemm packing)
NEEDED = {"awq": "gptqmodel", "gptq": "gptqmodel", "compressed-tensors": "compressed_tensors", "torchao": "torchao"}
SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)


def about(location: str) -> dict[str, Any]:
    """`quantization_config` of a folder's config.json; empty where there is none."""
    file = Path(location, "config.json")
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        return {}
    return content.get("quantization_config") or {} if isinstance(content, dict) else {}


def method_of(location: str) -> str | None:
    """Which quantisation a folder's weights are stored in, as transformers names it, or None."""
    return about(location).get("quant_method")


def problem(location: str) -> str | None:
    """Why `model.quantize=keep` can't keep the weights at a location, in one line, or None."""
    if Path(location).is_file():
        return gguf.unkept(location)
    method = method_of(location)
    if method is None:
        return f"{location!r} is no GGUF file, and no folder whose config.json has a quantization_config"
    settings = about(location)
    if method not in FORMATS:
        return f"known are GGUF files and folders in {' and '.join(FORMATS)}, got {method} (model.quantize=none: transformers)"
    bits, group = settings.get("bits", settings.get("w_bit")), settings.get("group_size", settings.get("q_group_size"))
    if bits != 4:
        return f"4 bits are known in {method}, got {bits}"
    if method == "awq" and settings.get("version", "gemm").lower() != "gemm":
        return f"AWQ's version gemm is known, got {settings['version']}"
    if not isinstance(group, int) or group == 0 or group < -1:
        return f"a group size is needed, got {group}"
    return None


def package_problem(location: str) -> str | None:
    """Why transformers can't load a folder's quantised weights here, or None."""
    method = method_of(location)
    package = NEEDED.get(str(method))
    if package is None or find_spec(package) is not None:
        return None
    keep = "; or model.quantize=keep" if method in FORMATS and problem(location) is None else ""
    return f"model.path holds weights in {method}, for which transformers needs {package}: pip install {package}{keep}"


def load(location: str, config: transformers.PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The model of an AWQ or GPTQ folder, its block maps dequantised. Raises ValueError where a tensor has no place."""
    stored = tensors_of(location)
    state = {name: t.to(dtype) for name, t in stored.items() if not name.endswith(PARTS)}
    for path in sorted({n.removesuffix(".qweight") for n in stored if n.endswith(".qweight")}):
        state[f"{path}.weight"] = stored_map(location, stored, path, dtype).dequantised()
    cls = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in cls(config).named_parameters()}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    wrong = [f"{name} is missing" for name in sorted(expected.keys() - state.keys() - tied)]
    both = sorted(expected.keys() & state.keys())
    wrong += [f"{n} has shape {list(state[n].shape)}, the model {list(expected[n])}" for n in both
              if tuple(state[n].shape) != expected[n]]  # fmt: skip
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"model.path={location} is not a whole {cls.__name__}: {wrong[0]}{more}")
    return cls.from_pretrained(None, config=config, state_dict=state, dtype=dtype)


PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")


def tensors_of(location: str) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files."""
    files = sorted(Path(location).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """The eight nibbles of int32 words [..., w] in rising order of bits, uint8 [..., w, 8]."""
    return (words.unsqueeze(-1) >> SHIFTS & 15).to(torch.uint8)


def stored_map(location: str, stored: dict[str, torch.Tensor], path: str, dtype: torch.dtype) -> Packed:
    """One map of an AWQ or GPTQ folder, repacked. Raises ValueError where its groups interleave or a tensor is missing."""
    names = {part: f"{path}{part}" for part in PARTS[:3]}
    missing = [name for name in names.values() if name not in stored]
    if missing:
        raise ValueError(f"model.path={location}: {missing[0]} is missing")
    words, zeros, scales = (stored[name] for name in names.values())
    if method_of(location) == "awq":
        levels, zero = (nibbles(t)[..., AWQ_ORDER].flatten(1) for t in (words, zeros))
        zero = zero.half()
    else:
        levels = nibbles(words.t()).flatten(1).t()  # a word holds eight inputs of one output
        first = 0 if about(location).get("checkpoint_format") == "gptq_v2" else 1  # older files store zero - 1
        zero = nibbles(zeros).flatten(1).half() + first
    size = about(location).get("group_size", about(location).get("q_group_size"))
    group = len(levels) if size == -1 else size
    index = stored.get(f"{path}.g_idx")
    if index is not None and not torch.equal(index.long(), torch.arange(len(levels)) // group):
        raise ValueError(
            f"model.quantize=keep: the groups of {path} interleave (GPTQ with desc_act, its g_idx is out of order), which no "
            "kernel here reads"
        )
    symmetric = bool((zero == 8).all())
    return packed(levels.contiguous(), scales.half(), None if symmetric else zero, 4, group, "input", dtype)


def keep(module: nn.Module, location: str, config: transformers.PretrainedConfig, kernel: str) -> dict[str, Any]:
    """Put the stored integers into the places of the block maps of `module`, in place; what the record says of it."""
    read = reader(module, location, config)
    zeros, weights, kept, kinds = 0, 0, 0, set()
    for path, linear in maps_of(module):
        stored = read(path)
        zeros, weights, kept = zeros + zero_levels(stored), weights + linear.weight.numel(), kept + stored.bytes
        kinds.add((stored.bits, stored.group, stored.zero is not None))
        device = linear.weight.device
        aside = (None if t is None else t.to(device) for t in (stored.q, stored.scale, stored.zero))
        moved = Packed(*aside, stored.shape, stored.bits, stored.group, stored.axis, stored.dtype)
        replace(module, path, QuantLinear(moved, linear.bias, kernel))
    (bits, group, asymmetric), *others = sorted(kinds)
    return {
        "bits": bits if not others else sorted({b for b, _, _ in kinds}), "group": group,
        "axis": f"inputs, one scale to {group}",
        "rounding": f"as stored ({'GGUF' if Path(location).is_file() else method_of(location)})"
        + (", with zero points" if asymmetric else ""),
        "zero_weights": zeros / weights, "bits_per_weight": 8 * kept / weights,
        "left_in_dtype": "embeddings, head, norms and biases",
    }  # fmt: skip


def reader(module: nn.Module, location: str, config: transformers.PretrainedConfig) -> Callable[[str], Packed]:
    """A function that gives the stored weight of a map by its path."""
    dtype = next(module.parameters()).dtype
    if not Path(location).is_file():
        stored = tensors_of(location)
        return lambda path: stored_map(location, stored, path, dtype)

    stored_in_file = gguf.levels(location, config)

    def of_gguf(path: str) -> Packed:
        levels, scale, zero, bits = stored_in_file(f"{path}.weight")
        made = [None if t is None else torch.from_numpy(np.ascontiguousarray(t)) for t in (levels, scale, zero)]
        return packed(*made, bits, gguf.GROUP, "input", dtype)

    return of_gguf
