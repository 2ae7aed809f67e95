"""From a composed configuration (compose.py) to checked objects, all errors at once.

Nothing here imports torch: `--help`, `--cfg job`, completion and the answer from a finished record stay instant.
The classes named by `_target_` are imported only by `build`.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from sparsebench import cache
from sparsebench.config.fields import ConfigError, build, setting


@dataclass(kw_only=True)
class TextEvaluation:
    """Windows of text: perplexity of language models; one text that they continue, to be read."""

    test_sequences: int | None = setting(gt=0)
    dev_sequences: int | None = setting(gt=0)
    batch_size: int = setting(gt=0)
    prompt: str | None


@dataclass(kw_only=True)
class ClassifierEvaluation:
    """Labelled images and texts: accuracy; shape bias of image classifiers."""

    test_examples: int | None = setting(gt=0)
    examples_per_batch: int = setting(gt=0)
    cue_conflict: str | None = setting(file="images", exists=True)


@dataclass(kw_only=True)
class NeuronMetrics:
    """Zeros of x1, unions over tokens, CETT and PPL-p% (measure/neurons.py)."""

    enabled: bool
    increase: float = setting(ge=0)
    tokens: int = setting(gt=0)
    aggregate: list[int] = setting(gt=0)


@dataclass(kw_only=True)
class CriticalSparsity:
    """The largest sparsity that keeps a share of the dense metric (measure/critical.py)."""

    enabled: bool
    share: float = setting(gt=0, lt=1)
    metric: str | None = setting(choices=("perplexity", "next_token", "accuracy"))
    resolution: float = setting(gt=0, lt=0.5)


@dataclass(kw_only=True)
class Harness:
    """Tasks of lm-eval on the live model (measure/lm_eval.py)."""

    tasks: list[str]
    task_limit: int | None = setting(gt=0)
    task_path: str | None = setting(file="tasks", exists=True)


@dataclass(kw_only=True)
class Evaluation:
    """What is evaluated on the held-out split, by what it is for."""

    text: TextEvaluation
    classifier: ClassifierEvaluation
    neurons: NeuronMetrics
    critical: CriticalSparsity
    lm_eval: Harness


@dataclass(kw_only=True)
class Measurement:
    """How latency is measured (the engine itself is a property of the hardware target)."""

    latency: bool
    samples: int = setting(ge=30)
    warmup: int = setting(ge=3)
    context: int = setting(gt=0)
    prompt: int = setting(gt=1)
    batch: int = setting(gt=1)
    by_kernel: bool
    energy: bool
    batches: list[int] | None = setting(gt=0)
    chunk: int | None = setting(gt=1, le=32)


@dataclass(kw_only=True)
class Tracking:
    """Weights & Biases: `offline` needs no account and no network."""

    mode: str = setting(choices=("offline", "online", "disabled"))
    project: str = setting(pattern=r"[^/\\#?%:\x00-\x1f]{1,128}", pattern_text="a name without / \\ # ? % :")
    entity: str | None
    group: str | None
    artifacts: bool


@dataclass(kw_only=True)
class Sweeping:
    """What a sweeper such as Optuna is told: see sweep.objective."""

    budget: float = setting(ge=1)


class Part(Protocol):
    """What the object of every group answers. Its class is named by `_target_` and lies above config, hence `Any` below."""

    name: str

    def problems(self, settings: Any) -> list[str]:
        """Lines about settings that can't work together, as far as they show before a model is loaded."""


class DatasetPart(Part, Protocol):
    kind: str  # language, vision or classification

    def load(self, seed: int) -> Any:
        """The splits, a `data.base.Data`."""


class ModelPart(Part, Protocol):
    kind: str

    def load(self, work: Any, data: Any) -> Any:
        """The dense model, a `models.Loaded`."""


class MethodPart(Part, Protocol):
    """methods/base.py says what these do."""

    kinds: ClassVar[tuple[str, ...]]
    operating_point: ClassVar[tuple[str, ...]]

    @property
    def knob(self) -> tuple[str, float, float] | None: ...

    def fit(self, loaded: Any, data: Any, work: Any) -> Any: ...

    def apply(self, module: Any, state: Any, work: Any) -> Any: ...


