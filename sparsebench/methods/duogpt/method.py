"""DuoGPT: weights pruned for inputs that will be pruned too, per token, at run time (arXiv 2506.20194).

Block by block a dense and a sparse stream of hidden states run side by side; the statistics of each group of maps are
streamed from them (prune.py), so memory is two hidden states per token, one spare block and 2 k^2 numbers. The same
code gives SparseGPT (alpha=0, statistics=dense) and magnitude pruning (criterion=magnitude) as controls.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from sparsebench.calibration.block_error import block_inputs, changed, run_block
from sparsebench.config import NAME_PATTERN, setting
from sparsebench.kernels.masked_dense import largest
from sparsebench.methods.base import Method, Work
from sparsebench.methods.duogpt import pruning
from sparsebench.modules.input_sparse import PROMPT_POLICIES, swap
from sparsebench.records.progress import shown
from sparsebench.records.state import State
from sparsebench.sites import Block, find_blocks, weight_of

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class DuoGPT(Method):
    """Settings of DuoGPT: `sparsity` of the inputs (p_x) and `weight_sparsity` (p_w), uniform over layers."""

    name: str = setting(**NAME_PATTERN)
    sparsity: float = setting(ge=0, lt=1)
    weight_sparsity: float = setting(ge=0, lt=1)
    pattern: str = setting(choices=tuple(pruning.PATTERNS))
    criterion: str = setting(choices=("second_order", "magnitude"))
    statistics: str = setting(choices=("sparse", "dense"))
    alpha: float = setting(ge=0, le=1)
    damping: float = setting(gt=0)
    order: str = setting(choices=("diag", "natural"))
    block: int = setting(gt=0)
    compat_lazy: bool
    prompt: str = setting(choices=PROMPT_POLICIES)
    calibration_tokens: int = setting(gt=0)
    kinds: ClassVar = ("language",)
    neutral: ClassVar = {"sparsity": 0.0, "weight_sparsity": 0.0, "alpha": 0.0}
    operating_point: ClassVar = ("prompt",)

    def __post_init__(self):
        lines = []
        pattern = pruning.PATTERNS[self.pattern]
        if pattern is not None:
            share = pattern[0] / pattern[1]
            if self.weight_sparsity not in (0, share):
                lines.append(
                    f"weight_sparsity must be {share} (or 0) with pattern={self.pattern}, got {self.weight_sparsity}"
                )
            if self.order != "natural" and self.criterion == "second_order":
                lines.append(
                    f"order must be natural with pattern={self.pattern} (groups are of neighbours), got {self.order}"
                )
            if self.block % pattern[1]:
                lines.append(f"block must be a multiple of {pattern[1]} with pattern={self.pattern}, got {self.block}")
        if lines:
            raise ValueError("\n".join(lines))

    @property
    def prunes(self) -> bool:
        return self.weight_sparsity > 0

    @property
    def rule(self) -> pruning.Rule:
        return pruning.Rule(
            self.weight_sparsity, self.pattern, self.alpha, self.damping, self.order, self.block, self.compat_lazy
        )

    @property
    def changes(self) -> str | None:
        return "block maps, pruned" if self.weight_sparsity or self.alpha else None

    def fit(self, loaded, data, work: Work) -> State:
        """`weight.<site>`: the pruned weights [m, n] of every projection; none where nothing is to be changed.

        The model's weights are changed in place on the way, to the values kept in the state.
        """
        module, blocks = loaded.module, find_blocks(loaded.module)
        state = State(info={"kind": "calibrated", "tokens": 0})
        if self.weight_sparsity == 0 and self.alpha == 0:
            return state
        if self.criterion == "magnitude":
            for site in (s for b in blocks for s in b.sites.values()):
                weight = weight_of(module.get_submodule(site.path))
                weight.copy_(pruning.magnitude(weight, self.rule))
        else:
            sequences = data.fit.sequences(max(1, self.calibration_tokens // data.fit.sequence_length))
            state.info["tokens"] = self.calibrated(module, blocks, sequences, work)
        for site in (s for b in blocks for s in b.sites.values()):
            state.tensors[f"weight.{site.name}"] = weight_of(module.get_submodule(site.path)).cpu().clone()
        return state

    def pruned_input(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n] with the int(n p_x) smallest magnitudes of each token set to 0."""
        kept = x.shape[-1] - int(x.shape[-1] * self.sparsity)
        return torch.where(largest(x, kept), x, 0)

    @torch.no_grad()
    def calibrated(self, module: nn.Module, blocks: list[Block], sequences: torch.Tensor, work: Work) -> int:
        """Prune all blocks in place, in order; the number of calibration tokens."""
        dense, arguments = block_inputs(module, blocks, sequences, work.batch_size)
        sparse = [h.clone() for h in dense]
        for block in shown(blocks, len(blocks), "pruning by block"):
            layer = module.get_submodule(block.path)
            original, named = copy.deepcopy(layer), arguments[block.index]
            rules = dict.fromkeys(block.sites, self.pruned_input) if self.statistics == "sparse" else {}
            with changed(module, block, rules):
                for roles in groups(block):
                    width = weight_of(module.get_submodule(block.sites[roles[0]].path)).shape[1]
                    statistics = pruning.Statistics.empty(width, next(layer.parameters()).device)
                    path = block.sites[roles[0]].path.removeprefix(f"{block.path}.")
                    for x, y in zip(dense, sparse, strict=True):
                        statistics.add(seen(layer, path, y, named), seen(original, path, x, named))
                    for role in roles:
                        weight = weight_of(module.get_submodule(block.sites[role].path))
                        weight.copy_(pruning.prune(weight, statistics, self.rule))
                sparse = [run_block(layer, y, named) for y in sparse]
            dense = [run_block(original, x, named) for x in dense]
            drift = sum(float((x - y).square().sum()) for x, y in zip(dense, sparse, strict=True))
            size = sum(float(x.square().sum()) for x in dense)
            work.log({"fit/blocks_done": block.index + 1, "fit/relative_output_error": (drift / size) ** 0.5})
        return sum(h.shape[0] * h.shape[1] for h in dense)

    def apply(self, module: nn.Module, state: State, work: Work):
        """Put the pruned weights in place and prune inputs per token; with nothing to do a map stays as it is."""
        for site in (s for b in find_blocks(module) for s in b.sites.values()):
            weight = weight_of(module.get_submodule(site.path))
            if f"weight.{site.name}" in state.tensors:
                weight.copy_(state.tensors[f"weight.{site.name}"])
            elif self.sparsity == 0:
                continue
            width = weight.shape[1]
            kept = width - int(width * self.sparsity)
            swap(module, site, 0.0, top_k=kept, prompt=self.prompt, kernel=work.hardware.kernel_name)
        return module


def groups(block: Block) -> list[list[str]]:
    """Roles that read one tensor, in the order in which a block computes them."""
    roles_of: dict[str, list[str]] = {}
    for role, site in block.sites.items():
        roles_of.setdefault(site.group, []).append(role)
    return list(roles_of.values())


class Seen(Exception):
    """Raised once an input was seen: the rest of the block need not run."""


def seen(layer: nn.Module, path: str, hidden: torch.Tensor, arguments: tuple) -> torch.Tensor:
    """The input of a map inside a block, after every hook registered before on that map."""
    inputs = []

    def see(_, args):
        inputs.append(args[0])
        raise Seen

    hook = layer.get_submodule(path).register_forward_pre_hook(see)
    try:
        run_block(layer, hidden, arguments)
    except Seen:
        pass
    finally:
        hook.remove()
    return inputs[0]
