"""CATS: contextual thresholding of FFN neurons by their gate (arXiv 2404.08763).

g = act(x W_gate); neuron i is computed iff |g_i| >= t, with t the k-th percentile of |g| on calibration text. Gate and
attention stay dense, so the share of neurons and the share of all block weights are different numbers: `sparsity_of`
says which one `sparsity` is; the record has both (sites up and down, and model-wide). Experts are FFNs, too: the rule is
the same over the pairs of a token and an expert that the router runs (docs/methods/experts.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsebench.calibration import expert_pairs
from sparsebench.calibration.histograms import AbsHistogram, quantile, watched
from sparsebench.config import NAME_PATTERN, setting
from sparsebench.methods.base import Method, Work
from sparsebench.modules.gate_sparse import gated_ffn, gates_of, prefixes, swap_ffn
from sparsebench.modules.input_sparse import PROMPT_POLICIES
from sparsebench.modules.sparse_experts import swap_gated_experts
from sparsebench.records.state import State
from sparsebench.sites import Block, find_blocks, weight_of


@dataclass(kw_only=True)
class Cats(Method):
    """Settings of CATS; `sparsity`, `sparsity_of` and `prompt` can be changed without calibrating again."""

    name: str = setting(**NAME_PATTERN)
    sparsity: float = setting(ge=0, lt=1)
    sparsity_of: str = setting(choices=("ffn", "model"))
    prompt: str = setting(choices=PROMPT_POLICIES)
    calibration_tokens: int = setting(gt=0)
    experts: str = setting(choices=("gate", "off"))
    expert_thresholds: str = setting(choices=expert_pairs.WHERE)
    kinds: ClassVar = ("language",)
    neutral: ClassVar = {"sparsity": 0.0}
    operating_point: ClassVar = ("sparsity", "sparsity_of", "prompt", "experts")
    takes_experts: ClassVar = True

    @property
    def requested(self) -> float | None:
        """Model-wide, where that is what was asked for."""
        return self.sparsity if self.sparsity_of == "model" else None

    @property
    def changes(self) -> None:
        return None

    def fit(self, loaded, data, work: Work) -> State:
        """`hist.<layer>.gate`: int64 counts of |act(x W_gate)|, their first bin in info; of experts over pairs."""
        module, blocks = loaded.module, find_blocks(loaded.module)
        sequences = data.fit.sequences(max(1, self.calibration_tokens // data.fit.sequence_length))
        made, observers = {}, {}

        def observer(ffn, histogram):
            return lambda x: histogram.add(gates_of(ffn, x))

        for block in blocks:
            for prefix in prefixes(block):
                ffn = module.get_submodule(gated_ffn(module, block, prefix))
                made[f"hist.{block.index}.{prefix}gate"] = histogram = AbsHistogram(work.hardware.torch_device)
                observers[block.sites[f"{prefix}up"].path] = observer(ffn, histogram)  # up reads what the gate reads
        watch = expert_pairs.watch_of(blocks, work.hardware.torch_device, ("gates",), self.expert_thresholds)
        return watched(module, sequences, observers, made, work.batch_size, watch)

    def share(self, module: torch.nn.Module, block: Block) -> float:
        """The share of a block's neurons to drop. Raises ValueError where up and down are too small a part of the block."""
        if self.sparsity_of == "ffn":
            return self.sparsity
        maps = {**block.sites, **block.others}
        sizes = {role: weight_of(module.get_submodule(site.path)).numel() for role, site in maps.items()}
        if block.experts is not None:  # what a token passes of them
            sizes |= dict.fromkeys(block.experts.sites.values(), block.experts.active)
        neurons = sum(size for role, size in sizes.items() if role.rpartition(".")[2] in ("up", "down"))
        reach = neurons / sum(sizes.values())
        if self.sparsity >= reach:
            raise ValueError(
                f"method.sparsity must be below {reach:.3f} with sparsity_of=model (up and down are that share of a "
                f"block's weights), got {self.sparsity}"
            )
        return self.sparsity / reach

    def apply(self, module, state: State, work: Work):
        """Replace every FFN and all experts; at sparsity 0 they stay."""
        rule = {"prompt": self.prompt, "kernel": work.hardware.kernel_name}
        for block in find_blocks(module):
            share = self.share(module, block)
            if share == 0:
                continue
            for prefix in prefixes(block):
                name = f"hist.{block.index}.{prefix}gate"
                threshold = quantile(state.info["first_bin"][name], state.tensors[name], share)
                swap_ffn(module, block, threshold, prefix, **rule)
            if block.experts is not None and self.experts == "gate":
                limits = expert_pairs.threshold(state, block, "gates", share, self.expert_thresholds)
                swap_gated_experts(module, block, limits, **rule)
        return module