class HardwarePart(Part, Protocol):
    """hardware.py says what these do."""

    estimate: bool
    devices: int

    def prepare(self) -> None: ...

    def read_back(self) -> dict[str, Any]: ...


@dataclass(kw_only=True)
class Settings:
    """The whole configuration of one run; the group nodes hold the object their `_target_` names."""

    seed: int = setting(ge=0, lt=2**32)
    output_dir: str = setting(pattern=r"[^\x00-\x1f\x7f]+", pattern_text="a folder without control characters")
    force: bool
    share: bool
    fail_fast: bool
    dataset: DatasetPart
    model: ModelPart
    method: MethodPart
    hardware: HardwarePart
    eval: Evaluation
    measure: Measurement
    sweep: Sweeping
    wandb: Tracking


# ---------------------------------------------------------------------------------------------------------------------
# Checking one node


def build_settings(config: dict[str, Any]) -> Settings:
    """The checked settings of one run.

    Raises ConfigError with every problem found: in each node, and in how the nodes fit together.
    """
    cache.provide_compilers()  # torch is about to be imported, and makes a folder of its own where it is told none
    problems: list[str] = []
    settings: Settings = build(config, "", problems, Settings)
    if settings is not None:
        problems += mismatches(settings)
    if problems:
        raise ConfigError(problems)
    return settings


def mismatches(settings: Settings) -> list[str]:
    """Combinations that can't work, as far as they can be told before a model is loaded."""
    model, dataset, method = settings.model, settings.dataset, settings.method
    problems = []
    if dataset.kind != model.kind:
        problems.append(
            f"dataset must hold {model.kind} data for model={model.name}, got {dataset.name} ({dataset.kind} data)"
        )
    if model.kind not in method.kinds:
        problems.append(
            f"method={method.name} takes models of kind {', '.join(method.kinds)}, got model={model.name} ({model.kind})"
        )
    if settings.eval.neurons.enabled and model.kind != "language":
        problems.append(f"eval.neurons.enabled must be false for model={model.name} ({model.kind}), got true")
    if settings.eval.critical.enabled:
        problems += critical_problems(settings)
    for key in ("batches", "chunk"):
        if getattr(settings.measure, key) is not None and model.kind != "language":
            value = getattr(settings.measure, key)
            problems.append(f"measure.{key} must be null for model={model.name} ({model.kind}), got {value}")
    if settings.hardware.devices > 1 and model.kind != "language":
        problems.append(
            f"hardware.devices must be 1 for model={model.name} ({model.kind}), got {settings.hardware.devices}"
        )
    if settings.hardware.estimate and model.kind != "language":
        problems.append(f"hardware.estimate must be false for model={model.name} ({model.kind}), got true")
    if settings.eval.lm_eval.tasks and model.kind != "language":
        problems.append(
            f"eval.lm_eval.tasks must be [] for model={model.name} ({model.kind}), got {settings.eval.lm_eval.tasks}"
        )
    tasks = settings.eval.lm_eval.tasks
    if tasks and model.kind == "language" and importlib.util.find_spec("lm_eval") is None:
        problems.append(f"eval.lm_eval.tasks={','.join(tasks)} needs lm-eval: pip install 'sparsebench[lm-eval]'")
    for part in (model, dataset, method, settings.hardware):
        try:
            problems += part.problems(settings)
        except ValueError as error:  # an input that can't be read is a problem of its setting
            problems.append(" ".join(str(error).split()))
    return problems


def critical_problems(settings: Settings) -> list[str]:
    """Why critical sparsity can't be searched: a method without a knob, a metric of another kind of model."""
    problems, method, metric = [], settings.method, settings.eval.critical.metric
    if method.knob is None:
        problems.append(
            f"eval.critical.enabled needs a method with one number that sets its sparsity without a new fit, got method="
            f"{method.name} with the operating point ({', '.join(method.operating_point)})"
        )
    known = ("perplexity", "next_token") if settings.model.kind == "language" else ("accuracy",)
    if metric is not None and metric not in known:
        problems.append(
            f"eval.critical.metric must be one of {', '.join(known)} or null for model={settings.model.name} "
            f"({settings.model.kind}), got {metric}"
        )
    return problems
