"""From a composed configuration (compose.py) to checked objects, all errors at once.

Nothing here imports torch: `--help`, `--cfg job`, completion and the answer from a finished record stay instant.
The classes named by `_target_` are imported only by `build`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import re
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from sparsebench import shape_bias


class ConfigError(ValueError):
    """What is wrong with a configuration: one line per problem, all problems of the run together."""

    def __init__(self, problems: list[str]):
        self.problems = list(dict.fromkeys(problems))
        super().__init__("\n".join(self.problems))


def setting(*, choices=None, ge=None, gt=None, le=None, lt=None, pattern=None, pattern_text=None) -> Any:
    """A dataclass field whose allowed values are stated beside it and checked by `build`.

    `choices`, the bounds and `pattern` (a full-match regular expression, described by `pattern_text`) apply to the
    value, or to each element of a list.
    """
    return field(
        metadata={"choices": choices, "ge": ge, "gt": gt, "le": le, "lt": lt, "pattern": pattern, "text": pattern_text}
    )


NAME_PATTERN = {"pattern": r"[A-Za-z0-9][A-Za-z0-9._-]*", "pattern_text": "a name of letters, digits, '.', '_' and '-'"}


@dataclass(kw_only=True)
class NeuronMetrics:
    """Zeros of x1, unions over tokens, CETT and PPL-p% (sparsebench/neurons.py)."""

    enabled: bool
    increase: float = setting(ge=0)
    tokens: int = setting(gt=0)
    aggregate: list[int] = setting(gt=0)


@dataclass(kw_only=True)
class Evaluation:
    """What is evaluated on the held-out split."""

    test_sequences: int | None = setting(gt=0)
    dev_sequences: int | None = setting(gt=0)
    batch_size: int = setting(gt=0)
    test_examples: int | None = setting(gt=0)
    examples_per_batch: int = setting(gt=0)
    cue_conflict: str | None
    neurons: NeuronMetrics
    tasks: list[str]
    task_limit: int | None = setting(gt=0)
    task_path: str | None

    def __post_init__(self):
        if self.tasks and importlib.util.find_spec("lm_eval") is None:
            raise ValueError(f"tasks={','.join(self.tasks)} needs lm-eval: pip install 'sparsebench[lm-eval]'")
        wrong = self.cue_conflict is not None and shape_bias.problem(self.cue_conflict)
        if wrong:
            raise ValueError(f"cue_conflict must be a folder of cue-conflict images: {wrong}")
        if self.task_path is not None and not Path(self.task_path).is_dir():
            raise ValueError(f"task_path must be a folder with task files of lm-eval, got {self.task_path!r}")


@dataclass(kw_only=True)
class Measurement:
    """How latency is measured (the engine itself is a property of the hardware target)."""

    latency: bool
    samples: int = setting(ge=30)
    warmup: int = setting(ge=3)
    context: int = setting(gt=0)
    prompt: int = setting(gt=1)
    batch: int = setting(gt=1)


@dataclass(kw_only=True)
class Tracking:
    """Weights & Biases: `offline` needs no account and no network."""

    mode: str = setting(choices=("offline", "online", "disabled"))
    project: str
    entity: str | None
    group: str | None
    artifacts: bool


@dataclass(kw_only=True)
class Sweeping:
    """What a sweeper such as Optuna is told: see sweep.objective."""

    budget: float = setting(ge=1)


@dataclass(kw_only=True)
class Settings:
    """The whole configuration of one run; the group nodes hold the object their `_target_` names."""

    seed: int = setting(ge=0, lt=2**32)
    output_dir: str
    force: bool
    fail_fast: bool
    dataset: Any
    model: Any
    method: Any
    hardware: Any
    eval: Evaluation
    measure: Measurement
    sweep: Sweeping
    wandb: Tracking


# ---------------------------------------------------------------------------------------------------------------------
# Checking one node


def expected(hint: Any, meta: dict) -> str:
    """Words for what a field accepts, e.g. `a number in [0, 1)`, `one of none, half, p99, all`."""
    hints = [h for h in (get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)) if h is not NoneType]
    base = hints[0] if hints else hint
    if get_origin(base) is list:
        text = "a list, each element " + expected(get_args(base)[0], meta)
    elif meta.get("choices"):
        text = "one of " + ", ".join(str(c) for c in meta["choices"])
    elif meta.get("pattern"):
        text = meta["text"]
    else:
        text = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}.get(
            get_origin(base) or base, "a value"
        )
        low = meta.get("ge") if meta.get("ge") is not None else meta.get("gt")
        high = meta.get("le") if meta.get("le") is not None else meta.get("lt")
        if low is not None and high is not None:
            text += f" in {'[' if meta.get('ge') is not None else '('}{low}, {high}{']' if meta.get('le') is not None else ')'}"
        elif low is not None:
            text += f" {'>=' if meta.get('ge') is not None else '>'} {low}"
        elif high is not None:
            text += f" {'<=' if meta.get('le') is not None else '<'} {high}"
    return text + (" or null" if NoneType in get_args(hint) else "")


def convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`; raises ValueError where it is of another type. No silent truncation."""
    if get_origin(hint) in (Union, UnionType):
        if value is None and NoneType in get_args(hint):
            return None
        problems = []
        for option in (h for h in get_args(hint) if h is not NoneType):
            try:
                return convert(value, option)
            except ValueError as problem:
                problems.append(problem)
        raise problems[0]
    if hint is Any:
        return value
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ValueError("not a list")
        return [convert(v, get_args(hint)[0]) for v in value]
    kind = get_origin(hint) or hint
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"not {kind.__name__}")
    return value


