"""GGUF files, llama.cpp's format: most people's models on disk. Weights are dequantised to the run's dtype as they are read.

`header` reads metadata and where tensors lie, `architecture` makes transformers' configuration and weights of them,
`tokenizer` the tokenizer. Nothing here runs a model in its quantised form, so no figure is one of 4-bit kernels.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from sparsebench.config import digests
from sparsebench.models.gguf import architecture, header, tokenizer

NAMED = 0.001  # share of the parameters from which a type is named in words

__all__ = ["config", "describe", "load", "problem", "tokens"]


def problem(path: str, key: str) -> str | None:
    """Why the model in a GGUF file can't be loaded, in one line, or None: before any of its tensors is read."""
    try:
        file = header.read(path)
        known = architecture.config_of(file)
        architecture.places(file, known)
        tokenizer.check(file)
    except ValueError as error:
        return f"{key} must be a whole GGUF file of a known architecture, got {path!r}: {error}"
    return None


def config(path: str) -> PretrainedConfig:
    """transformers' configuration of the model in a file. Raises ValueError where it has no place there."""
    return architecture.config_of(header.read(path))


def load(path: str, known: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The model that `known` describes, on the CPU. Raises ValueError as `problem` says."""
    return architecture.load(header.read(path), known, dtype)


def tokens(path: str) -> PreTrainedTokenizerFast:
    """The tokenizer in a file. Raises ValueError for a kind that is not known."""
    return tokenizer.build(header.read(path))


def describe(path: str, known: PretrainedConfig, dtype: torch.dtype) -> tuple[dict, str]:
    """(for the record: the file's digest, its own name and what its weights were, by share of parameters; a caution)."""
    file = header.read(path)
    shares = architecture.quantisation(file, known)
    most = (f"{name} ({share:.1%})" for name, share in shares.items() if share >= NAMED)  # all stand in the shares
    said = f"dequantised from {', '.join(most)}"
    about = {
        "sha256": digests.of_files([file.path])[0], "name": file.fields.get("general.name"),
        "architecture": file.fields["general.architecture"], "weights": said, "quantisation": shares,
    }  # fmt: skip
    run_in = str(dtype).removeprefix("torch.")
    return about, f"weights {said}: quality is theirs, times and bytes are those of {run_in}, no quantised kernel ran"
