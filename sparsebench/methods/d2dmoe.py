"""D2DMoE: sparsified dense model to experts whose predicted output norm decides, per token, how many run (arXiv 2310.04361).

Stages: attention projections distilled into two-layer MLPs (optional), fine-tune with an activation penalty, balanced
clustering, routers by regression of the experts' output norms, then any tau without training again.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from sparsebench.config import NAME_PATTERN, setting
from sparsebench.experts import clustering, conversion, passes, routers
from sparsebench.methods.base import Knob, Method, Work
from sparsebench.modules.activations import activation_of
from sparsebench.modules.expert_ffn import ExpertFFN
from sparsebench.modules.input_sparse import replace
from sparsebench.records.state import State
from sparsebench.sites import find_blocks
from sparsebench.training import finetune
from sparsebench.training.loop import Training, train

REGULARISERS = ("hoyer", "l1", "hoyer_clamped", "l1_clamped")
DELTA = -10.0  # where pre-activations are clamped
EPSILON = 1e-15
PROJECTIONS = ("q", "k", "v", "o")
ROUTER = {"inner": "relu", "outer": "abs"}


def hoyer(a: torch.Tensor) -> torch.Tensor:
    """(sum |a_i|)^2 / (sum a_i^2 + 1e-15) over the last dimension, in float32 at least: 1 for one-hot, n for n equals."""
    magnitude = (a if a.dtype == torch.float64 else a.float()).abs()
    return magnitude.sum(-1).square() / (magnitude.square().sum(-1) + EPSILON)


def regularise(name: str, z: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """The penalty of each token [...] from pre-activations z and activations a [..., f]; clamped: max(z, -10) + 10."""
    if name.endswith("clamped"):
        shifted = z.float().clamp(min=DELTA) - DELTA
        return hoyer(shifted) if name.startswith("hoyer") else shifted.sum(-1)
    return hoyer(a) if name == "hoyer" else a.float().abs().sum(-1)


def projection_width(d: int, share: float) -> int:
    """Hidden width h of the MLP that replaces a d x d map with about `share` of its parameters."""
    return round(share * (d * d + d) / (2 * d + 1))


class ActivationPenalty:
    """alpha(t) (mean over FFNs + mean over attention MLPs) of a regulariser: a Penalty of train.py.

    alpha rises linearly over the first `ramp` of the steps. Padding counts nowhere.
    """

    def __init__(self, module, expert_ffns: list[ExpertFFN], name: str, alpha: float, steps: int, ramp: float):
        self.name, self.alpha, self.steps, self.ramp = name, alpha, steps, ramp
        self.expert_ffns, self.values, self.mask = expert_ffns, {}, None
        self.zeros = self.elements = 0
        self.hook = module.register_forward_pre_hook(self.note_mask, with_kwargs=True)
        for ffn in expert_ffns:
            ffn.watch = self.see

    def note_mask(self, module, args, kwargs) -> None:
        mask = kwargs.get("attention_mask")
        self.mask = mask.bool() if mask is not None and mask.dim() == 2 else None

    def see(self, ffn, x, z, a, x1) -> None:
        if ffn.training:
            z, a = (z, a) if self.mask is None else (z[self.mask], a[self.mask])
            self.values[ffn.site] = regularise(self.name, z, a).mean()
            self.zeros, self.elements = self.zeros + int((a == 0).sum()), self.elements + a.numel()

    def coefficient(self, step: int) -> float:
        return self.alpha * (min(1.0, (step + 1) / (self.ramp * self.steps)) if self.ramp else 1.0)

    def value(self) -> torch.Tensor:
        groups = [[v for s, v in self.values.items() if s.endswith(".ffn") == ffn] for ffn in (True, False)]
        self.values = {}
        return sum(torch.stack(g).mean() for g in groups if g)

    def stats(self) -> dict[str, float]:
        shares = {"zeros": self.zeros / max(1, self.elements)}
        self.zeros = self.elements = 0
        return shares

    def remove(self) -> None:
        self.hook.remove()
        for ffn in self.expert_ffns:
            ffn.watch = None


@dataclass(kw_only=True)
class D2DMoE(Method):
    """Settings; `tau`, `select` and `routing` are changed without fitting again."""

    name: str = setting(**NAME_PATTERN)
    tau: float = setting(ge=0, le=1)
    select: str = setting(choices=("max", "cumshare"))
    routing: str = setting(choices=("trained", "oracle", "random"))
    activation: str | None = setting(choices=("relu",))
    regulariser: str = setting(choices=REGULARISERS)
    alpha: float = setting(ge=0)
    ramp: float = setting(ge=0, le=1)
    experts: clustering.Grouping
    projections: list[str] = setting(choices=PROJECTIONS)
    projection_experts: int = setting(gt=0)
    projection_share: float = setting(gt=0)
    projection_alpha: float = setting(ge=0)
    projection_dropout: float = setting(ge=0, lt=1)
    router_width: int = setting(gt=0)
    train: Training | None
    distil: Training | None
    router: Training
    kinds: ClassVar = conversion.KINDS
    neutral: ClassVar = {"tau": 0.0, "activation": None, "train": None}
    neutral_is_exact: ClassVar = False  # neurons stand in another order, so sums are rounded otherwise
    operating_point: ClassVar = ("tau", "select", "routing")

    def __post_init__(self):
        if self.projections and self.distil is None:
            raise ValueError("distil must hold the training of the projections' MLPs, got null")
        if self.activation is None and self.regulariser in ("hoyer", "l1") and self.alpha and self.train:
            raise ValueError(
                f"regulariser must be hoyer_clamped or l1_clamped where the activation is kept, got {self.regulariser!r}"
            )

    @property
    def knob(self) -> Knob:
        """tau keeps experts near the largest (more of it, fewer), or until their shares reach it (more of it, more)."""
        return Knob("tau", *((0.0, 1.0) if self.select == "max" else (1.0, 0.0)))

    def problems(self, settings: Any) -> list[str]:
        problems = conversion.problems(self, settings)
        if self.projections and settings.model.kind != "vision":
            problems.append(
                f"method.projections must be [] for models of kind {settings.model.kind}, got {self.projections}"
            )
        return problems

    def students(self, module: nn.Module, generator: torch.Generator) -> dict[str, ExpertFFN]:
        """A two-layer MLP for each projection, by path, initialised like nn.Linear."""
        by_path, name = {}, self.activation or activation_of(module.config)
        for path, linear, site in conversion.linear_maps(module, tuple(self.projections)):
            n, d = linear.weight.shape
            # the specified h, brought to a multiple of the number of experts
            size = max(1, round(projection_width(d, self.projection_share) / self.projection_experts))
            h = size * self.projection_experts

            def uniform(*shape, fan):
                return (torch.rand(*shape, generator=generator) * 2 - 1) * fan**-0.5

            weights = {"first": uniform(h, d, fan=d), "first_bias": uniform(h, fan=d), "last": uniform(h, n, fan=h),
                       "last_bias": uniform(n, fan=h)}  # fmt: skip
            weights = {k: v.to(linear.weight) for k, v in weights.items()}
            dense = {site: linear.weight.numel()}
            by_path[path] = ExpertFFN(weights, name, self.projection_experts, site=site, dense_macs=dense)
        return by_path

    def distilled(self, module: nn.Module, students: dict[str, ExpertFFN], data, work: Work):
        """Train the students on the base model's inputs to its projections' outputs; (history, settings, rows)."""
        base = copy.deepcopy(module).eval().requires_grad_(False)
        for student in students.values():
            student.requires_grad_(True)
            student.dropout = self.projection_dropout
        taught: dict[str, tuple] = {}
        hooks = [
            base.get_submodule(path).register_forward_hook(
                lambda _, args, y, path=path: taught.__setitem__(path, (args[0].detach(), y.detach()))
            )
            for path in students
        ]
        container = nn.ModuleList(students.values())
        penalty = ActivationPenalty(
            container, list(students.values()), self.regulariser, self.projection_alpha, self.distil.steps, 1.0
        )

        def loss(_, batch):
            with torch.no_grad():
                passes.forward(base, batch)
            pairs = [(student(taught[path][0]), taught.pop(path)[1]) for path, student in students.items()]
            return sum(F.mse_loss(y, target) for y, target in pairs) / len(pairs)

        rows, _ = passes.rows_and_loss(data, self.distil)
        history = train(
            container, rows, self.distil, folder=work.folder / "distil", seed=work.seed, loss=loss, penalty=penalty,
            track=work.log, label="fit/distil",
        )  # fmt: skip
        penalty.remove()
        for hook in hooks:
            hook.remove()
        for student in students.values():
            student.dropout = 0.0
        return history, self.distil, rows

    def fit(self, loaded, data, work: Work) -> State:
        """Distil, sparsify, cluster, regress norms. info.extra: what each training logged, zeros of the FFNs on dev."""
        module, histories = finetune.trainable(loaded.module), {}
        blocks = find_blocks(module)
        generator = torch.Generator().manual_seed(work.seed)
        students = self.students(module, generator)
        if students:
            histories["distil"] = self.distilled(module, students, data, work)
        for path, student in students.items():
            replace(module, path, student)
        expert_ffns = conversion.convert(module, self.experts.size, self.activation, blocks) + list(students.values())
        module.requires_grad_(True)
        if self.train is not None:
            rows, loss = passes.rows_and_loss(data, self.train)
            penalty = ActivationPenalty(module, expert_ffns, self.regulariser, self.alpha, self.train.steps, self.ramp)
            history = train(
                module, rows, self.train, folder=work.folder / "sparsify", seed=work.seed, loss=loss, penalty=penalty,
                track=work.log, label="fit/sparsify",
            )  # fmt: skip
            penalty.remove()
            histories["sparsify"] = (history, self.train, rows)
        module.eval()
        orders = clustering.group(expert_ffns, self.experts, work.seed, work.log)
        for ffn in expert_ffns:
            d = ffn.first.shape[1]
            ffn.router = routers.random_router(d, self.router_width, ffn.num_experts, generator, **ROUTER)
            ffn.router.to(ffn.first.device)
        history = routers.fit_routers(module, expert_ffns, ExpertFFN.norms, F.mse_loss, data, self.router, work)
        histories["router"] = (history, self.router, passes.rows_and_loss(data, self.router)[0])
        info = conversion.history_facts(histories)
        return conversion.state_of(module, loaded.module, orders, bool(self.train or students), info)

    def apply(self, module, state: State, work: Work):
        """Experts in their order, weights and routers, the rule at tau."""
        blocks = find_blocks(module)
        for path, student in self.students(module, torch.Generator().manual_seed(0)).items():
            replace(module, path, student)
        conversion.convert(module, self.experts.size, self.activation, blocks)
        routers.add_routers(module, state, **ROUTER)
        conversion.restore(module, state)
        routers.harden(module, self.select, self.tau, routing=self.routing, kernel=work.hardware.kernel_name)
        return module
