"""WINA: keep the inputs with the largest |x_i| ||W_:,i||, optionally after making columns orthogonal (arXiv 2505.19427).

Dropping the inputs D costs ||W_D x_D||^2; where the columns of W are orthogonal that is the sum of (x_i c_i)^2 over D,
so the rule is optimal map by map (Lemma 3.1). The rotation makes them so for k and gate (Algorithm 1): the input of q,
k, v is expressed in the right singular vectors of W_k, that of gate and up in those of W_gate.

Under grouped queries W_k has fewer rows than columns, so most of its right singular vectors are any basis of its null
space, and which one decides what q and v drop. Here they are the principal axes of the calibration inputs inside the null
space, strongest first [choice]; null_space=library is the official code's, i.e. whatever its SVD returns.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsebench.calibration import expert_pairs, histograms
from sparsebench.calibration.allocation import ALLOCATIONS, Greedy, add_tables, check, shares
from sparsebench.calibration.gram import input_grams
from sparsebench.config import NAME_PATTERN, setting
from sparsebench.methods.base import Method, Work
from sparsebench.modules import rotated_norm
from sparsebench.modules.fused_experts import tensors_of
from sparsebench.modules.input_sparse import PROMPT_POLICIES, swap
from sparsebench.modules.sparse_experts import INSIDE, swap_experts
from sparsebench.records.state import State
from sparsebench.sites import Block, Site, find_blocks, shape, weight_of

BASIS_OF = {"attn_in": ("k", "qkv"), "mlp_in": ("gate", "gate_up")}  # whose right singular vectors a group gets
SCALED = {"none": (), "k_gate": ("k", "gate", "qkv", "gate_up")}


@dataclass(kw_only=True)
class Wina(Method):
    """Settings of WINA; `sparsity`, `selection` and `prompt` can be changed without calibrating again.

    scope=none scores by |x| alone: with rotate=true that is the rotated TEAL of the paper's Table 8.
    """

    name: str = setting(**NAME_PATTERN)
    sparsity: float = setting(ge=0, lt=1)
    selection: str = setting(choices=("top_k", "threshold"))
    scope: str = setting(choices=("k_gate", "all", "none"))
    rotate: bool
    null_space: str = setting(choices=("inputs", "library"))
    allocation: str = setting(choices=ALLOCATIONS)
    prompt: str = setting(choices=PROMPT_POLICIES)
    calibration_tokens: int = setting(gt=0)
    experts: str = setting(choices=INSIDE)
    greedy: Greedy
    kinds: ClassVar = ("language",)
    neutral: ClassVar = {"sparsity": 0.0, "rotate": False}
    operating_point: ClassVar = ("sparsity", "selection", "prompt", "experts")
    takes_experts: ClassVar = True
    quantised: ClassVar = True

    def __post_init__(self):
        check(self)

    def problems(self, settings) -> list[str]:
        kind = getattr(settings.model, "quantize", "none")
        if self.rotate and kind != "none":
            return [
                f"method.rotate must be false with model.quantize={kind} (stored weights can't be rotated), got true"
            ]
        return []

    def scaled(self, site: Site) -> bool:
        """Whether a site is scored by |x| c."""
        return self.scope == "all" or site.role in SCALED[self.scope]

    @property
    def changes(self) -> str | None:
        return "block maps, rotated, and norms, folded into them" if self.rotate else None

    def fit(self, loaded, data, work: Work) -> State:
        """Bases Q (`basis.<layer>.<group>`), column norms c (`scale.<site>`, taken after folding and rotation),
        histograms of the scores and, for greedy, its tables: all on the transformed model. The model is left as it was.
        """
        module, blocks = loaded.module, find_blocks(loaded.module)
        sequences = data.fit.sequences(max(1, self.calibration_tokens // data.fit.sequence_length))
        if self.rotate:
            if any(block.experts for block in blocks):
                raise ValueError("method.rotate must be false for a model with experts, got true")
            rotated_norm.check_fed(module, blocks)
        bases = bases_of(module, blocks, self.inputs(module, blocks, sequences, work)) if self.rotate else {}
        with rotated_norm.rotated(module, blocks, bases) if bases else nullcontext():
            sites = [s for b in blocks for s in b.sites.values() if self.scaled(s)]
            scales = {s.name: column_norms(weight_of(module.get_submodule(s.path))) for s in sites}
            inside = {k: c for b in blocks if b.experts for k, c in self.expert_scales(module, b).items()}
            watch = expert_pairs.watch_of(blocks, work.hardware.torch_device, ("in", "mid"), "layer", inside)
            state = histograms.collect(module, blocks, sequences, work.batch_size, scales, watch)
            add_tables(self, state, module, blocks, sequences, work, lambda s, p: self.threshold(state, s, p), scales)
        state.tensors |= {f"scale.{name}": scale for name, scale in scales.items()}
        state.tensors |= {f"basis.{layer}.{group}": basis for (layer, group), basis in bases.items()}
        state.tensors |= {f"scale.experts.{name}": scale.cpu() for name, scale in inside.items()}
        if self.rotate:
            state.info.setdefault("extra", {})["channels_of_k_without_effect"] = lossless(scales, blocks)
        return state

    def inputs(self, module, blocks, sequences, work: Work) -> dict:
        """Gram matrices of the inputs whose basis W leaves open: where it has fewer rows than columns (grouped queries)."""
        wide = [g for g, role in basis_roles(blocks[0]).items() if wider(module, blocks[0].sites[role])]
        if self.null_space == "library" or not wide:
            return {}
        return input_grams(module, blocks, sequences, work.batch_size, tuple(wide))

    def threshold(self, state: State, site: Site, p: float) -> float:
        return 0.0 if p == 0 else histograms.threshold(state, site, p, self.scaled(site))

    def apply(self, module, state: State, work: Work):
        """Rotate where asked, then replace every projection whose sparsity is above 0."""
        blocks = find_blocks(module)
        if self.rotate:
            names = [(b.index, g) for b in blocks for g in rotated_norm.GROUPS]
            rotated_norm.rotate(module, blocks, {key: state.tensors["basis.{}.{}".format(*key)] for key in names})
        for block in blocks:
            for role, share in shares(self, state, block).items():
                site = block.sites[role]
                if share == 0:
                    continue
                rule = {"prompt": self.prompt, "kernel": work.hardware.kernel_name}
                if self.scaled(site):
                    rule["scale"] = state.tensors[f"scale.{site.name}"].to(work.hardware.torch_device)
                if self.selection == "top_k":
                    width = weight_of(module.get_submodule(site.path)).shape[1]
                    swap(module, site, 0.0, top_k=kept_count(width, share), **rule)
                else:
                    swap(module, site, self.threshold(state, site, share), **rule)
            if block.experts is not None and self.experts != "off" and self.sparsity > 0:
                into = self.expert_rule(state, block, "in") if self.experts != "mid" else None
                mid = self.expert_rule(state, block, "mid") if self.experts != "input" else None
                swap_experts(module, block, into, mid, prompt=self.prompt, kernel=work.hardware.kernel_name)
        return module

    def expert_scales(self, module: torch.nn.Module, block: Block) -> dict[str, torch.Tensor]:
        """c [E, n] by `<layer>.<tensor>`: gate and up are one map, scored as the gate is; down where all maps are."""
        weights = tensors_of(module.get_submodule(block.experts.path))
        scaled = {"in": weights.gate_up} if self.scope != "none" else {}
        scaled |= {"mid": weights.down} if self.scope == "all" else {}
        return {f"{block.index}.{tensor}": w.float().norm(dim=1) for tensor, w in scaled.items()}

    def expert_rule(self, state: State, block: Block, tensor: str) -> dict:
        """What SparseExperts takes for one tensor: scores of each pair are compared within it, or with the layer's t."""
        scale = state.tensors.get(f"scale.experts.{block.index}.{tensor}")
        if self.selection == "top_k":
            width = block.experts.hidden if tensor == "in" else block.experts.inner
            return {"threshold": 0.0, "scale": scale, "top_k": kept_count(width, self.sparsity)}
        return {"threshold": expert_pairs.threshold(state, block, tensor, self.sparsity), "scale": scale}


