"""What the methods that train a model's weights share: a copy to train, the data for it, weights to and from a state."""

from __future__ import annotations

import copy

import torch
from torch import nn

from sparsebench.training.loop import History, Training


def trainable(module: nn.Module) -> nn.Module:
    """A float32 copy of a loaded (frozen) model with gradients switched on; the original stays as it is."""
    return copy.deepcopy(module).float().requires_grad_(True)


def rows(split, settings: Training) -> torch.Tensor:
    """As many windows of the split as the training reads, or all where it goes over them more than once."""
    return split.sequences(settings.steps * settings.batch_size)


def weights(module: nn.Module, like: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of `module` in the dtype of `like`, under the names they have in both (tied ones once).

    Parameters sharded by FSDP are gathered: every process must call this.
    """
    dtype = next(like.parameters()).dtype
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in module.named_parameters()}
    return {f"weights.{name}": p.detach().to(dtype) for name, p in whole.items()}


def rebuilt(module: nn.Module, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A float32 copy of a loaded model with trained weights: what was trained may be sharded, this never is."""
    fresh = trainable(module).requires_grad_(False)
    load_weights(fresh, tensors)
    return fresh


def load_weights(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Put a state's `weights.*` into a model of the same structure. Raises ValueError where one is missing or odd."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            saved = tensors.get(f"weights.{name}")
            if saved is None or saved.shape != parameter.shape:
                raise ValueError(f"the trained state does not fit the model at {name}")
            parameter.copy_(saved)


def facts(history: History, settings: Training, windows: torch.Tensor) -> dict:
    """A training's part of a state's info."""
    about = {
        "training": history.rows, "resumed_at": history.resumed_at, "processes": history.processes,
        "tokens_in_fit": windows.numel(), "seconds_of_last_process": history.seconds,
    }  # fmt: skip
    return {"kind": "trained", "tokens": history.steps * settings.batch_size * windows.shape[1], "extra": about}
