"""TwELL's recipe as a control of ProSparse (arXiv 2603.23198): ReLU on the gate, a constant L1 on h = gate x up.

    loss = CE + lambda (1/L) sum over layers of (1/M) sum over M tokens of sum over f neurons of |h|

The sum over neurons is the released code's convention, in which its lambda = 2e-5 is meant; the paper's equation divides by
f as well (reduction: neuron_mean). Mean over layers, where ProSparse sums. Optionally neurons whose gate fires for no
token of a step are moved towards a fresh start: W_g[j] <- (1 - r) W_g[j] + r N(0, std^2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from sparsebench import ranks
from sparsebench.config import setting
from sparsebench.data.text import batches
from sparsebench.modules import packed
from sparsebench.modules.neuron_sparse import last_map
from sparsebench.modules.x1 import X1Penalty, watching
from sparsebench.sites import find_blocks, shape

REDUCTIONS = {"neuron_sum": "token_sum", "neuron_mean": "mean"}  # by the name that x1.l1 gives them
FIRST = 8  # positions of a window that are reported one by one


@dataclass(kw_only=True)
class Settings:
    """The block `l1` of conf/method/prosparse.yaml."""

    coefficient: float = setting(ge=0)
    reduction: str = setting(choices=tuple(REDUCTIONS))
    reinit: float = setting(ge=0, le=1)
    reinit_std: float = setting(gt=0)


class L1Penalty(X1Penalty):
    """The penalty, and the count of dead neurons: those active for no token of a step, on all processes."""

    def __init__(self, module: nn.Module, settings: Settings, seed: int):
        super().__init__(module, REDUCTIONS[settings.reduction], lambda step: settings.coefficient, over_layers="mean")
        self.module, self.settings, self.seed = module, settings, seed
        self.active: dict[int, torch.Tensor] = {}  # bool [f] by layer, since the last step
        self.dead: dict[int, int] = {}  # of the last step

    def see(self, layer: int, x1: torch.Tensor) -> None:
        super().see(layer, x1)
        if torch.is_grad_enabled():
            live = x1.detach() != 0 if self.mask is None else (x1.detach() != 0) & self.mask.unsqueeze(-1)
            live = live.flatten(0, -2).any(0)
            self.active[layer] = live if layer not in self.active else self.active[layer] | live

    def after_step(self, step: int) -> None:
        """Count the dead, and start them anew where asked for."""
        for block in find_blocks(self.module):
            active = self.active[block.index]
            if ranks.count() > 1:
                everywhere = active.to(torch.uint8)
                dist.all_reduce(everywhere, dist.ReduceOp.MAX)
                active = everywhere.bool()
            self.dead[block.index] = int((~active).sum())
            if self.settings.reinit and not active.all():
                role = "gate" if "gate" in block.sites else "fc1"
                self.restart(self.module.get_submodule(block.sites[role].path), ~active, step, block.index)
        self.active = {}

    def restart(self, gate: nn.Module, dead: torch.Tensor, step: int, layer: int) -> None:
        """Move the rows `dead` [f] of a gate map's weight [f, d] towards noise: the same in every process."""
        if hasattr(gate.weight, "full_tensor"):
            raise ValueError("method.l1.reinit must be 0 with sharded weights (FSDP)")
        seed = (self.seed * 1_000_003 + step) * 1_000 + layer
        generator = torch.Generator().manual_seed(seed)
        rows = dead.nonzero().flatten().to(gate.weight.device)
        noise = torch.randn(len(rows), gate.weight.shape[1], generator=generator).to(gate.weight)
        with torch.no_grad():
            kept = (1 - self.settings.reinit) * gate.weight[rows]
            gate.weight[rows] = kept + self.settings.reinit * self.settings.reinit_std * noise

    def stats(self) -> dict[str, float]:
        """As X1Penalty, and the share of neurons that were dead in the last step."""
        sizes = {b.index: shape(last_map(self.module, b))[1] for b in find_blocks(self.module)}
        return super().stats() | {"dead": sum(self.dead.values()) / sum(sizes.values())}


def non_zeros(module: nn.Module, sequences: torch.Tensor, batch_size: int, mask: torch.Tensor | None = None) -> dict:
    """Non-zeros of x1 per token over windows [N, T]: mean and most by layer, their mean by position of the window (the
    first ones one by one, then the rest), neurons that never fired, and the fit of the packed format. mask: bool [N, T],
    False on padding, which counts nowhere.
    """
    counts: dict[int, list[torch.Tensor]] = {}
    fired: dict[int, torch.Tensor] = {}
    formats: dict[int, list[dict]] = {}
    mask = torch.ones_like(sequences, dtype=torch.bool) if mask is None else mask.bool()
    parts = iter(mask.split(batch_size))
    real: list[torch.Tensor] = []

    def see(layer: int, x1: torch.Tensor) -> None:
        if layer == 0:
            real.append(next(parts).to(x1.device))
        live = (x1 != 0) & real[-1].unsqueeze(-1)
        counts.setdefault(layer, []).append(live.sum(-1).cpu())
        fired[layer] = live.flatten(0, 1).any(0) | fired.get(layer, False)
        formats.setdefault(layer, []).append(packed.fit_of(x1[real[-1]]))

    with torch.no_grad(), watching(module, see):
        for batch in batches(sequences, batch_size, module):
            module.base_model(input_ids=batch, use_cache=False)
    by_layer = {layer: torch.cat(each) for layer, each in counts.items()}  # [N, T]
    whole = torch.stack(list(by_layer.values())).double().mean(0)  # mean over layers
    places = [whole[:, i][mask[:, i]] for i in range(min(FIRST, whole.shape[1]))]
    rest = whole[:, FIRST:][mask[:, FIRST:]]
    return {
        "mean": {layer: float(each[mask].double().mean()) for layer, each in by_layer.items()},
        "most": {layer: int(each[mask].max()) for layer, each in by_layer.items()},
        "by_position": {str(i): float(each.mean()) for i, each in enumerate(places) if len(each)}
        | ({"later": float(rest.mean())} if len(rest) else {}),
        "never_active": sum(int((~each).sum()) for each in fired.values()) / sum(map(len, fired.values())),
        "packed": {k: max(part[k] for each in formats.values() for part in each) for k in formats[0][0]},
    }


def training_macs(module: nn.Module, tokens: int, zeros: float) -> dict[str, float | str]:
    """Products of training on `tokens`: as they ran, and as they would have run with zeros of h skipped.

    Forward and backward of a map are 3 products. With a share a of the neurons active a gated FFN of 3 d f forward keeps
    the gate's forward and the active part of the 8 others (up, down; their four gradients; two of the gate): d f (1 + 8 a)
    instead of 9 d f; a plain one d f (1 + 5 a) instead of 6. (derived) zeros: mean share of zeros over the steps.
    """
    dense = skipped = 0.0
    for block in find_blocks(module):
        size = {role: m * n for role, site in block.sites.items() for m, n in [shape(module.get_submodule(site.path))]}
        first = "gate" if "gate" in size else "fc1"
        others = ("up", "down") if first == "gate" else ("fc2",)
        dense += 3 * sum(size.values())
        saved = 2 * size[first] + 3 * sum(size[role] for role in others)
        skipped += 3 * sum(size.values()) - zeros * saved
    head = 3 * module.get_output_embeddings().weight.numel()
    return {
        "tokens": tokens,
        "dense": tokens * (dense + head),
        "with_zeros_skipped": tokens * (skipped + head),
        "label": "multiply-accumulates of forward and backward, maps and head; dense is what ran, skipping is hypothetical",
    }
