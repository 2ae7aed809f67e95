"""Zero- and few-shot tasks of lm-eval (an extra), run on the live dense and sparse model: `eval.lm_eval.tasks=[hellaswag,piqa]`.

Nothing is exported: the harness gets the module itself, so what is scored is what the run built. The prompt policy of
the method decides which tokens of a question are sparse, and stands in the protocol beside the harness's version.
"""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Any

log = logging.getLogger(__name__)


def score(module: Any, tokenizer: Any, settings: Any, batch_size: int) -> dict[str, dict]:
    """Every metric of every task, `<task>/<metric>` -> {value, stderr, higher_is_better, shots, version}.

    settings: config.settings.Harness: tasks (names of lm-eval, or of YAML files in task_path) and task_limit (rows per
    task). batch_size: rows per forward pass. `task_mean` is the unweighted mean of the tasks' first metrics where there are several of one
    direction. Raises ValueError for a task the harness does not know.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=settings.task_path)
    unknown = [name for name in settings.tasks if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(
            f"eval.lm_eval.tasks: lm-eval knows no task {', '.join(unknown)} (own tasks: eval.lm_eval.task_path=<folder>)"
        )
    model = HFLM(pretrained=module, tokenizer=tokenizer, batch_size=batch_size)
    log.info("lm-eval: %s", ", ".join(settings.tasks))
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(settings.tasks), limit=settings.task_limit, task_manager=manager, log_samples=False,
        bootstrap_iters=1000,
    )  # fmt: skip
    scores: dict[str, dict] = {}
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, variant = key.partition(",")
            if not isinstance(value, (int, float)) or metric.endswith("_stderr") or not variant:
                continue
            stderr = values.get(f"{metric}_stderr,{variant}")
            name = f"{task}/{metric}" if variant == "none" else f"{task}/{metric},{variant}"
            scores[name] = {
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
                "higher_is_better": bool(found["higher_is_better"].get(task, {}).get(metric, True)),
                "shots": found["n-shot"].get(task),
                "version": found["versions"].get(task),
            }
    firsts = {name.partition("/")[0]: name for name in reversed(scores)}.values()
    if len(firsts) > 1 and len({scores[n]["higher_is_better"] for n in firsts}) == 1:
        mean = sum(scores[n]["value"] for n in firsts) / len(firsts)
        scores["task_mean"] = {**scores[next(iter(firsts))], "value": mean, "stderr": None, "version": None}
    return scores


def compare(dense: dict[str, dict], sparse: dict[str, dict], settings: Any, prompt_policy: str) -> dict:
    """Entries for the record's quality section."""
    return {
        name: {
            "dense": dense[name]["value"],
            "sparse": sparse[name]["value"],
            "dense_stderr": dense[name]["stderr"],
            "sparse_stderr": sparse[name]["stderr"],
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
