"""LaRoSA: top-k inputs per token in the principal basis of the calibration inputs (arXiv 2507.01299).

The inputs of attention and FFN are rotated by eigenvectors of X^T X, damped by 0.01 of its mean diagonal; attention
output and FFN middle are pruned as they are. The official code prunes 0.8 p of the first and 1.2 p of the second, which
removes less than p; here `tilt` sets that ratio and the shares are scaled so that p of the weights is skipped. [choice]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsebench.calibration.gram import input_grams
from sparsebench.config import NAME_PATTERN, setting
from sparsebench.methods.base import Method, Work
from sparsebench.methods.wina import kept_count
from sparsebench.modules import rotated_norm
from sparsebench.modules.input_sparse import PROMPT_POLICIES, swap
from sparsebench.records.state import State
from sparsebench.sites import Block, find_blocks, weight_of


@dataclass(kw_only=True)
class Larosa(Method):
    """Settings of LaRoSA; `sparsity`, `tilt` and `prompt` can be changed without fitting again."""

    name: str = setting(**NAME_PATTERN)
    sparsity: float = setting(ge=0, lt=1)
    tilt: float = setting(ge=0, lt=1)
    damping: float = setting(ge=0)
    prompt: str = setting(choices=PROMPT_POLICIES)
    calibration_tokens: int = setting(gt=0)
    kinds: ClassVar = ("language",)
    neutral: ClassVar = {"sparsity": 0.0}
    operating_point: ClassVar = ("sparsity", "tilt", "prompt")

    @property
    def changes(self) -> str | None:
        return "block maps, rotated, and norms, folded into them" if self.sparsity else None

    def fit(self, loaded, data, work: Work) -> State:
        """`basis.<layer>.<group>`: Q [n, n] of the normalised input (the norm's weight divided out of the maps' input).

        Directions that calibration never saw (fewer tokens than channels) are ordered by what the maps do with them.
        """
        module, blocks = loaded.module, find_blocks(loaded.module)
        sequences = data.fit.sequences(max(1, self.calibration_tokens // data.fit.sequence_length))
        rotated_norm.check_fed(module, blocks)
        grams = input_grams(module, blocks, sequences, work.batch_size)
        state = State(info={"kind": "calibrated", "tokens": sequences.numel()})
        for block in blocks:
            for group in rotated_norm.GROUPS:
                gram = grams[block.index, group]
                gram.diagonal().add_(self.damping * gram.diagonal().mean())
                weights = [rotated_norm.folded(module, block, r) for r, s in block.sites.items() if s.group == group]
                basis = rotated_norm.principal_basis(gram, within=sum(w.T @ w for w in weights))
                state.tensors[f"basis.{block.index}.{group}"] = basis.float()
        return state

    def shares(self, module, block: Block) -> dict[str, float]:
        """Sparsity by role: (1 - tilt) for rotated inputs to (1 + tilt) for the others, scaled to `sparsity` over all."""
        sizes = {role: weight_of(module.get_submodule(site.path)).numel() for role, site in block.sites.items()}
        weights = {
            r: 1 - self.tilt if block.sites[r].group in rotated_norm.GROUPS else 1 + self.tilt for r in block.sites
        }
        unit = self.sparsity * sum(sizes.values()) / sum(sizes[r] * weights[r] for r in sizes)
        shares = {role: unit * weight for role, weight in weights.items()}
        if max(shares.values()) >= 1:
            raise ValueError(
                f"method.tilt={self.tilt} at sparsity={self.sparsity} asks for {max(shares.values()):.2f} of a map"
            )
        return shares

    def apply(self, module, state: State, work: Work):
        """Rotate, then keep the largest inputs of every token; at sparsity 0 there is nothing to rotate for."""
        if self.sparsity == 0:
            return module
        blocks = find_blocks(module)
        keys = [(b.index, g) for b in blocks for g in rotated_norm.GROUPS]
        rotated_norm.rotate(module, blocks, {key: state.tensors["basis.{}.{}".format(*key)] for key in keys})
        for block in blocks:
            for role, share in self.shares(module, block).items():
                site = block.sites[role]
                width = weight_of(module.get_submodule(site.path)).shape[1]
                rule = {"prompt": self.prompt, "kernel": work.hardware.kernel_name}
                swap(module, site, 0.0, top_k=kept_count(width, share), **rule)
        return module
