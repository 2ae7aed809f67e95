"""ProSparse: ReLU instead of SiLU, an L1 penalty on x1 = gate x up that grows in stages, FATReLU (arXiv 2402.13516).

The controls are other values of `control`, trained on the same tokens. Items the paper leaves open are marked in
conf/method/prosparse.yaml.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import nn

from sparsebench.config import NAME_PATTERN, setting
from sparsebench.measure import sparsity
from sparsebench.measure.quality import language_quality
from sparsebench.methods.base import Knob, Method, Work
from sparsebench.methods.prosparse import l1, predictor
from sparsebench.modules import base, x1
from sparsebench.modules.activations import FATReLU, ShiftedReLU
from sparsebench.modules.neuron_sparse import swap
from sparsebench.records.state import State
from sparsebench.sites import find_blocks
from sparsebench.training import chunk_penalties, finetune
from sparsebench.training.loop import Training, train

CONTROLS = ("continued", "vanilla_relu", "shifted_relu", "constant_lambda", "drelu", "l1_relu")


def stage_lambda(step: int, stages: list[int], lambdas: list[float]) -> float:
    """lambda at step t = 1, 2, ...: stages[i] is T_i, the last step of stage i; lambdas[i] its peak (App. B, Alg. 1).

    Stage 0 and stage 1 are constant; stage i >= 2 rises from lambda_{i-1} to lambda_i along half a sine. After T_n: lambda_n.
    """
    stage = next((i for i, last in enumerate(stages) if step <= last), None)
    if stage is None:
        return lambdas[-1]
    if stage <= 1:
        return lambdas[stage]
    progress = (step - stages[stage - 1]) / (stages[stage] - stages[stage - 1])
    eta = 0.5 * (math.sin(-math.pi / 2 + math.pi * progress) + 1)
    return lambdas[stage - 1] + eta * (lambdas[stage] - lambdas[stage - 1])


def expected_sparsity(lambda_last: float) -> float:
    """The paper's fit for LLaMA2-7B, in percent, for a final lambda >= 1e-2 (Sec. 4.4)."""
    return 100 - math.exp(-1.76 * lambda_last**0.30 + 3.49)


