"""GGUF files, llama.cpp's format: most people's models on disk. Weights are dequantised to the run's dtype as they are read.

`header` reads metadata and where tensors lie, `architecture` makes transformers' configuration and weights of them,
`tokenizer` the tokenizer, `blocks` gives the stored integers of the types that kernels can read (model.quantize=keep).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from sparsebench.config import digests
from sparsebench.models.gguf import architecture, blocks, header, tokenizer
from sparsebench.models.gguf.blocks import GROUP

NAMED = 0.001  # share of the parameters from which a type is named in words

__all__ = ["GROUP", "config", "describe", "levels", "load", "problem", "tokens", "unkept"]


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


def unkept(path: str) -> str | None:
    """Why the block maps of a file can't be kept in the bits they are stored in, in one line, or None."""
    file = header.read(path)
    where = architecture.places(file, architecture.config_of(file))
    maps = {n: p.tensor for n, p in where.items() if p.tensor.name.startswith("blk.") and len(p.tensor.shape) == 2}
    wrong = {t.name: t.type.name for t in maps.values() if t.type not in blocks.KEPT or t.shape[1] % GROUP}
    if not wrong:
        return None
    name, kind = next(iter(wrong.items()))
    known = ", ".join(k.name for k in blocks.KEPT)
    return f"{name} is stored in {kind} ({len(wrong)} of {len(maps)} maps are in types other than {known})"


def levels(path: str, known: PretrainedConfig) -> Callable[[str], tuple]:
    """A function of a parameter's name: (levels [n, m], scale [n / GROUP, m], zero likewise or None, bits) of it [m, n].

    Its rows are as transformers has them: q and k of Llama are put back as `load` does.
    """
    file = header.read(path)
    where = architecture.places(file, known)

    def of(name: str) -> tuple:
        *parts, bits = blocks.read(file, where[name].tensor)
        arranged = [p if p is None else architecture.arranged(file, known, name, where[name], p).T for p in parts]
        return (*arranged, bits)

    return of


def describe(path: str, known: PretrainedConfig, dtype: torch.dtype, quantize: str = "none") -> tuple[dict, str]:
    """(for the record: the file's digest, its own name and what its weights were, by share of parameters; a caution).

    quantize: what the run does with the block maps, as `model.quantize`.
    """
    file = header.read(path)
    shares = architecture.quantisation(file, known)
    most = (f"{name} ({share:.1%})" for name, share in shares.items() if share >= NAMED)  # all stand in the shares
    said = f"dequantised from {', '.join(most)}"
    about = {
        "sha256": digests.of_files([file.path])[0], "name": file.fields.get("general.name"),
        "architecture": file.fields["general.architecture"], "weights": said, "quantisation": shares,
    }  # fmt: skip
    run_in = str(dtype).removeprefix("torch.")
    if quantize == "keep":
        about["weights"] = f"block maps as stored, the rest {said}"
        return about, f"weights: {about['weights']}, in {run_in}"
    if quantize != "none":
        return about, f"weights {said}, then rounded to {quantize}: twice quantised"
    return about, f"weights {said}: quality is theirs, times and bytes are those of {run_in}, no quantised kernel ran"