def in_bounds(value: Any, meta: dict) -> bool:
    if isinstance(value, list):
        return all(in_bounds(v, meta) for v in value)
    if value is None:
        return True
    if meta.get("choices") is not None and value not in meta["choices"]:
        return False
    if meta.get("pattern") is not None and not re.fullmatch(meta["pattern"], str(value)):
        return False
    checks = {"ge": lambda a, b: a >= b, "gt": lambda a, b: a > b, "le": lambda a, b: a <= b, "lt": lambda a, b: a < b}
    return all(meta.get(name) is None or check(value, meta[name]) for name, check in checks.items())


def build(node: dict, key: str, problems: list[str], cls: type | None = None) -> Any:
    """The object a config node describes, or None with lines added to `problems`.

    `cls` defaults to the class that `_target_` names; its dataclass fields are exactly the keys allowed.
    """
    prefix = f"{key}." if key else ""
    if not isinstance(node, dict):
        problems.append(f"{key} must be a mapping of settings, got {node!r}")
        return None
    if cls is None:
        target = str(node.get("_target_"))
        try:
            module, _, name = target.rpartition(".")
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            problems.append(f"{prefix}_target_ must name a class that can be imported, got {target!r} ({error})")
            return None
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    found = len(problems)
    for name in node:
        if name not in fields and name != "_target_":
            problems.append(unknown_key(f"{prefix}{name}", fields))
    values = {}
    for name, spec in fields.items():
        full, hint, meta = f"{prefix}{name}", hints[name], spec.metadata
        if name not in node:
            if spec.default is MISSING and spec.default_factory is MISSING:
                problems.append(f"{full} is missing: it must be {expected(hint, meta)}")
            continue
        nested = [h for h in (get_args(hint) or (hint,)) if dataclasses.is_dataclass(h)]
        if node[name] is not None and (nested or hint is Any):
            values[name] = build(node[name], full, problems, nested[0] if nested else None)
            continue
        try:
            values[name] = convert(node[name], hint)
        except ValueError:
            problems.append(f"{full} must be {expected(hint, meta)}, got {node[name]!r}")
            continue
        if not in_bounds(values[name], meta):
            problems.append(f"{full} must be {expected(hint, meta)}, got {node[name]!r}")
    if len(problems) > found:
        return None
    try:
        return cls(**values)
    except ValueError as error:  # a check across fields, in the class's __post_init__; one line per problem
        problems.extend(f"{prefix}{line}" for line in str(error).splitlines())
        return None


def unknown_key(full: str, allowed) -> str:
    """The line for a key that does not exist, with the nearest allowed one first."""
    name = full.rpartition(".")[2]
    near = difflib.get_close_matches(name, list(allowed), n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{full} is not a known key{hint}; allowed: {', '.join(sorted(allowed))}"


def build_settings(config: dict) -> Settings:
    """The checked settings of one run.

    Raises ConfigError with every problem found: in each node, and in how the nodes fit together.
    """
    problems: list[str] = []
    settings = build(config, "", problems, Settings)
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
    if settings.hardware.estimate and model.kind != "language":
        problems.append(f"hardware.estimate must be false for model={model.name} ({model.kind}), got true")
    if settings.eval.tasks and model.kind != "language":
        problems.append(f"eval.tasks must be [] for model={model.name} ({model.kind}), got {settings.eval.tasks}")
    for part in (model, dataset, method, settings.hardware):
        problems += part.problems(settings)
    return problems
