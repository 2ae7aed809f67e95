"""CATS: contextual thresholding of FFN neurons by their gate (arXiv 2404.08763).

g = act(x W_gate); neuron i is computed iff |g_i| >= t, with t the k-th percentile of |g| on calibration text. Gate and
attention stay dense, so the share of neurons and the share of all block weights are different numbers: `sparsity_of`
says which one `sparsity` is; the record has both (sites up and down, and model-wide).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsebench.calibration.histograms import AbsHistogram, observe, quantile, state_of
from sparsebench.config import NAME_PATTERN, setting
from sparsebench.methods.base import Method, Work
from sparsebench.modules.gate_sparse import gated_ffn, gates_of, swap_ffn
from sparsebench.modules.input_sparse import PROMPT_POLICIES
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
    kinds: ClassVar = ("language",)
    neutral: ClassVar = {"sparsity": 0.0}
    operating_point: ClassVar = ("sparsity", "sparsity_of", "prompt")

    @property
    def requested(self) -> float | None:
        """Model-wide, where that is what was asked for."""
        return self.sparsity if self.sparsity_of == "model" else None

    def fit(self, loaded, data, work: Work) -> State:
        """`hist.<layer>.gate`: int64 counts of |act(x W_gate)|, their first bin in info."""
        module, blocks = loaded.module, find_blocks(loaded.module)
        sequences = data.fit.sequences(max(1, self.calibration_tokens // data.fit.sequence_length))
        histograms, observers = {}, {}

        def observer(ffn, histogram):
            return lambda x: histogram.add(gates_of(ffn, x))

        for block in blocks:
            ffn = module.get_submodule(gated_ffn(module, block))
            histograms[f"hist.{block.index}.gate"] = histogram = AbsHistogram(work.hardware.torch_device)
            observers[block.sites["up"].path] = observer(ffn, histogram)  # up reads what the gate reads
        observe(module, sequences, observers, work.batch_size)
        return state_of(histograms, sequences)

    def share(self, module: torch.nn.Module, block: Block) -> float:
        """The share of a block's neurons to drop. Raises ValueError where up and down are too small a part of the block."""
        if self.sparsity_of == "ffn":
            return self.sparsity
        sizes = {role: weight_of(module.get_submodule(site.path)).numel() for role, site in block.sites.items()}
        reach = (sizes["up"] + sizes["down"]) / sum(sizes.values())
        if self.sparsity >= reach:
            raise ValueError(
                f"method.sparsity must be below {reach:.3f} with sparsity_of=model (up and down are that share of a "
                f"block's weights), got {self.sparsity}"
            )
        return self.sparsity / reach

    def apply(self, module, state: State, work: Work):
        """Replace every FFN; at sparsity 0 it stays."""
        for block in find_blocks(module):
            share, name = self.share(module, block), f"hist.{block.index}.gate"
            if share > 0:
                threshold = quantile(state.info["first_bin"][name], state.tensors[name], share)
                swap_ffn(module, block, threshold, prompt=self.prompt, kernel=work.hardware.kernel_name)
        return module
