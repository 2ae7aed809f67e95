"""Labelled examples for classifiers, whatever the inputs are: batches, splits that never mix, a stratified rule."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

SPLITS = ("fit", "dev", "test")


@dataclass(frozen=True)
class Labelled:
    """A batch: inputs (a tensor, or a dict of tensors that are the model's keywords) and labels int64 [N]."""

    inputs: Any
    labels: torch.Tensor

    def to(self, device: torch.device | str) -> Labelled:
        inputs = self.inputs
        moved = {k: v.to(device) for k, v in inputs.items()} if isinstance(inputs, dict) else inputs.to(device)
        return Labelled(moved, self.labels.to(device))

    def numel(self) -> int:
        """How many examples it holds."""
        return len(self.labels)


class LabelledSplit(Protocol):
    """One split: what training (`len`, indexing by a tensor of rows) and evaluation (`batches`) need."""

    name: str
    unit: str  # what an example is, plural: images, texts
    classes: int

    def __len__(self) -> int: ...

    def __getitem__(self, rows: torch.Tensor) -> Labelled:
        """The examples for training, augmented where the data set says so."""

    def batches(self, limit: int | None, batch_size: int, device: torch.device) -> Iterator[Labelled]:
        """All examples in order, or `limit` of them as `subset` picks them; never augmented."""

    def fingerprints(self) -> list[str]:
        """A digest of the content of each example."""


@dataclass
class LabelledData:
    """The three splits of one labelled data set."""

    fit: Any
    dev: Any
    test: Any
    classes: list[str]
    info: dict
    kind: str

    def check_disjoint(self) -> None:
        """Prove that no example's content stands in two splits. Raises ValueError naming one that does."""
        seen: dict[str, str] = {}
        for split in (self.fit, self.dev, self.test):
            for row, digest in enumerate(split.fingerprints()):
                other = seen.setdefault(digest, split.name)
                if other != split.name:
                    raise ValueError(f"dataset: example {row} of {split.name} has the same content as one of {other}")

    def describe(self) -> dict:
        """For the record: sizes and a fingerprint of each split."""
        splits = {}
        for split in (self.fit, self.dev, self.test):
            joined = hashlib.sha256("".join(sorted(split.fingerprints())).encode()).hexdigest()
            splits[split.name] = {split.unit: len(split), "fingerprint": joined, **getattr(split, "facts", {})}
        return {**self.info, "classes": len(self.classes), **splits, "disjoint": True}


def relabel(data: LabelledData, numbers: list[int], classes: list[str]) -> None:
    """Give class i of `data` the number numbers[i] among `classes`, in all three splits."""
    splits = (data.fit, data.dev, data.test)
    for store in {id(s): s for s in (getattr(split, "store", split) for split in splits)}.values():
        store.labels = torch.tensor(numbers)[store.labels]
    for split in splits:
        split.classes = len(classes)
    data.classes = classes


def stratified(labels: torch.Tensor, shares: dict[str, float], seed: int = 0) -> dict[str, torch.Tensor]:
    """Row indices per part: each class is cut by the same shares in an order that only `seed` decides.

    labels int64 [N]; shares sum to 1, the last part takes the rest. Returned indices are sorted.
    """
    generator = torch.Generator().manual_seed(seed)
    pieces: dict[str, list] = {name: [] for name in shares}
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        rows, at = rows[torch.randperm(len(rows), generator=generator)], 0
        for i, (name, share) in enumerate(shares.items()):
            end = len(rows) if i == len(shares) - 1 else at + round(share * len(rows))
            pieces[name].append(rows[at:end])
            at = end
    none = torch.empty(0, dtype=torch.int64)
    return {name: torch.cat([none, *parts]).sort().values for name, parts in pieces.items()}


def subset(labels: torch.Tensor, count: int | None, seed: int = 0) -> torch.Tensor:
    """Row indices, sorted, of `count` examples (None = all) in which every class has its share, to within one.

    labels int64 [N]. Which rows is decided by `seed` only; a smaller subset is part of a larger one.
    """
    if count is None or count >= len(labels):
        return torch.arange(len(labels))
    generator, place = torch.Generator().manual_seed(seed), torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        order = torch.randperm(len(rows), generator=generator).double()
        # ranks of a class spread evenly over [0, 1), each class from a start of its own: the lowest places are a
        # sample in proportion
        place[rows] = (order + torch.rand(1, generator=generator, dtype=torch.float64)) / len(rows)
    return place.argsort(stable=True)[:count].sort().values


def unique_rows(fingerprints: list[str], seen: set[str]) -> list[int]:
    """Rows whose content was not met before, in order; `seen` grows. For sets that hold an example twice."""
    kept = []
    for row, digest in enumerate(fingerprints):
        if digest not in seen:
            seen.add(digest)
            kept.append(row)
    return kept
