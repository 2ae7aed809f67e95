"""LTE, Learn-To-be-Efficient: experts of 32 neurons, sigmoid routers pushed away from a fixed threshold (arXiv 2402.06126).

Stage 1 trains model and routers with soft gates and the efficiency and separability losses (eqs. 3 to 6); stage 2
freezes the routers, routes hard (eq. 2) and trains the model alone. One eta, one training. A token may run no expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparsebench.config import NAME_PATTERN, setting
from sparsebench.experts import clustering, conversion, passes, routers
from sparsebench.methods.base import Method, Work
from sparsebench.modules.expert_ffn import ExpertFFN
from sparsebench.records.state import State
from sparsebench.training import finetune
from sparsebench.training.loop import Training, train


def efficiency(gates: torch.Tensor) -> torch.Tensor:
    """Mean of G^2 (eq. 4)."""
    return gates.float().square().mean()


def separability(gates: torch.Tensor, tau: float, epsilon: float) -> torch.Tensor:
    """Mean of 1 / ((G - tau)^2 + epsilon) (eq. 5; epsilon is ours: without it the loss has no bound at G = tau)."""
    return (1 / ((gates.float() - tau).square() + epsilon)).mean()


class RouterPenalty:
    """eta L_eff + lambda L_sep over layers, experts and valid tokens of the last pass: a Penalty of train.py."""

    def __init__(self, module, expert_ffns: list[ExpertFFN], eta: float, lam: float, tau: float, epsilon: float):
        self.expert_ffns, self.eta, self.lam, self.tau, self.epsilon = expert_ffns, eta, lam, tau, epsilon
        self.mask, self.last = None, {}
        self.hook = module.register_forward_pre_hook(self.note_mask, with_kwargs=True)

    def note_mask(self, module, args, kwargs) -> None:
        mask = kwargs.get("attention_mask")
        self.mask = mask.bool() if mask is not None and mask.dim() == 2 else None

    def coefficient(self, step: int) -> float:
        return 1.0

    def gates(self, ffn: ExpertFFN) -> torch.Tensor:
        """Soft scores of the last pass, padding left out."""
        return ffn.soft_scores if self.mask is None else ffn.soft_scores[self.mask]

    def terms(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(L_eff, L_sep), means over the modules."""
        gates = [self.gates(ffn) for ffn in self.expert_ffns]
        eff = torch.stack([efficiency(g) for g in gates]).mean()
        return eff, torch.stack([separability(g, self.tau, self.epsilon) for g in gates]).mean()

    def value(self) -> torch.Tensor:
        eff, sep = self.terms()
        self.last = {"efficiency": float(eff.detach()), "separability": float(sep.detach())}
        for ffn in self.expert_ffns:
            self.last |= {f"selected/{ffn.site}": float((self.gates(ffn) > self.tau).float().mean())}
            ffn.soft_scores = None
        return self.eta * eff + self.lam * sep

    def stats(self) -> dict[str, float]:
        return self.last

    def remove(self) -> None:
        self.hook.remove()