def kept_count(width: int, sparsity: float) -> int:
    """K = floor(n (1 - s)), the number of inputs each token keeps (section 3); a float just below a whole number counts."""
    return int(width * (1 - sparsity) + 1e-9)


def column_norms(weight: torch.Tensor) -> torch.Tensor:
    """c_i = ||W_:,i||, float32 [n], of a weight [m, n]."""
    return weight.float().norm(dim=0)


def basis_roles(block: Block) -> dict[str, str]:
    """Whose right singular vectors each group gets. Raises ValueError where a block has none of the maps for it."""
    roles_of = {}
    for group, roles in BASIS_OF.items():
        roles_of[group] = next((r for r in roles if r in block.sites), None)
        if roles_of[group] is None:
            raise ValueError(f"method.rotate needs one of {', '.join(roles)} in a block, got {', '.join(block.sites)}")
    return roles_of


def wider(module: torch.nn.Module, site: Site) -> bool:
    """Whether a map has fewer outputs than inputs."""
    rows, columns = shape(module.get_submodule(site.path))
    return rows < columns


def bases_of(
    module: torch.nn.Module, blocks: list[Block], inputs: dict[tuple[int, str], torch.Tensor] | None = None
) -> dict[tuple[int, str], torch.Tensor]:
    """Q by (layer, group), float32 [n, n]: right singular vectors of W_k and W_gate after the norms are folded.

    inputs: Gram matrices of the inputs [n, n] by the same key; their principal axes are the basis of a null space.
    """
    bases = {}
    for block in blocks:
        for group, role in basis_roles(block).items():
            weight = rotated_norm.folded(module, block, role)
            within = (inputs or {}).get((block.index, group))
            bases[block.index, group] = rotated_norm.principal_basis(weight.T @ weight, within).float().cpu()
    return bases


def lossless(scales: dict[str, torch.Tensor], blocks: list[Block]) -> dict[str, float]:
    """Share of k's rotated inputs whose column is zero, by site: under grouped queries W_k has fewer rows than columns,
    so that much sparsity of k costs nothing and should not be counted as found in the activations.
    """
    sites = [b.sites["k"] for b in blocks if "k" in b.sites and b.sites["k"].name in scales]
    return {s.name: float((scales[s.name] < 1e-4 * scales[s.name].max()).float().mean()) for s in sites}
