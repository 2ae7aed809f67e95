"""State dicts from files: read without running code, named as the network names them, fitting whole or refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

PREFIX = "module."  # torch's DataParallel puts it before every name
TRAINING_HEADS = ("aux1.", "aux2.", "AuxLogits.")  # of GoogLeNet and Inception, not built here


def file_problem(path: Path) -> str | None:
    """Why a file can't be one of weights, as its first bytes tell, or None."""
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, "pt"):
                return None
        except Exception as error:
            return " ".join(str(error).split())
    with open(path, "rb") as file:
        start = file.read(2)
    return None if start == b"PK" or start[:1] == b"\x80" else "it begins like no file of torch.save"


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from .safetensors, or from torch's format with tensors only (no code in it is run)."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(f"model.path: {path} can't be read as a state dict ({error})".splitlines()[0]) from error
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(w, torch.Tensor) for w in weights.values()):
        raise ValueError(f"model.path: {path} can't be read as a state dict (it holds no mapping of tensors)")
    prefixed = all(name.startswith(PREFIX) for name in weights)
    return {name.removeprefix(PREFIX): w for name, w in weights.items()} if prefixed else dict(weights)


def named(weights: dict[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """`weights` under the names of today's networks; a torchvision ViT is translated to transformers' names."""
    weights = {renamed(k): v for k, v in weights.items() if not k.startswith(TRAINING_HEADS)}
    if "encoder.pos_embedding" not in weights:
        return weights
    try:
        return translate_vit(weights)
    except KeyError as error:
        raise ValueError(f"model: {source} doesn't fit the network: {error.args[0]} is missing") from error


def renamed(key: str) -> str:
    """torchvision's present name of a parameter for the one in its older files (DenseNet, ViT)."""
    key = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key)
    return key.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")


def translate_vit(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """torchvision's names of a vision transformer to transformers' names; the joint qkv is split."""
    translated = {
        "vit.embeddings.cls_token": weights["class_token"],
        "vit.embeddings.position_embeddings": weights["encoder.pos_embedding"],
    }
    pairs = {
        "conv_proj": "vit.embeddings.patch_embeddings.projection",
        "encoder.ln": "vit.layernorm",
        "heads.head": "classifier",
    }
    inner = {"ln_1": "layernorm_before", "ln_2": "layernorm_after", "self_attention.out_proj": "attention.o_proj",
             "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2"}  # fmt: skip
    depth = 1 + max(int(k.split(".")[2].rpartition("_")[2]) for k in weights if k.startswith("encoder.layers."))
    for layer in range(depth):
        old, new = f"encoder.layers.encoder_layer_{layer}", f"vit.layers.{layer}"
        pairs |= {f"{old}.{a}": f"{new}.{b}" for a, b in inner.items()}
        for part in ("weight", "bias"):
            joint = weights[f"{old}.self_attention.in_proj_{part}"].chunk(3)
            for role, tensor in zip("qkv", joint, strict=True):
                translated[f"{new}.attention.{role}_proj.{part}"] = tensor
    return translated | {f"{b}.{p}": weights[f"{a}.{p}"] for a, b in pairs.items() for p in ("weight", "bias")}


def classes_in(weights: dict[str, torch.Tensor], module: nn.Module, classes: int) -> int:
    """How many classes `weights` tell apart, seen from a network of `classes`: in what alone they differ from it."""
    own = module.state_dict()
    differ = [(own[n].shape, w.shape) for n, w in weights.items() if n in own and own[n].shape != w.shape]
    heads = {theirs[0] for mine, theirs in differ if theirs and mine[:1] == (classes,) and mine[1:] == theirs[1:]}
    return heads.pop() if len(heads) == 1 else classes


def fill(module: nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Load `weights` strictly. Raises ValueError naming what does not fit."""
    own, filled = module.state_dict(), dict(weights)
    wrong = [
        f"{name} has shape {list(weights[name].shape)} in the file, the network {list(own[name].shape)}"
        for name in sorted(own.keys() & weights.keys())
        if own[name].shape != weights[name].shape
    ]
    for name in sorted(own.keys() - weights.keys()):
        if name.endswith("num_batches_tracked"):  # counts training steps; older files lack it, and it changes no output
            filled[name] = own[name]
        else:
            wrong.append(f"{name} is missing")
    wrong += [f"{name} is in the file but not in the network" for name in sorted(weights.keys() - own.keys())]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"model: {source} doesn't fit the network {type(module).__name__}: {wrong[0]}{more}")
    module.load_state_dict(filled)
