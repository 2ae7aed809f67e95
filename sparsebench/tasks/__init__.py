"""Tasks: what is measured for a kind of model and data. One file per kind, all with the contract of `base`."""

from __future__ import annotations

from sparsebench.tasks.base import Task


def load(kind: str) -> Task:
    """The task of a kind: `language`, `vision` or `classification` (texts)."""
    from sparsebench.tasks.image_classification import ImageClassification
    from sparsebench.tasks.language_modeling import LanguageModeling
    from sparsebench.tasks.text_classification import TextClassification

    return {task.kind: task() for task in (LanguageModeling, ImageClassification, TextClassification)}[kind]
