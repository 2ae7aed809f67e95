"""Data and tokenizer read once before the run, where that is quick: what would stop it after minutes is said at once.

Data of up to SMALL bytes is loaded as the run will load it, so every line is the reader's own. Of language models the
tokenizer is tried on it, too: whether the text is long enough is known in tokens only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsebench.config import digests, inputs
from sparsebench.measure import lm_eval

SMALL = 32 << 20  # bytes of data that are read [choice: about a second]
LONG = 8192  # tokens that any split of Python's own library holds; it is read here for longer ones only
answered: dict[tuple, list[str]] = {}  # lines by what they depend on: a sweep asks the same of many runs


def read(dataset: Any, seed: int) -> tuple[Any | None, list[str]]:
    """(the data, nothing) of a data set on this disk that is small, else (None, why it can't be read, in one line).

    A folder in which nothing is to be read is small, too.
    """
    if getattr(dataset, "path", None) is None or sum(file.stat().st_size for file in files_of(dataset)) > SMALL:
        return None, []
    try:
        data = dataset.load(seed)
        data.check_disjoint()
    except (ValueError, OSError) as error:
        return None, [one_line(error)]
    return data, []


def files_of(dataset: Any) -> list[Path]:
    """What a data set's `path` stands for; nothing where it is downloaded or comes with a library."""
    kind = inputs.file_fields(f"{type(dataset).__module__}.{type(dataset).__qualname__}").get("path")
    path = getattr(dataset, "path", None)
    return list(inputs.read_files(path, kind, vars(dataset)).values()) if kind and path else []


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def language(settings: Any) -> list[str]:
    """Lines about a causal language model, its text and the tasks of lm-eval."""
    parts = (settings.dataset, settings.model, settings.measure, settings.eval.lm_eval)
    key = (*map(repr, parts), *map(digests.stamp, files_of(settings.dataset)))
    if key not in answered:
        problems = text_problems(settings)
        problem = lm_eval.problem(settings.eval.lm_eval) if settings.eval.lm_eval.tasks else None
        answered[key] = problems + [problem] * bool(problem)
    return answered[key]


def text_problems(settings: Any) -> list[str]:
    """Lines about text that can't be read, is too short, or does not fit the tokenizer."""
    model, dataset, measured = settings.model, settings.dataset, settings.measure
    length = getattr(dataset, "sequence_length", 0)
    asked = {"measure.context": measured.context + 1, "measure.prompt": measured.prompt} if measured.latency else {}
    if measured.latency and measured.batches:  # texts that begin at a token of their own each
        asked["measure.batches"] = max(measured.batches) + measured.context + 2
    needed = max([length, *asked.values()])
    if getattr(dataset, "source", None) == "pystdlib" and dataset.path is None and needed > LONG:
        data, problems = dataset.load(settings.seed), []
    else:
        data, problems = read(dataset, settings.seed)
    if data is None or model.weights == "scratch" or not os.path.isdir(model.tokens_from):
        return problems
    try:
        with one_thread():
            data.set_tokenizer(model.tokenizer(model.tokens_from, model.config(), data))
            held = data.test.sequences(-(-(needed + 1) // length)).numel()
    except ValueError as error:
        return [one_line(error)]
    return [
        f"{key} must fit the test split of dataset={dataset.name}, which holds {held} tokens in whole windows, "
        f"got {getattr(measured, key.partition('.')[2])}"
        for key, length in asked.items()
        if length > held
    ]


@contextmanager
def one_thread() -> Iterator[None]:
    """Tokenizers without threads of their own, which would not survive the fork of the run's process."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ.update({name: before} if before is not None else {})
