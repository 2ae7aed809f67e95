"""What a model's configuration says before its weights are read: whether it is one that can be made sparse, and its depth."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
import transformers

from sparsebench.sites import find_blocks


def config_problem(location: str, key: str) -> str | None:
    """The line about a folder whose config.json transformers does not know, or None."""
    try:
        transformers.AutoConfig.from_pretrained(location, local_files_only=True)
    except Exception as error:  # a foreign file: transformers and huggingface_hub raise what they like
        first = " ".join(str(error).split()).partition(". ")[0]
        return f"{key} must hold a config.json that transformers {transformers.__version__} knows, got {location!r} ({first})"
    return None


SIZES = re.compile("(num_|n_).*|.*_(size|dim|layers|heads)|max_position_embeddings")  # fields that count something


def of_fields(architecture: dict[str, Any]) -> Any:
    """transformers' configuration of an `architecture` node. Raises ValueError in one line for what no such model has."""
    fields = dict(architecture)
    kind = fields.pop("model_type", None)
    for name, value in fields.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if SIZES.fullmatch(name) and value is not None and not (whole and value > 0):
            raise ValueError(f"model.architecture.{name} must be a whole number > 0, got {value!r}")
    try:
        return transformers.AutoConfig.for_model(kind, **fields)
    except Exception as error:  # what transformers makes of a foreign value is of any kind
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(f"model.architecture is none of model_type={kind} in transformers: {reason}") from error


def depth_problem(name: str, config: Any, num_layers: int | None) -> str | None:
    """The line about more blocks than the model has, or None."""
    depth = getattr(config, "num_hidden_layers", None)
    if num_layers is None or depth is None or num_layers <= depth:
        return None
    return f"model.num_layers must be at most {depth} for {name}, got {num_layers}"


def causal_problem(name: str, config: Any) -> str | None:
    """The line about a model that is no causal language model, or whose blocks have an unknown structure, or None.

    One block is built without memory for its weights.
    """
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return f"model={name} must be a causal language model of transformers, got one of type {config.model_type}"
    one = copy.deepcopy(config)
    one.num_hidden_layers = 1
    if getattr(one, "layer_types", None):
        one.layer_types = one.layer_types[:1]
    try:
        with torch.device("meta"):
            module = transformers.AutoModelForCausalLM.from_config(one)
    except Exception:  # a class that can't be built this way: loading it says what is wrong
        return None
    try:
        find_blocks(module)
    except ValueError as error:
        return f"model={name}: {str(error).removeprefix('model: ')}"
    return None
