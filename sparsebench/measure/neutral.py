"""Does a method's model compute the dense model's logits when nothing is dropped? Asked of every model, at apply time.

A method swaps modules by structure: names, shapes, the order of norms. Where a family computes something else under the
same names (norms behind the maps instead of before them, a norm inside the FFN), the sparse model is another model, and
its loss of quality says nothing about sparsity. So the swapped model is run with nothing dropped before it is measured.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from sparsebench.engines.check import all_kept, distance
from sparsebench.measure import quality
from sparsebench.modules.activation_map import maps_of
from sparsebench.modules.activations import Activation
from sparsebench.modules.neuron_sparse import NeuronSparseFFN

log = logging.getLogger(__name__)

# Largest relative error of logits: weights that were rotated or sums in another order, rounded to the model's dtype.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
TOKENS = 32  # of one window of text
EXAMPLES = 2  # of images or labelled texts


def probe(module: nn.Module, data: Any) -> tuple[Any, torch.Tensor]:
    """(a few inputs, the dense model's logits of them [.., V]), to be taken before a method is fitted.

    Inputs are of the fit split where it holds any.
    """
    device = next(module.parameters()).device
    if data.kind == "language":
        inputs = {"input_ids": data.fit.sequences(1)[:, :TOKENS].to(device), "use_cache": False}
    else:
        split = data.fit if len(data.fit) else data.test  # a set for evaluation only has nothing to fit on
        inputs = next(iter(split.batches(EXAMPLES, EXAMPLES, device))).inputs
    return inputs, logits(module, inputs)


def logits(module: nn.Module, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return quality.logits(module, inputs).float()


@contextmanager
def nothing_dropped(module: nn.Module) -> Iterator[None]:
    """Every sparse module keeps everything: all inputs, all experts, every neuron with its activation, plain ReLU maps."""
    maps = list(maps_of(module))
    saved = [(m, m.threshold, m.keep) for m in maps]
    ffns = [(m, m.activation) for m in module.modules() if isinstance(m, NeuronSparseFFN)]
    with ExitStack() as stack:
        if not maps:
            stack.enter_context(all_kept(module))
        for ffn, activation in ffns:
            ffn.activation = Activation(activation.name).to(activation.threshold.device)
        for each in maps:
            each.threshold = each.keep = None
        try:
            yield
        finally:
            for each, threshold, keep in saved:
                each.threshold, each.keep = threshold, keep
            for ffn, activation in ffns:
                ffn.activation = activation


def unchecked(method: Any) -> str | None:
    """Why a method's model with nothing dropped is another one by design, or None."""
    if method.neutral is None:
        return "it names no neutral settings"
    changed = [k for k in method.redesigns if k in method.neutral and getattr(method, k) != method.neutral[k]]
    return f"it changes the model itself ({', '.join(changed)})" if changed else None


def check(method: Any, module: nn.Module, inputs: Any, expected: torch.Tensor) -> float | None:
    """Relative error of the logits with nothing dropped against the dense model's; None where it can't be asked.

    module: as the method's `apply` left it; inputs, expected: from `probe`. Raises ValueError where they differ.
    """
    reason = unchecked(method)
    if reason:
        log.info("%s: not compared with the dense model at its neutral point: %s", method.name, reason)
        return None
    with nothing_dropped(module):
        error = distance(logits(module, inputs).flatten(0, -2), expected.flatten(0, -2))
    if not error <= TOLERANCE[next(module.parameters()).dtype]:
        raise ValueError(
            f"method={method.name} does not fit {type(module).__name__}: with nothing dropped its logits differ from the "
            f"dense model's by {error:.2g} (relative), so it would measure another model"
        )
    return error
