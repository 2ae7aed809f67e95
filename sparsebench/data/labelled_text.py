"""Labelled texts for encoders that classify: rows of a file with a text and a label, or passages of Python's library.

Texts are tokenised when a tokenizer is set, cut to `max_tokens` and padded to the longest of their batch; the attention
mask says what is padding. Passages of one source file stay in one split, so no neighbour of a test passage is trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsebench.config import NAME_PATTERN, setting
from sparsebench.data import documents
from sparsebench.data.labelled import SPLITS, Labelled, LabelledData, stratified, subset, unique_rows
from sparsebench.data.text import Text


class TextSplit:
    """One split: train.py and evaluate.py read it as they read images."""

    unit = "texts"

    def __init__(self, name: str, texts: list[str], labels: torch.Tensor, classes: int, max_tokens: int):
        self.name, self.texts, self.labels, self.classes, self.max_tokens = name, texts, labels, classes, max_tokens
        self.tokens: list[list[int]] = []

    def set_tokenizer(self, tokenizer: Any, start: int | None) -> None:
        """Token ids of every text; `start` stands before each (None: the tokenizer adds its own)."""
        token_ids = tokenizer(self.texts, add_special_tokens=start is None, truncation=False)["input_ids"]
        first = [] if start is None else [start]
        self.tokens = [(first + ids)[: self.max_tokens] for ids in token_ids]
        self.pad = tokenizer.pad_token_id or 0

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: torch.Tensor) -> Labelled:
        chosen = [self.tokens[i] for i in rows.tolist()]
        ids = torch.full((len(chosen), max(map(len, chosen))), self.pad)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(chosen):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return Labelled({"input_ids": ids, "attention_mask": mask}, self.labels[rows])

    def batches(self, limit: int | None, batch_size: int, device: torch.device) -> Iterator[Labelled]:
        for rows in subset(self.labels, limit).split(batch_size):
            yield self[rows].to(device)

    def lengths(self, limit: int | None) -> torch.Tensor:
        """Tokens of each text that `batches(limit, ...)` gives, padding left out; float64."""
        return torch.tensor([len(self.tokens[i]) for i in subset(self.labels, limit).tolist()], dtype=torch.float64)

    def fingerprints(self) -> list[str]:
        return [hashlib.sha256(text.encode()).hexdigest() for text in self.texts]


class TextsData(LabelledData):
    """The three splits."""

    def set_tokenizer(self, tokenizer: Any, start: int | None) -> None:
        for split in (self.fit, self.dev, self.test):
            split.set_tokenizer(tokenizer, start)


@dataclass(kw_only=True)
class Texts:
    """A labelled text data set; `source` says where its rows come from."""

    name: str = setting(**NAME_PATTERN)
    source: str = setting(choices=("pystdlib", "file"))
    path: str | None = setting(file="text")
    text_field: str
    label_field: str
    max_tokens: int = setting(gt=1)
    num_classes: int | None = setting(gt=1)
    per_class: int | None = setting(gt=2)
    passage: int = setting(gt=0)
    dev_share: float = setting(gt=0, lt=1)
    test_share: float = setting(gt=0, lt=1)
    kind = "classification"

    def __post_init__(self):
        if self.dev_share + self.test_share >= 1:
            raise ValueError(f"test_share must be below 1 - dev_share = {1 - self.dev_share:g}, got {self.test_share}")

    def problems(self, settings: Any) -> list[str]:
        if self.source == "file" and (
            self.path is None or not Path(self.path).is_file() or documents.kind(Path(self.path)) not in documents.ROWS
        ):
            return [f"dataset.path must be a {', '.join(documents.ROWS)} file with texts and labels, got {self.path!r}"]
        if self.source == "pystdlib" and self.path is not None and not Path(self.path).is_dir():
            return [f"dataset.path must be another Python's library folder, got {self.path!r}"]
        return []

    def load(self, seed: int) -> TextsData:
        """Read and split; the split never depends on `seed`. Equal texts are kept once.

        Raises ValueError where the file can't be read, has no such fields or fewer than two classes.
        """
        rows = self.passages() if self.source == "pystdlib" else self.rows()
        rows = [rows[i] for i in unique_rows([text for text, _, _ in rows], set())]
        counts: dict[str, int] = {}
        for _, label, _ in rows:
            counts[label] = counts.get(label, 0) + 1
        classes = sorted(sorted(counts, key=lambda c: (-counts[c], c))[: self.num_classes])
        if len(classes) < 2:
            raise ValueError(
                f"dataset={self.name}: at least two classes are needed, got {', '.join(classes) or 'none'}"
            )
        groups = sorted({(label, group) for _, label, group in rows if label in classes})
        shares = {"fit": 1 - self.dev_share - self.test_share, "dev": self.dev_share, "test": self.test_share}
        parts = stratified(torch.tensor([classes.index(label) for label, _ in groups]), shares)
        split_of = {groups[i]: name for name, part in parts.items() for i in part.tolist()}
        splits = {}
        for name in SPLITS:
            mine = [(text, label) for text, label, group in rows if split_of.get((label, group)) == name]
            mine = self.limited(mine, round(self.per_class * shares[name]) if self.per_class else None)
            if not mine:
                raise ValueError(f"dataset={self.name}: no text for the {name} split")
            labels = torch.tensor([classes.index(label) for _, label in mine])
            splits[name] = TextSplit(name, [text for text, _ in mine], labels, len(classes), self.max_tokens)
        info = {
            "name": self.name, "source": self.path or self.source, "max_tokens": self.max_tokens, "labels": classes,
            "augment": "none", "split_rule": f"stratified by class, whole groups (files, or rows): {shares}",
        }  # fmt: skip
        return TextsData(**splits, classes=classes, info=info, kind=self.kind)

    @staticmethod
    def limited(rows: list[tuple[str, str]], count: int | None) -> list[tuple[str, str]]:
        """At most `count` rows of each label, in an order that only their content decides."""
        rows = sorted(rows, key=lambda r: hashlib.sha256(r[0].encode()).digest())
        seen: dict[str, int] = {}
        kept = []
        for text, label in rows:
            seen[label] = seen.get(label, 0) + 1
            if count is None or seen[label] <= count:
                kept.append((text, label))
        return kept

    def passages(self) -> list[tuple[str, str, str]]:
        """(text, package, file): runs of `passage` non-empty lines of the packages' files; 5 files at least."""
        fields = {"revision": None, "bos": "none", "hub_id": None, "hub_config": None, "hub_files": None}
        library = Text(
            name="pystdlib", source="pystdlib", path=self.path, sequence_length=8, text_field="text", max_documents=None,
            **fields,
        )  # fmt: skip
        modules = [d for part in library.from_pystdlib().values() for d in part if "/" in d.key]
        files: dict[str, int] = {}
        for document in modules:
            package = document.key.partition("/")[0]
            files[package] = files.get(package, 0) + 1
        passages = []
        for document in modules:
            package = document.key.partition("/")[0]
            lines = [line for line in document.text.splitlines() if line.strip()]
            whole = len(lines) // self.passage * self.passage if files[package] >= 5 else 0
            passages += [
                ("\n".join(lines[i : i + self.passage]), package, document.key) for i in range(0, whole, self.passage)
            ]
        return passages

    def rows(self) -> list[tuple[str, str, str]]:
        """(text, label, own group) of a file's rows; those without text or label are left out. A label is text or a number."""
        fields = {"text_field": self.text_field, "label_field": self.label_field}
        pairs = []
        file = Path(self.path)
        for number, (text, label) in enumerate(documents.rows(file, fields, documents.Budget())):
            if text and label is not None:
                named = str(label) if isinstance(label, (bool, int, float)) else label
                where = f"row {number} of {file}"
                pairs.append((
                    documents.text_of(text, f"dataset.text_field={self.text_field}", where),
                    documents.text_of(named, f"dataset.label_field={self.label_field}", where), str(number),
                ))  # fmt: skip
        return pairs
