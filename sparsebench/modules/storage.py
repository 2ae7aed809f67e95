"""One storage for a map's weight in the dense and in the sparse model: how it lies in memory, turned in place.

transformers reads a weight [m, n] by rows, a kernel that skips input channels reads it by channels. Both ways hold the
same values, so both models share one parameter: its content is turned, its address stays, and whoever reads it through
torch gets the right values either way. Whoever reads it by its address, or cares how fast it is, lays it first (`lay`).
Turning needs one map's memory for a moment. A view taken before a turn is wrong after it: keep the parameter, not a view.
"""

from __future__ import annotations

import copy
import weakref

import torch
from torch import nn


class Lie(list[tuple[nn.Parameter, bool]]):
    """Parameters, and whether their input channels are contiguous."""


class Last:
    """The last `put`, while nothing has been turned since: it need not be looked through again."""

    put: weakref.ref | None = None


def by_channels(weight: torch.Tensor) -> bool:
    """Whether input channels (columns) are contiguous, and rows are not."""
    return weight.t().is_contiguous() and not weight.is_contiguous()


def turnable(weight: torch.Tensor) -> bool:
    """Whether a tensor is a matrix that lies by its rows or by its channels, and the two differ."""
    return weight.dim() == 2 and weight.is_contiguous() != weight.t().is_contiguous()


@torch.no_grad()
def turn(parameter: nn.Parameter, channels: bool) -> bool:
    """Store a weight [m, n] by its input channels, or by its rows; in place. Whether it lay otherwise."""
    weight = parameter.data
    if not turnable(weight) or by_channels(weight) == channels:
        return False
    Last.put = None
    (m, n), flat = weight.shape, (weight if channels else weight.t()).view(-1)
    flat.copy_((weight.t() if channels else weight).contiguous().view(-1))
    parameter.data = flat.view(n, m).t() if channels else flat.view(m, n)
    return True


def channel_major(parameter: nn.Parameter) -> nn.Parameter:
    """A weight [m, n] with its input channels contiguous, frozen: the parameter itself, turned, wherever that can be."""
    weight = parameter.data
    if isinstance(parameter, nn.Parameter) and not parameter.requires_grad and turnable(weight):
        turn(parameter, True)
        return parameter
    return nn.Parameter(weight.t().contiguous().t(), requires_grad=False)


def lie(module: nn.Module) -> Lie:
    """How a model wants its matrices: by channels those that a module names in `lies_by_channels`, by rows the others."""
    wanted = [
        (parameter, name in getattr(part, "lies_by_channels", ()))
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False)
    ]
    own = {id(parameter): (parameter, channels) for parameter, channels in wanted if turnable(parameter)}
    own |= {id(parameter): (parameter, True) for parameter, channels in wanted if channels and turnable(parameter)}
    return Lie(own.values())


def put(lying: Lie) -> None:
    """Turn what does not lie so."""
    if Last.put is not None and Last.put() is lying:
        return
    turned = [parameter for parameter, channels in lying if turn(parameter, channels)]
    for device in {parameter.device for parameter in turned if parameter.is_cuda}:
        torch.cuda.synchronize(device)  # a clock waits for one device alone
    Last.put = weakref.ref(lying)


def lay(module: nn.Module) -> None:
    """Let a model's weights lie as it wants them."""
    put(lie(module))


def sharing_copy(module: nn.Module) -> nn.Module:
    """The same modules with the same tensors, so that a map can be replaced without touching `module`."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(t): t for t in tensors})


def beside(module: nn.Module, changed: str | None) -> nn.Module:
    """A copy to keep beside a model that is to be made sparse; it has tensors of its own only where some will be `changed`."""
    return sharing_copy(module) if changed is None else copy.deepcopy(module)
