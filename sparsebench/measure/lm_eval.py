"""Zero- and few-shot tasks of lm-eval (an extra), run on the live dense and sparse model: `eval.lm_eval.tasks=[hellaswag,piqa]`.

Nothing is exported: the harness gets the module itself, so what is scored is what the run built. The prompt policy of
the method decides which tokens of a question are sparse, and stands in the protocol beside the harness's version. The
harness pads without telling the model; here only questions of one length share a batch, so that none is padded and the
policy sees real lengths.
"""

from __future__ import annotations

import difflib
import functools
import logging
from importlib.metadata import version
from typing import Any

import numpy as np

log = logging.getLogger(__name__)


def known_tasks(settings: Any) -> Any:
    """The index of a folder's tasks where it holds all that are asked for, else with the harness's own."""
    own = settings.task_path and index(settings.task_path, False)
    if own and all(own.match_tasks([name]) for name in settings.tasks):
        return own
    return index(settings.task_path, True)


@functools.cache
def index(task_path: str | None, defaults: bool) -> Any:
    """An index of tasks; that of the harness's own (`defaults`) reads thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=task_path, include_defaults=defaults)


def problem(settings: Any) -> str | None:
    """The line about tasks that the harness does not know, or None. settings: config.settings.Harness."""
    manager = known_tasks(settings)
    unknown = [name for name in settings.tasks if not manager.match_tasks([name])]
    if not unknown:
        return None
    near = [match for name in unknown for match in difflib.get_close_matches(name, manager.all_tasks, n=1)]
    hint = f" (did you mean {', '.join(near)}?)" if near else ""
    own = "own tasks: eval.lm_eval.task_path=<folder>"
    return f"eval.lm_eval.tasks: lm-eval knows no task {', '.join(unknown)}{hint} ({own})"


def score(module: Any, tokenizer: Any, settings: Any, batch_size: int) -> dict[str, dict]:
    """Every metric of every task, `<task>/<metric>` -> {value, stderr, higher_is_better, shots, version}.

    settings: config.settings.Harness: tasks (names of lm-eval, or of YAML files in task_path) and task_limit (rows per
    task). batch_size: rows per forward pass. `task_mean` is the unweighted mean of the tasks' first metrics where there are several of one
    direction. Raises ValueError for a task the harness does not know.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    manager = known_tasks(settings)
    line = problem(settings)
    if line:
        raise ValueError(line)

    class Unpadded(HFLM):
        """Batches of equal lengths."""

        def _loglikelihood_tokens(self, requests, *args, **kwargs):
            groups: dict[int, list[int]] = {}
            for i, (_, context, continuation) in enumerate(requests):
                groups.setdefault(len(context) + len(continuation), []).append(i)
            answers = [(0.0, False)] * len(requests)
            for places in groups.values():
                scored = super()._loglikelihood_tokens([requests[i] for i in places], *args, **kwargs)
                for i, each in zip(places, scored, strict=True):
                    answers[i] = each
            return answers

    model = Unpadded(pretrained=module, tokenizer=tokenizer, batch_size=batch_size)
    log.info("lm-eval: %s", ", ".join(settings.tasks))
    results = lm_eval.simple_evaluate(
        model=model, tasks=list(settings.tasks), limit=settings.task_limit, task_manager=manager, log_samples=True,
        bootstrap_iters=1000,
    )  # fmt: skip
    scores: dict[str, dict] = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, variant = key.partition(",")
            if not isinstance(value, (int, float)) or metric.endswith("_stderr") or not variant:
                continue
            stderr = values.get(f"{metric}_stderr,{variant}")
            name = f"{task}/{metric}" if variant == "none" else f"{task}/{metric},{variant}"
            scores[name] = {
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
                "higher_is_better": bool(results["higher_is_better"].get(task, {}).get(metric, True)),
                "shots": results["n-shot"].get(task),
                "version": results["versions"].get(task),
                "rows": values_by_row(results["samples"].get(task, []), metric, variant, float(value)),
            }
    firsts = {name.partition("/")[0]: name for name in reversed(scores)}.values()
    if len(firsts) > 1 and len({scores[n]["higher_is_better"] for n in firsts}) == 1:
        mean = sum(scores[n]["value"] for n in firsts) / len(firsts)
        scores["task_mean"] = {
            **scores[next(iter(firsts))],
            "value": mean,
            "stderr": None,
            "version": None,
            "rows": None,
        }
    return scores


def values_by_row(samples: list[dict], metric: str, variant: str, value: float) -> dict[int, float] | None:
    """The metric of each row, by its number in the task; None where `value` is not their mean (e.g. a perplexity)."""
    mine = {s["doc_id"]: s.get(metric) for s in samples if s.get("filter", "none") == variant}
    if not mine or not all(isinstance(v, (bool, int, float, np.number)) for v in mine.values()):
        return None
    rows = {i: float(v) for i, v in mine.items()}
    return rows if abs(sum(rows.values()) / len(rows) - value) < 1e-9 else None


def paired(dense: dict[int, float] | None, sparse: dict[int, float] | None) -> float | None:
    """Standard error of the difference of two means over the same rows; None where rows are not known."""
    if not dense or not sparse or len(dense) < 2:
        return None
    differences = [sparse[i] - each for i, each in dense.items()]
    return float(np.std(differences, ddof=1)) / len(differences) ** 0.5


def compare(dense: dict[str, dict], sparse: dict[str, dict], settings: Any, prompt_policy: str) -> dict:
    """Entries for the record's quality section."""
    return {
        name: {
            "dense": dense[name]["value"],
            "sparse": sparse[name]["value"],
            "dense_stderr": dense[name]["stderr"],
            "sparse_stderr": sparse[name]["stderr"],
            "difference_stderr": paired(dense[name]["rows"], sparse[name]["rows"]),
            "higher_is_better": dense[name]["higher_is_better"],
            "protocol": {
                "harness": f"lm-eval {version('lm-eval')}",
                "tasks": list(settings.tasks),
                "task_version": dense[name]["version"],
                "shots": dense[name]["shots"],
                "limit": settings.task_limit,
                "prompt_policy": prompt_policy,
            },
        }
        for name in dense
    }
