"""A GGUF file's model in transformers: the configuration from its metadata, the weights from its tensors.

Which tensor is which parameter is the gguf package's own table. Undone are what llama.cpp's converter does to weights:
q and k of the `llama` architecture have their rows in pairs (transformers' rotary embedding turns halves), Gemma's norms
hold 1 + w, and a head that was tied may be stored beside the embedding.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from gguf import get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from sparsebench.models.gguf.header import File, Tensor

KINDS = {  # a GGUF's architecture -> transformers' model_type
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text", "phi2": "phi", "phi3": "phi3",
}  # fmt: skip
EMBEDDING, HEAD, FREQUENCIES = "token_embd.weight", "output.weight", "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
COMPUTED = re.compile(rf"{FREQUENCIES}|{LONG}|{SHORT}|blk\.\d+\.attn_rot_embd\.weight".replace(".weight", r"\.weight"))
SAME_MATRIX = 0.1  # relative difference below which head and embedding are one matrix, quantised twice
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # of Llama 3.1 and 3.2
BLOCKS_OF_GEMMA3_27B = 62  # the only size whose attention is scaled by the width of the model over its heads


@dataclass(frozen=True)
class Place:
    """Where a parameter comes from: a tensor, and which of its rows (None = all)."""

    tensor: Tensor
    rows: slice | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


def config_of(file: File) -> transformers.PretrainedConfig:
    """transformers' configuration of the file's model. Raises ValueError for an architecture that is not known."""
    name = file.fields.get("general.architecture")
    if name not in KINDS:
        raise ValueError(f"its architecture is {name!r}, known are {', '.join(KINDS)}")
    if file.get("expert_count", 0):
        raise ValueError(f"it is a mixture of {file.get('expert_count')} experts, which has no place here")
    heads, hidden = needed(file, "attention.head_count"), needed(file, "embedding_length")
    head_dim = file.get("attention.key_length", hidden // heads)
    if EMBEDDING not in file.tensors:
        raise ValueError(f"{EMBEDDING} is missing")
    fields = {
        "vocab_size": file.tensors[EMBEDDING].shape[0],
        "hidden_size": hidden,
        "intermediate_size": needed(file, "feed_forward_length"),
        "num_hidden_layers": needed(file, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": one(file, "attention.head_count_kv", heads),
        "max_position_embeddings": needed(file, "context_length"),
        "tie_word_embeddings": tied(file),
        **{f"{role}_token_id": file.fields.get(f"tokenizer.ggml.{key}_token_id") for role, key in SPECIAL},
    }
    if name == "phi2":
        fields["layer_norm_eps"] = plain(needed(file, "attention.layer_norm_epsilon"))
    else:
        fields["rms_norm_eps"] = plain(needed(file, "attention.layer_norm_rms_epsilon"))
    if name in ("llama", "qwen3", "gemma3"):
        fields |= {"head_dim": head_dim, "attention_bias": "blk.0.attn_q.bias" in file.tensors}
    if name == "llama":
        fields["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    rope = rope_of(file, head_dim)
    fields |= gemma3(file, head_dim, rope) if name == "gemma3" else {"rope_parameters": rope}
    if name == "phi3":
        fields["original_max_position_embeddings"] = original_length(file)
        fields["sliding_window"] = file.get("attention.sliding_window") or None
    try:
        return transformers.AutoConfig.for_model(KINDS[name], **fields)
    except Exception as error:  # transformers checks with error classes of its own
        line = " ".join(str(error).split())
        raise ValueError(f"its metadata fit no {KINDS[name]}: {line}") from error


SPECIAL = (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))  # transformers' name, GGUF's name


def needed(file: File, key: str) -> Any:
    value = one(file, key)
    if value is None:
        raise ValueError(f"{file.fields['general.architecture']}.{key} is missing")
    return value


def one(file: File, key: str, default: Any = None) -> Any:
    """A field that may be given per block. Raises ValueError where blocks differ."""
    value = file.get(key, default)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise ValueError(f"{key} differs between blocks, which has no place here")
        return value[0]
    return value


def plain(value: float) -> float:
    """A float32 of the file as the decimal number it was made from: 9.99999e-06 -> 1e-05."""
    return float(f"{value:.6g}")


def original_length(file: File) -> int:
    """Positions before the rotary embedding was stretched."""
    return file.get("rope.scaling.original_context_length") or needed(file, "context_length")


def rope_of(file: File, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of the (full) attention. Raises ValueError for a scaling that is not known."""
    rope = {"rope_type": "default", "rope_theta": plain(file.get("rope.freq_base", 10000.0))}
    turned = file.get("rope.dimension_count", head_dim)
    if file.fields["general.architecture"] in ("phi2", "phi3"):
        rope["partial_rotary_factor"] = turned / head_dim
    elif turned != head_dim:
        raise ValueError(
            f"its rotary embedding turns {turned} of a head's {head_dim} channels, which has no place here"
        )
    scaling, factor = file.get("rope.scaling.type", "none"), file.get("rope.scaling.factor")
    if FREQUENCIES in file.tensors:
        return rope | llama3(file.dequantised(FREQUENCIES), rope["rope_theta"])
    if LONG in file.tensors and SHORT in file.tensors:
        factors = {"long_factor": file.dequantised(LONG).tolist(), "short_factor": file.dequantised(SHORT).tolist()}
        return rope | {"rope_type": "longrope", "original_max_position_embeddings": original_length(file), **factors}
    if scaling == "none" or not factor:
        return rope
    if scaling == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if scaling == "yarn":
        return rope | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original_length(file)}
    raise ValueError(f"its rotary embedding is scaled by {scaling!r}, known are none, linear, yarn and stored factors")