@dataclass(kw_only=True)
class LTE(Method):
    """Settings. Nothing can be changed without training again; `tau` after the fact is off the protocol."""

    name: str = setting(**NAME_PATTERN)
    control: str | None = setting(choices=("dense",))
    eta: float = setting(ge=0)
    lam: float = setting(ge=0)
    tau: float = setting(ge=0, lt=1)
    epsilon: float = setting(gt=0)
    router_std: float = setting(gt=0)
    experts: clustering.Grouping
    probe_sequences: int = setting(gt=0)
    train: Training | None
    adapt: Training | None
    kinds: ClassVar = conversion.KINDS
    neutral: ClassVar = {"tau": 0.0, "train": None, "adapt": None}
    neutral_is_exact: ClassVar = False  # neurons stand in another order, so sums are rounded otherwise

    def __post_init__(self):
        if (self.train is None) != (self.adapt is None):
            raise ValueError("adapt must be null exactly where train is (stage 2 follows stage 1)")
        if self.control and self.train is None:
            raise ValueError("train must hold settings with method.control=dense, got null")

    def problems(self, settings: Any) -> list[str]:
        return conversion.problems(self, settings)

    def trained(self, stage: str, module, settings: Training, data, work: Work, penalty=None):
        rows, loss = passes.rows_and_loss(data, settings)
        history = train(
            module, rows, settings, folder=work.folder / stage, seed=work.seed, loss=loss, penalty=penalty,
            track=work.log, label=f"fit/{stage}",
        )  # fmt: skip
        return history, settings, rows

    def fit(self, loaded, data, work: Work) -> State:
        """Both stages. info.extra: flips and undecided scores of a probe, quality on dev before and after the switch."""
        module = finetune.trainable(loaded.module)
        if self.control:
            histories = {
                stage: self.trained(stage, module, settings, data, work)
                for stage, settings in (("soft", self.train), ("hard", self.adapt))
            }
            return State(finetune.weights(module, loaded.module), conversion.history_facts(histories))
        expert_ffns = conversion.convert(module, self.experts.size, None)
        orders = clustering.group(expert_ffns, self.experts, work.seed, work.log)
        generator = torch.Generator().manual_seed(work.seed)
        for ffn in expert_ffns:
            ffn.router = routers.random_router(
                ffn.first.shape[1], None, ffn.num_experts, generator, std=self.router_std
            ).to(ffn.first.device)
        module.requires_grad_(True)
        if self.train is None:
            return conversion.state_of(module, loaded.module, orders, False, {"kind": "none", "tokens": 0})
        before, _ = self.sides(module, data)
        for ffn in expert_ffns:
            ffn.mode = "soft"
        penalty = RouterPenalty(module, expert_ffns, self.eta, self.lam, self.tau, self.epsilon)
        histories = {"soft": self.trained("soft", module, self.train, data, work, penalty)}
        penalty.remove()
        limit, extra = self.probe_sequences, {"epsilon": self.epsilon}
        extra["dev_soft"] = passes.dev_quality(module, data, work, limit)
        after, undecided = self.sides(module, data)
        extra |= {"flip_rate": float((before != after).float().mean()), "undecided": undecided}
        routers.harden(module, "above", self.tau)
        extra["dev_at_the_switch"] = passes.dev_quality(module, data, work, limit)
        freeze_routers(module)
        histories["hard"] = self.trained("hard", module, self.adapt, data, work)
        extra["dev_adapted"] = passes.dev_quality(module, data, work, limit)
        work.log({f"fit/{k}": v for k, v in extra.items() if isinstance(v, float)})
        info = conversion.history_facts(histories)
        info["extra"]["routing"] = extra
        return conversion.state_of(module, loaded.module, {}, True, info)

    @torch.no_grad()
    def sides(self, module, data) -> tuple[torch.Tensor, float]:
        """(G > tau for every score of the probe, share of scores in [0.4, 0.6]) on fit data, padding left out."""
        sides, close, mask = [], 0, None

        def see(ffn, x, z, a, x1):
            nonlocal close
            gates = torch.sigmoid(ffn.router(x))
            gates = gates if mask is None else gates[mask]
            sides.append((gates > self.tau).flatten().cpu())
            close += int(((gates >= 0.4) & (gates <= 0.6)).sum())

        module.eval()
        with conversion.watching(conversion.ffns(module), see):
            for batch in passes.probe(data, self.probe_sequences, next(module.parameters()).device):
                mask = passes.valid(batch)
                passes.forward(module, batch)
        all_sides = torch.cat(sides)
        return all_sides, close / len(all_sides)

    def apply(self, module, state: State, work: Work):
        """Trained weights, hard routing; the dense control is the model with its weights."""
        if self.control:
            finetune.load_weights(module, state.tensors)
            return module
        conversion.convert(module, self.experts.size, None)
        routers.add_routers(module, state, wide=True)
        conversion.restore(module, state)
        routers.harden(module, "above", self.tau, kernel=work.hardware.kernel_name)
        return module


def freeze_routers(module) -> None:
    """Everything trains but the routers."""
    module.requires_grad_(True)
    for ffn in conversion.ffns(module):
        ffn.router.requires_grad_(False)
