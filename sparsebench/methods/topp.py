"""Top-p: of each token's vector the fewest entries of largest magnitude that hold a share p of its L1 mass (2509.00454).

No calibration, no training: one p for every layer and token, on the tensors of the FFN; attention stays dense. `frozen`
replaces the rule by its mean cut on calibration text [choice], which runs on kernels that compare with a threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from sparsebench.calibration.histograms import observe
from sparsebench.config import NAME_PATTERN, setting
from sparsebench.methods.base import Knob, Method, Work
from sparsebench.modules.cut import RULES, Cut, CutFFN, CutLinear, Shared
from sparsebench.modules.gate_sparse import gated_ffn
from sparsebench.modules.input_sparse import PROMPT_POLICIES, replace, swap
from sparsebench.records.state import State
from sparsebench.sites import Block, find_blocks

GROUPS = {"input": ("mlp_in",), "intermediate": ("mlp_mid",), "all_inputs": ("mlp_in", "mlp_mid")}
TARGETS = (*GROUPS, "gate", "up")


@dataclass(kw_only=True)
class TopP(Method):
    """Settings of top-p; with cut=token none of them needs a fit."""

    name: str = setting(**NAME_PATTERN)
    target: str = setting(choices=TARGETS)
    rule: str = setting(choices=RULES)
    p: float = setting(ge=0, le=1)
    power: float = setting(ge=1)
    cut: str = setting(choices=("token", "frozen"))
    prompt: str = setting(choices=PROMPT_POLICIES)
    calibration_tokens: int = setting(gt=0)
    kinds: ClassVar = ("language",)
    neutral: ClassVar = {"rule": "topp", "p": 1.0}
    operating_point: ClassVar = ("target", "rule", "p", "power", "prompt")

    def __post_init__(self):
        if self.cut == "frozen":
            self.operating_point = ("prompt",)  # the mean cut is of one rule, on one tensor
        if self.power != 1 and self.rule != "topp":
            raise ValueError(f"power must be 1 with method.rule={self.rule} (it has no masses), got {self.power}")

    @property
    def knob(self) -> Knob | None:
        """p is no sparsity: only what it drops is."""
        ends = (0.0, 1.0) if self.rule == "maxp" else (1.0, 0.0)
        return Knob("p", *ends) if "p" in self.operating_point else None

    @property
    def keeps_all(self) -> bool:
        """Whether nothing can be dropped: then every map stays as it is, bit by bit."""
        return self.p == (0 if self.rule == "maxp" else 1)

    @property
    def changes(self) -> None:
        return None

    def fit(self, loaded, data, work: Work) -> State:
        """Nothing, or with cut=frozen `cut.<layer>.<tensor>`: the mean over calibration tokens of the smallest magnitude
        that stays, float64 scalars.
        """
        if self.cut == "token":
            return State(info={"kind": "none", "tokens": 0})
        module, cut = loaded.module, Cut(self.rule, self.p, self.power)
        sequences = data.fit.sequences(max(1, self.calibration_tokens // data.fit.sequence_length))
        sums: dict[str, torch.Tensor] = {}
        seen: dict[str, int] = {}

        def observer(name: str, tensor: Callable[[torch.Tensor], torch.Tensor]):
            def see(x: torch.Tensor) -> None:
                least = cut.least(tensor(x).abs()).double()
                sums[name] = sums.get(name, 0) + least.sum().cpu()
                seen[name] = seen.get(name, 0) + least.numel()

            return see

        observers = {}
        for block in find_blocks(module):
            for name, path, tensor in tensors(module, block, self.target):
                observers[path] = observer(name, tensor)
        observe(module, sequences, observers, work.batch_size)
        means = {f"cut.{name}": total / seen[name] for name, total in sums.items()}
        return State(means, {"kind": "calibrated", "tokens": sequences.numel()})

    def apply(self, module, state: State, work: Work):
        """Replace the maps that read the target, or the FFN where the target is inside it."""
        if self.keeps_all:
            return module
        rule = {"prompt": self.prompt, "kernel": work.hardware.kernel_name}
        for block in find_blocks(module):
            if self.target in GROUPS:
                for group in GROUPS[self.target]:
                    self.swap_inputs(module, block, group, state, rule)
            else:
                path = gated_ffn(module, block)
                how = {"cut": Cut(self.rule, self.p, self.power)}
                if self.cut == "frozen":
                    how = {"threshold": float(state.tensors[f"cut.{block.index}.{self.target}"])}
                replace(module, path, CutFFN(module.get_submodule(path), block.index, self.target, **how, **rule))
        return module

    def swap_inputs(self, module, block: Block, group: str, state: State, rule: dict) -> None:
        """The maps of a block that read one tensor: they share its mask."""
        sites = [site for site in block.sites.values() if site.group == group]
        shared = Shared(Cut(self.rule, self.p, self.power), len(sites))
        for site in sites:
            if self.cut == "frozen":
                swap(module, site, float(state.tensors[f"cut.{block.index}.{group}"]), **rule)
                continue
            linear = module.get_submodule(site.path)
            replace(module, site.path, CutLinear(linear, site.name, shared, pays=site is sites[0], **rule))


def tensors(module: nn.Module, block: Block, target: str) -> list[tuple[str, str, Callable]]:
    """Where a block's target tensors are seen: (name, path of a map, the tensor from that map's input)."""
    if target in GROUPS:
        first = {site.group: site.path for site in reversed(block.sites.values())}
        return [(f"{block.index}.{group}", first[group], lambda x: x) for group in GROUPS[target]]
    ffn = module.get_submodule(gated_ffn(module, block))
    by_gate = lambda x: ffn.act_fn(ffn.gate_proj(x))  # noqa: E731
    return [(f"{block.index}.{target}", block.sites["up"].path, by_gate if target == "gate" else ffn.up_proj.forward)]