def llama3(factors: np.ndarray, theta: float) -> dict[str, Any]:
    """The rule behind Llama 3's stored factors, by which each frequency is divided; any other list as it is.

    The rule (Llama 3.1): wavelengths above L / low are divided by the factor, below L / high left, between interpolated.
    """
    factor = float(factors.max())
    frequency = theta ** -(np.arange(len(factors)) / len(factors))
    low, high, length = LLAMA3.values()
    smooth = np.clip((length * frequency / (2 * math.pi) - low) / (high - low), 0, 1)
    if np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-3):
        return {"rope_type": "llama3", "factor": plain(factor), **LLAMA3}
    same = {f"{name}_factor": factors.tolist() for name in ("short", "long")}
    return {"rope_type": "longrope", "attention_factor": 1.0, "original_max_position_embeddings": 1 << 30, **same}


def gemma3(file: File, head_dim: int, rope: dict[str, Any]) -> dict[str, Any]:
    """Gemma 3's own fields: windows of local attention in five of six blocks, with a rotary embedding of their own."""
    blocks, pattern = needed(file, "block_count"), file.get("attention.sliding_window_pattern", 6)
    every = pattern if isinstance(pattern, list) else [(i + 1) % pattern for i in range(blocks)]  # 0, false = full
    wide = blocks == BLOCKS_OF_GEMMA3_27B
    return {
        "sliding_window": needed(file, "attention.sliding_window"),
        "layer_types": ["sliding_attention" if each else "full_attention" for each in every[:blocks]],
        "query_pre_attn_scalar": needed(file, "embedding_length") // needed(file, "attention.head_count")
        if wide
        else head_dim,
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": plain(file.get("rope.freq_base_swa", 10000.0))},
        },
    }


def tied(file: File) -> bool:
    """Whether head and embedding are one matrix: only one is there, or both differ by their quantisation alone."""
    if HEAD not in file.tensors:
        return True
    if file.tensors[HEAD].shape != file.tensors[EMBEDDING].shape:
        return False
    head, embedding = (file.dequantised(name, rows=1024) for name in (HEAD, EMBEDDING))
    return bool(np.linalg.norm(head - embedding) < SAME_MATRIX * np.linalg.norm(head))


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def places(file: File, config: transformers.PretrainedConfig) -> dict[str, Place]:
    """parameter name -> where it lies, for every parameter of the model that `config` describes.

    Raises ValueError, in one line, where a tensor is missing, misshapen, without a place or of a type that can't be
    dequantised. Tensors of blocks that `config` cuts off are left out.
    """
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in cls(config).named_parameters()}
    number = next(k for k, v in MODEL_ARCH_NAMES.items() if v == file.fields["general.architecture"])
    names = get_tensor_name_map(number, config.num_hidden_layers)
    where, wrong = {}, []
    for name, shape in shapes.items():
        stored = str(names.get_name(name, (".weight", ".bias")))
        place = place_of(file, config, stored)
        if place is None:
            wrong.append(f"{stored} is missing")
            continue
        here = place.tensor.shape if place.rows is None else (len(range(place.tensor.shape[0])[place.rows]), *shape[1:])
        if here != shape:
            wrong.append(f"{place.tensor.name} has shape {list(here)}, the model {list(shape)}")
        where[name] = place
    wrong += without_place(file, config, {p.tensor.name for p in where.values()}, cls.__name__)
    wrong += undecodable(file, {p.tensor for p in where.values()})
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"it is no whole {cls.__name__}: {wrong[0]}{more}")
    return where