@dataclass(kw_only=True)
class ProSparse(Method):
    """Settings; `threshold` (null = the one chosen on dev) and `approximate` can be changed without training again.

    Predictors learn which neurons are active at one threshold, so approximate=true with a threshold that is set is a fit
    of its own, with predictors for that threshold.
    """

    name: str = setting(**NAME_PATTERN)
    control: str | None = setting(choices=CONTROLS)
    stages: list[int] = setting(gt=0)
    lambdas: list[float] = setting(ge=0)
    reg_norm: str = setting(choices=x1.NORMS)
    shift: float = setting(ge=0)
    l1: l1.Settings
    neighbours: chunk_penalties.Neighbours
    threshold: float | None = setting(ge=0)
    thresholds: list[float] = setting(ge=0)
    threshold_tolerance: float = setting(ge=0)
    dev_sequences: int = setting(gt=0)
    approximate: bool
    predictor: predictor.Settings | None
    train: Training | None
    kinds: ClassVar = ("language",)
    neutral: ClassVar = {"control": "continued", "train": None}
    operating_point: ClassVar = ("threshold", "approximate")

    def __post_init__(self):
        if self.approximate and self.threshold is not None:
            self.operating_point = ()  # predictors are of one threshold, which is part of the state's key
        problems = []
        if len(self.stages) != len(self.lambdas) or not self.stages:
            problems.append(f"lambdas must have one value per stage ({len(self.stages)}), got {len(self.lambdas)}")
        if any(b <= a for a, b in pairwise(self.stages)):
            problems.append(f"stages must be rising accumulated steps, got {self.stages}")
        if self.train and self.stages and self.stages[-1] != self.train.steps:
            problems.append(f"stages must end at method.train.steps={self.train.steps}, got {self.stages[-1]}")
        if not self.thresholds:
            problems.append("thresholds must hold at least one value, got []")
        if self.threshold and not self.takes_threshold:
            problems.append(f"threshold must be null or 0 with method.control={self.control}, got {self.threshold}")
        if self.approximate and self.predictor is None:
            problems.append("approximate=true needs method.predictor, got null")
        if self.approximate and self.control == "continued":
            problems.append("approximate must be false with method.control=continued (nothing is skipped), got true")
        if self.neighbours.on and self.control in ("continued", "drelu"):
            problems.append(
                f"neighbours must be off with method.control={self.control}: its gates are not what is zero"
            )
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def takes_threshold(self) -> bool:
        """FATReLU follows ProSparse and its constant-lambda control; the others are reported as they were trained."""
        return self.control in (None, "constant_lambda")

    @property
    def knob(self) -> Knob | None:
        """The threshold, where nothing was trained for another one."""
        return Knob("threshold", 0.0, max(self.thresholds)) if self.takes_threshold and not self.approximate else None

    def coefficient(self, step: int) -> float:
        """lambda of a step counted from 0."""
        if self.control is None:
            return stage_lambda(step + 1, self.stages, self.lambdas)
        return self.lambdas[-1] if self.control == "constant_lambda" else 0.0

    @property
    def activation(self) -> str:
        """What the FFN's gate ends with, in words: a state trained with one is not applied with another."""
        return {"continued": "the model's own", "shifted_relu": "shifted ReLU"}.get(self.control or "", "ReLU")

    def penalty(self, module: nn.Module, seed: int) -> x1.X1Penalty | chunk_penalties.Beside:
        own = x1.X1Penalty(module, self.reg_norm, self.coefficient)
        if self.control == "l1_relu":
            own = l1.L1Penalty(module, self.l1, seed)
        return chunk_penalties.Beside(own, module, self.neighbours) if self.neighbours.on else own

    def swap(self, module: nn.Module, threshold: float, kernel: str | None, predictors: dict | None = None) -> None:
        """The FFNs of the variant in the place of the model's own; none for continued training."""
        if self.control == "continued":
            return
        for block in find_blocks(module):
            swap(
                module,
                block,
                ShiftedReLU(self.shift) if self.control == "shifted_relu" else FATReLU(threshold),
                up_activation="relu" if self.control == "drelu" else None,
                predictor=predictors[block.index] if predictors else None,
                kernel=kernel,
            )

    def fit(self, loaded, data, work: Work) -> State:
        """Train a copy, then choose t on dev: the largest whose perplexity stays within the tolerance of t = 0's.

        Tensors: `weights.*`, all parameters in the model's dtype; `predictor.*`. info.extra: history, table over t.
        """
        state = State(info={"kind": "none", "tokens": 0, "threshold": 0.0, "activation": self.activation, "extra": {}})
        module = finetune.trainable(loaded.module)
        self.swap(module, 0.0, None)
        if self.train is not None:
            rows = finetune.rows(data.fit, self.train)
            if self.neighbours.chunk and data.fit.sequence_length % self.neighbours.length:
                raise ValueError(
                    f"method.neighbours.length must divide dataset.sequence_length={data.fit.sequence_length}, "
                    f"got {self.neighbours.length}"
                )
            with self.penalty(module, work.seed) as penalty:
                history = train(
                    module, rows, self.train, folder=work.folder, seed=work.seed, penalty=penalty,
                    after_step=penalty.after_step, track=work.log, label="fit",
                )  # fmt: skip
            state.info |= finetune.facts(history, self.train, rows)
            zeros = [row["fit/x1_zero"] for row in history.rows]
            cost = l1.training_macs(loaded.module, state.info["tokens"], sum(zeros) / len(zeros))
            state.info["extra"]["training_macs"] = cost
            state.tensors = finetune.weights(module, loaded.module)
            module = finetune.rebuilt(loaded.module, state.tensors)
            self.swap(module, 0.0, None)
        module.requires_grad_(False)
        if self.control == "l1_relu":
            dev = data.dev.sequences(self.dev_sequences)
            state.info["extra"]["non_zeros_on_dev"] = l1.non_zeros(module, dev, work.batch_size)
        if self.takes_threshold:
            table = self.over_thresholds(module, data, work)
            limit = table[0]["perplexity"] * (1 + self.threshold_tolerance)
            state.info["threshold"] = max(row["threshold"] for row in table if row["perplexity"] <= limit)
            state.info["extra"] |= {"thresholds_on_dev": table, "threshold": state.info["threshold"]}
        if self.predictor is not None and self.control != "continued":
            own = self.approximate and self.threshold is not None and self.takes_threshold
            state.info["predictor_threshold"] = self.threshold if own else state.info["threshold"]
            self.set_threshold(module, state.info["predictor_threshold"])
            tensors, state.info["extra"]["predictor"] = predictor.fit(module, data, self.predictor, work)
            state.tensors |= tensors
        return state

    def used_threshold(self, state: State) -> float:
        return state.info["threshold"] if self.threshold is None or not self.takes_threshold else self.threshold

    def set_threshold(self, module: nn.Module, threshold: float) -> None:
        for _, ffn in base.measured_modules(module):
            if self.takes_threshold:
                ffn.threshold.fill_(threshold)

    def over_thresholds(self, module: nn.Module, data, work: Work) -> list[dict]:
        """Dev perplexity and sparsity at t = 0 and at every t of the grid."""
        table = []
        for threshold in sorted({0.0, *self.thresholds}):
            self.set_threshold(module, threshold)
            quality, counters = language_quality(module, data.dev, self.dev_sequences, work.batch_size)
            shares = [
                s.sparsity
                for name, s in sparsity.summarise(module, counters).items()
                if name.endswith((".down", ".fc2"))
            ]
            row = {"threshold": threshold, "perplexity": quality["perplexity"], "sparsity": sum(shares) / len(shares)}
            table.append(row)
            work.log({f"fit/dev_{key}": value for key, value in row.items()})
        return table

    def apply(self, module, state: State, work: Work):
        """The trained weights, the FFNs of the variant with their threshold, and the predictors where asked for."""
        trained = state.info.get("activation", self.activation)
        if trained != self.activation:
            raise ValueError(
                f"method.control={self.control} ends the gate with {self.activation}, this state was trained with {trained}"
            )
        if self.train is not None:
            finetune.load_weights(module, state.tensors)
        threshold = self.used_threshold(state)
        if self.approximate and state.info["predictor_threshold"] != threshold:
            raise ValueError(
                f"method.threshold must be {state.info['predictor_threshold']:g} with this state's predictors, got {threshold:g}"
            )
        predictors = predictor.build(module, state.tensors) if self.approximate else None
        self.swap(module, threshold, work.hardware.kernel_name, predictors)
        return module
