"""DSTF: static weight sparsity times dynamic activation-map sparsity, three stages (docs/methods/dstf.md).

1 the trained network; 2 weight L1, global magnitude pruning, fine-tuning with the masks kept; 3 Transformed-L1 on the
activation maps, masks frozen, at several strengths: the largest sparsity on data.dev whose accuracy there is at least
the baseline's is taken. The control `finetune` has the same stages, steps and number of candidates without pruning and
penalties; its candidates differ in the order of the data. Only the abstract of the paper was at hand; what the YAML marks [choice] is ours.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from sparsebench.config import NAME_PATTERN, setting
from sparsebench.measure import effective_macs, quality
from sparsebench.methods import fatrelu
from sparsebench.methods.base import Method, Work
from sparsebench.methods.dstf import penalties
from sparsebench.methods.fatrelu import needs_maps
from sparsebench.modules.activation_map import maps_of, needed_maps
from sparsebench.records import state
from sparsebench.records.state import State
from sparsebench.training.loop import Diverged, Training, classification_loss, train

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class DSTF(Method):
    """Settings of the three stages; `train` is the optimiser of stages 2 and 3, its steps those of stage 3."""

    name: str = setting(**NAME_PATTERN)
    stages: str = setting(choices=("dual", "activation", "weight", "finetune"))
    regulariser: str = setting(choices=penalties.NAMES)
    beta: float = setting(gt=0)
    alpha: float | list[float] | None = setting(ge=0)
    strengths: list[float] = setting(ge=0)
    per_layer: bool
    reg_norm: str = setting(choices=("per_sample_sum", "per_element"))
    delta: float = setting(ge=0, lt=1)
    weight_sparsity: float = setting(ge=0, lt=1)
    gamma: float = setting(ge=0)
    l1_steps: int = setting(ge=0)
    finetune_steps: int = setting(ge=0)
    fatrelu_budget: float | None = setting(ge=0, lt=1)
    train: Training
    kinds: ClassVar = ("vision",)
    neutral: ClassVar = {"stages": "weight", "weight_sparsity": 0.0}

    def __post_init__(self):
        problems = []
        if not self.strengths and self.alpha is None:
            problems.append("strengths must hold at least one number where method.alpha is null, got []")
        if isinstance(self.alpha, list) and self.per_layer:
            problems.append("per_layer must be false where method.alpha lists one value per map, got True")
        for name in ("l1_steps", "finetune_steps"):
            if 0 < getattr(self, name) <= self.train.warmup:
                problems.append(f"{name} must be above train.warmup={self.train.warmup}, got {getattr(self, name)}")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def prunes(self) -> bool:
        return self.stages in ("dual", "weight") and self.weight_sparsity > 0

    def problems(self, settings: Any) -> list[str]:
        return needs_maps(settings)

    def fit(self, loaded, data, work: Work) -> State:
        """Tensors: the network's parameters and buffers, and `mask.<weight>` for pruned ones. info: the whole search.

        Every finished training is kept in work.folder, so a killed fit goes on with the one it was in.
        """
        needed_maps(loaded.module, self.name)
        start = copy.deepcopy(loaded.module).float().requires_grad_(True)
        baseline = self.score(start, data, work)
        masks: dict[str, torch.Tensor] = {}
        rows = [{"stage": 1, **baseline}]
        if self.stages in ("dual", "weight") and self.weight_sparsity > 0:
            masks = self.prune(start, data, work)
            rows.append({"stage": 2, **self.score(start, data, work)})
        steps = self.l1_steps + self.finetune_steps
        if self.stages == "finetune" and steps:
            if not self.stage("control", start, data, work, steps, None, {}):
                raise Diverged("method.train.lr: the control diverged")
            rows.append({"stage": 2, **self.score(start, data, work)})
        chosen, candidates = start, []
        if self.stages in ("dual", "activation", "finetune"):
            alphas, weights, scale = self.coefficients(start, data, work)
            best = None
            for number, (strength, alpha) in enumerate(alphas):
                module = copy.deepcopy(start)
                row = {"stage": 3, "strength": strength, "alpha": alpha}
                if self.stages == "finetune":
                    name, penalty = f"control-{number}", None
                    row["seed"] = work.seed + number
                else:
                    name, penalty = f"maps-{alpha:.6g}", self.penalty(module, alpha, weights)
                seed = row.get("seed", work.seed)
                if not self.stage(name, module, data, work, self.train.steps, penalty, masks, seed):
                    candidates.append({**row, "diverged": True})
                    continue
                row |= self.score(module, data, work)
                row["admissible"] = row["accuracy"] >= baseline["accuracy"] - self.delta - 1e-12
                candidates.append(row)
                log.info(
                    "dstf: alpha %.3g: dev accuracy %.4f, map sparsity %.4f",
                    alpha,
                    row["accuracy"],
                    row["map_sparsity"],
                )
                if best is None or rank(row) > rank(best):
                    best, chosen = row, module
            if best is None:
                raise Diverged("method.strengths: training diverged at every strength")
            if not best["admissible"]:
                log.warning(
                    "dstf: no strength keeps dev accuracy %.4f; the most accurate is taken", baseline["accuracy"]
                )
            best["chosen"] = True
        facts: dict[str, Any] = {"search": rows + candidates}
        if candidates:
            facts |= {"layer_weights": weights, "scale": scale}
        thresholds = {}
        if self.fatrelu_budget is not None:
            thresholds = fatrelu.search(
                chosen, lambda: self.score(chosen, data, work)["accuracy"], self.fatrelu_budget, 1.0, 1e-3, work.log
            )
            facts["thresholds"] = thresholds
        tensors = {k: v.detach().cpu() for k, v in chosen.state_dict().items()}
        tensors |= {f"mask.{name}": mask.cpu() for name, mask in masks.items()}
        return State(tensors, {"kind": "trained", "thresholds": thresholds, "extra": {"dstf": facts}})

    def apply(self, module, state: State, work: Work):
        """The trained weights in the model's dtype, pruned ones exactly 0, thresholds where they were searched."""
        masks = {k.removeprefix("mask."): v for k, v in state.tensors.items() if k.startswith("mask.")}
        module.load_state_dict({k: v for k, v in state.tensors.items() if not k.startswith("mask.")})
        weights = penalties.product_weights(module)
        with torch.no_grad():
            for name, mask in masks.items():
                weights[name].mul_(mask.to(weights[name].device))
        for layer in maps_of(module):
            layer.threshold = state.info["thresholds"].get(layer.site)
        return module

    # -----------------------------------------------------------------------------------------------------------------

    def score(self, module: nn.Module, data, work: Work) -> dict:
        """On data.dev: accuracy, nll, map_sparsity (pooled exact zeros), weight_sparsity."""
        module.eval()
        metrics, maps = quality.classification_quality(module, data.dev, None, work.batch_size)
        pooled = sum(c.zeros for c in maps.values()) / max(1, sum(c.elements for c in maps.values()))
        return {
            "accuracy": metrics["accuracy"], "nll": metrics["nll"], "map_sparsity": pooled,
            "weight_sparsity": effective_macs.weight_sparsity(module),
        }  # fmt: skip

    def stage(self, name, module: nn.Module, data, work: Work, steps: int, penalty, masks, seed=None) -> bool:
        """Train `module` in place; a stage that finished before is read back. False where training diverged."""
        path = work.folder / f"{name}.safetensors"
        settings = dataclasses.replace(self.train, steps=steps)
        keeper = penalties.WeightMasks(module, masks)

        def run() -> State:
            try:
                history = train(
                    module, data.fit, settings, folder=work.folder / name, seed=work.seed if seed is None else seed,
                    loss=classification_loss,
                    penalty=penalty, after_step=keeper.apply, track=work.log, label=f"dstf/{name}",
                )  # fmt: skip
            except Diverged as error:
                log.warning("%s", error)
                return State(info={"diverged": True})
            return State(dict(module.state_dict()), {"diverged": False, "history": history.rows})

        try:
            done, _ = state.cached(path, run)
        finally:
            keeper.remove()
            if hasattr(penalty, "remove"):
                penalty.remove()
        if not done.info["diverged"]:
            module.load_state_dict(done.tensors)
        return not done.info["diverged"]

    def prune(self, module: nn.Module, data, work: Work) -> dict[str, torch.Tensor]:
        """Stage 2, in place. Returns the masks (True = kept). Raises Diverged."""
        fine = True
        if self.l1_steps:
            fine = self.stage(
                "weights-l1", module, data, work, self.l1_steps, penalties.WeightL1(module, self.gamma), {}
            )
        masks, tau = penalties.magnitude_masks(module, self.weight_sparsity)
        log.info("dstf: |w| <= %.3g pruned", tau)
        if fine and self.finetune_steps:
            fine = self.stage("weights-finetune", module, data, work, self.finetune_steps, None, masks)
        if not fine:
            raise Diverged("method.gamma, method.train.lr: stage 2 diverged")
        with torch.no_grad():
            for name, weight in penalties.product_weights(module).items():
                weight.mul_(masks[name])
        return masks

    def coefficients(self, module: nn.Module, data, work: Work) -> tuple[list, dict | None, dict]:
        """(pairs (strength, alpha), w_l by site, what they were scaled by).

        A strength is the ratio of the whole penalty to the cross-entropy at the start of stage 3, both on data.dev:
        the training loss is near 0 by then. With `per_layer` each map has an equal share in that ratio [choice].
        """
        if self.stages == "finetune":
            return [(0.0, 0.0)] * (len(self.strengths) if self.alpha is None else 1), None, {}
        sites = [m.site for m in maps_of(module)]
        if isinstance(self.alpha, list):
            if len(self.alpha) != len(sites):
                raise ValueError(
                    f"method.alpha must list {len(sites)} numbers ({', '.join(sites)}), got {len(self.alpha)}"
                )
            return [(None, 1.0)], dict(zip(sites, self.alpha, strict=True)), {}
        function = penalties.regulariser(self.regulariser, self.beta)
        probe = penalties.MapPenalty(module, function, 1.0, norm=self.reg_norm)
        sums, count, entropy = dict.fromkeys(sites, 0.0), 0, 0.0
        module.train()  # maps are only seen in training mode; norms must not learn from it
        norms = [m for m in module.modules() if isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.Dropout))]
        for norm in norms:
            norm.eval()
        with torch.no_grad():
            for batch in data.dev.batches(None, work.batch_size, work.hardware.torch_device):
                entropy += float(classification_loss(module, batch)) * batch.numel()
                for site, term in probe.terms().items():
                    sums[site] += float(term) * batch.numel()
                count += batch.numel()
        probe.remove()
        module.eval()
        means, entropy = {site: value / count for site, value in sums.items()}, entropy / count
        weights, total = None, sum(means.values())
        if self.per_layer:
            weights = {site: 1 / (len(sites) * max(mean, 1e-12)) for site, mean in means.items()}
            total = 1.0
        scale = {"cross_entropy": entropy, "penalty": means}
        if self.alpha is not None:
            return [(self.alpha * total / entropy, self.alpha)], weights, scale
        return [(s, s * entropy / total) for s in self.strengths], weights, scale

    def penalty(self, module: nn.Module, alpha: float, weights: dict | None) -> penalties.MapPenalty:
        """Stage 3's term at one alpha."""
        return penalties.MapPenalty(
            module, penalties.regulariser(self.regulariser, self.beta), alpha, weights, self.reg_norm
        )


def rank(row: dict) -> tuple:
    """Admissible before not; then the sparser; among inadmissible ones the more accurate."""
    return (1, row["map_sparsity"]) if row["admissible"] else (0, row["accuracy"])