def place_of(file: File, config: transformers.PretrainedConfig, stored: str) -> Place | None:
    """Where a tensor's content lies: as itself, as the finer of two that are one matrix, or in phi2's fused q, k, v."""
    tensors = file.tensors
    if stored == EMBEDDING and config.tie_word_embeddings and HEAD in tensors:
        return Place(max(tensors[HEAD], tensors[EMBEDDING], key=lambda t: t.bits))
    if stored in tensors:
        return Place(tensors[stored])
    part = re.fullmatch(r"(blk\.\d+\.attn_)([qkv])(\.\w+)", stored)
    fused = tensors.get(f"{part[1]}qkv{part[3]}") if part else None
    if part is None or fused is None:
        return None
    width = config.hidden_size // config.num_attention_heads
    bounds = np.cumsum([0, config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]) * width
    which = "qkv".index(part[2])
    return Place(fused, slice(int(bounds[which]), int(bounds[which + 1])))


def without_place(file: File, config: transformers.PretrainedConfig, used: set[str], cls: str) -> list[str]:
    """A line for each tensor that would be left out, though it is neither computed nor of a block that was cut off."""
    cut = re.compile(r"blk\.(\d+)\.")
    lines = []
    for name in file.tensors:
        block = cut.match(name)
        left_out = block is not None and int(block[1]) >= config.num_hidden_layers
        one_of_two = config.tie_word_embeddings and name in (HEAD, EMBEDDING)
        if name not in used and not COMPUTED.fullmatch(name) and not left_out and not one_of_two:
            lines.append(f"{name} is in the file but not in a {cls}")
    return lines


def undecodable(file: File, tensors: set[Tensor]) -> list[str]:
    """A line for each type among these tensors that the gguf package can't dequantise."""
    lines = []
    for kind, name in sorted({t.type: t.name for t in tensors}.items()):
        try:
            file.dequantised(name, rows=1)
        except NotImplementedError:
            lines.append(f"{name} is of type {kind.name}, which the gguf package can't dequantise")
    return lines


def quantisation(file: File, config: transformers.PretrainedConfig) -> dict[str, float]:
    """Share of the model's parameters by the type they are stored in, the largest first."""
    counts: Counter[str] = Counter()
    for place in places(file, config).values():
        share = 1.0 if place.rows is None else (place.rows.stop - place.rows.start) / place.tensor.shape[0]
        counts[place.tensor.type.name] += share * place.tensor.elements
    return {name: count / counts.total() for name, count in counts.most_common()}


def load(file: File, config: transformers.PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The model that `config` describes with the file's weights, each dequantised to `dtype` as it is read."""
    where = places(file, config)
    state = {name: parameter(file, config, name, place).to(dtype) for name, place in where.items()}
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return cls.from_pretrained(None, config=config, state_dict=state, dtype=dtype)


def parameter(file: File, config: transformers.PretrainedConfig, name: str, place: Place) -> torch.Tensor:
    """One parameter as transformers has it, float32."""
    values = arranged(file, config, name, place, file.dequantised(place.tensor.name))
    if file.fields["general.architecture"] == "gemma3" and name.endswith("norm.weight"):
        values = values - 1
    return torch.from_numpy(np.ascontiguousarray(values))


def arranged(
    file: File, config: transformers.PretrainedConfig, name: str, place: Place, values: np.ndarray
) -> np.ndarray:
    """The rows [m, ...] of a stored tensor that are a parameter, in transformers' order."""
    if place.rows is not None:
        values = values[place.rows]
    if file.fields["general.architecture"] == "llama" and re.search(r"\.[qk]_proj\.", name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        values = unpermuted(values, heads)
    return values


def unpermuted(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k [m, ...] with a head's pairs (2i, 2i + 1) put back to (i, i + half)."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(values.shape)
