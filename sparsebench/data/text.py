"""Text for language models: documents from a source, split into fit, dev and test, cut into windows of tokens.

fit is for training and calibration, dev for choices (thresholds, early decisions), test is only ever scored. A
document belongs to one split; documents with equal content are kept once, so no text stands in two splits.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsebench.config import NAME_PATTERN, digests, setting
from sparsebench.config.identity import digest
from sparsebench.data import documents as files
from sparsebench.data import hub

SPLITS = ("fit", "dev", "test")
log = logging.getLogger(__name__)
LONG = 20_000_000  # characters that take a tokenizer tens of seconds
BATCH = 16  # documents that are turned into tokens at once
TEST_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
LINE_END = re.compile("\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")  # as str.splitlines has them
ARTICLE = re.compile(r"^ = [^=].* = $", re.MULTILINE)  # WikiText's article headings


@dataclass(frozen=True)
class Document:
    """One document: where it came from and its text."""

    key: str
    text: str

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


class Split:
    """Documents of one split and, once a tokenizer is set, their windows of tokens.

    Tokens are made only as far as they are asked for. The order of fit documents depends on the seed (which rows
    calibrate), that of dev and test never changes.
    """

    def __init__(self, name: str, documents: list[Document], sequence_length: int, bos: str, seed: int):
        order = seed if name == "fit" else 0
        self.name, self.sequence_length, self.bos = name, sequence_length, bos
        self.documents = sorted(documents, key=lambda d: hashlib.sha256(f"{order}:{d.key}".encode()).digest())
        self.tokenizer: Any = None
        self.store: Any = None  # of tokens that other runs made (records/shared.py)
        self._tokens: list[int] = []
        self._used = 0  # documents turned into tokens so far
        self._ends: list[int] = []  # where each of them ends among the tokens

    def sequences(self, limit: int | None = None) -> torch.Tensor:
        """The first `limit` windows (None = all), int64 [N, sequence_length]; N is less where the text is short."""
        body = self.sequence_length - (1 if self.bos == "window" else 0)
        self.tokenise(math.inf if limit is None else limit * body)
        count = len(self._tokens) // body
        count = count if limit is None else min(count, limit)
        if count == 0:
            raise ValueError(
                f"dataset: the {self.name} split holds {len(self._tokens)} tokens, fewer than one sequence of "
                f"dataset.sequence_length={self.sequence_length}"
            )
        windows = torch.tensor(self._tokens[: count * body]).view(count, body)
        if self.bos == "window":
            windows = torch.cat([torch.full((count, 1), self.tokenizer.bos_token_id), windows], dim=1)
        return windows

    def tokenise(self, count: float) -> None:
        """Turn documents into tokens until there are `count` or no more; what an earlier run kept is not done again."""
        if self._used == len(self.documents) or len(self._tokens) >= count:
            return
        told = (
            self.store and getattr(self.tokenizer, "backend_tokenizer", None) is not None
        )  # of others nothing says it
        with self.store.held("tokens", self.decided_by) if told else nullcontext() as path:
            entry = self.store.read(path) if path else None
            known = entry[0] if entry else {"tokens": torch.empty(0), "ends": torch.empty(0, dtype=torch.int32)}
            self.take(known["tokens"], known["ends"].tolist(), count)
            made = False
            left = sum(len(document.text) for document in self.documents[self._used :])
            if left > LONG and len(self._tokens) < count:
                log.info("turning text into tokens, of up to %d million characters", left // 1_000_000)
            while self._used < len(self.documents) and len(self._tokens) < count:
                made = True
                batch = self.documents[self._used : self._used + BATCH]
                encoded = self.tokenizer([d.text for d in batch], add_special_tokens=False, return_attention_mask=False)
                for ids in encoded["input_ids"]:
                    self._tokens += ([self.tokenizer.bos_token_id] if self.bos == "document" else []) + ids
                    self._ends.append(len(self._tokens))
                self._used += len(batch)
            if path and made:
                held = {"tokens": self._tokens, "ends": self._ends}
                self.store.keep(path, {k: torch.tensor(v, dtype=torch.int32) for k, v in held.items()})

    def take(self, tokens: torch.Tensor, ends: list[int], count: float) -> None:
        """Go on with tokens that are known, by as many documents as would have been turned into tokens here."""
        while self._used < len(ends) and len(self._tokens) < count:
            used = min(self._used + BATCH, len(ends))
            self._tokens += tokens[len(self._tokens) : ends[used - 1]].tolist()
            self._ends += ends[self._used : used]
            self._used = used

    def decided_by(self) -> dict:
        """What decides the tokens beside the program: the documents in their order, the tokenizer as it works, BOS."""
        kind = type(self.tokenizer)
        return {
            "documents": digest([document.fingerprint for document in self.documents]),
            "tokenizer": [kind.__module__, kind.__qualname__, self.tokenizer.bos_token_id],
            "rules": digest(self.tokenizer.backend_tokenizer.to_str()),
            "bos": self.bos,
        }

    def scored_documents(self, count: int) -> torch.Tensor:
        """The number of the document that each scored token of the first `count` windows is of, [count, T - 1].

        Every token but a window's first is scored; a BOS put before a window is nobody's.
        """
        body = self.sequence_length - (1 if self.bos == "window" else 0)
        places = torch.arange(count * body).view(count, body)
        places = places if self.bos == "window" else places[:, 1:].contiguous()
        return torch.searchsorted(torch.tensor(self._ends), places, right=True)

    def describe(self) -> dict:
        """For the record: how much of the split was used, and a fingerprint of the documents."""
        prints = hashlib.sha256("".join(sorted(d.fingerprint for d in self.documents)).encode()).hexdigest()
        return {
            "documents": len(self.documents),
            "documents_tokenised": self._used,
            "characters": sum(len(d.text) for d in self.documents),
            "fingerprint": prints,
        }


@dataclass
class TextData:
    """The three splits of one data set."""

    fit: Split
    dev: Split
    test: Split
    info: dict
    kind = "language"

    def set_tokenizer(self, tokenizer: Any, store: Any = None) -> None:
        for split in (self.fit, self.dev, self.test):
            split.tokenizer, split.store = tokenizer, store

    def check_disjoint(self) -> None:
        """Prove that no document stands in two splits. Raises ValueError naming one that does."""
        seen: dict[str, str] = {}
        for split in (self.fit, self.dev, self.test):
            for document in split.documents:
                other = seen.setdefault(document.fingerprint, split.name)
                if other != split.name:
                    raise ValueError(f"dataset: {document.key} of {split.name} has the same text as one of {other}")

    def describe(self) -> dict:
        splits = {s.name: s.describe() for s in (self.fit, self.dev, self.test)}
        return {**self.info, **splits, "disjoint": True}


@dataclass(kw_only=True)
class Text:
    """A text data set; `source` says how documents are found."""

    name: str = setting(**NAME_PATTERN)
    source: str = setting(choices=("pystdlib", "wikitext", "hub", "files"))
    path: str | None = setting(file="text")
    revision: str | None
    sequence_length: int = setting(ge=8)
    bos: str = setting(choices=("none", "document", "window"))
    hub_id: str | None
    hub_config: str | None
    hub_files: str | None
    text_field: str
    max_documents: int | None = setting(gt=0)
    kind = "language"

    def problems(self, settings: Any) -> list[str]:
        if self.path is not None and not Path(self.path).exists():
            return [f"dataset.path must be an existing file or folder, got {self.path!r}"]
        if self.source == "files" and self.path is None:
            return [
                f"dataset.path must name a file or folder of text, jsonl, json, csv or parquet for dataset={self.name}, got null"
            ]
        problem = hub.dataset_problem(self) if self.source in ("wikitext", "hub") and self.path is None else None
        if problem:
            instead = "folder with valid.txt and test.txt" if self.source == "wikitext" else "local file"
            return [f"dataset={self.name}: {problem}; set dataset.path=<{instead}>"]
        return []

    def load(self, seed: int) -> TextData:
        """Read and split the documents; equal documents are kept once (the first in fit, dev, test order).

        Raises ValueError where a file is not text or a split stays empty.
        """
        documents = getattr(self, f"from_{self.source}")()
        splits, seen, repeated = {}, set(), 0
        for name in SPLITS:
            unique = []
            for document in documents[name]:
                if document.fingerprint in seen or not document.text.strip():
                    repeated += 1
                    continue
                seen.add(document.fingerprint)
                unique.append(document)
            if not unique:
                raise ValueError(f"dataset={self.name}: no text for the {name} split in {self.path or self.source}")
            splits[name] = Split(name, unique, self.sequence_length, self.bos, seed)
        info = {
            "name": self.name,
            "revision": self.revision or self.hub_config,
            "source": self.path or self.hub_id or self.source,
            "sequence_length": self.sequence_length,
            "stride": self.sequence_length,
            "bos": self.bos,
            "repeated_documents_left_out": repeated,
            "split_rule": SPLIT_RULES[self.source],
        }
        return TextData(**splits, info=info)

    def from_pystdlib(self) -> dict[str, list[Document]]:
        """The running Python's standard library (or the one in `path`), tests left out; split by a hash of the path."""
        root = Path(self.path or sysconfig.get_path("stdlib"))
        documents: dict[str, list[Document]] = {name: [] for name in SPLITS}
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(f for f in folders if f not in TEST_FOLDERS)
            for name in sorted(n for n in names if n.endswith(".py")):
                file = Path(folder, name)
                key = file.relative_to(root).as_posix()
                share = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 100
                split = "fit" if share < 90 else "dev" if share < 95 else "test"
                documents[split].append(Document(key, file.read_text(encoding="utf-8", errors="replace")))
        return documents

    def from_wikitext(self) -> dict[str, list[Document]]:
        """WikiText articles. Where there is no training text (only valid and test), dev is the last tenth of valid."""
        if self.path is None:
            rows = {n: "".join(hub.dataset_rows(self, n)) for n in ("train", "validation", "test")}
            texts = {"fit": rows["train"], "dev": rows["validation"], "test": rows["test"]}
        else:
            folder = Path(self.path)
            parts = {
                n: next((folder / f for f in names if (folder / f).exists()), None) for n, names in WIKI_FILES.items()
            }
            missing = [WIKI_FILES[n][0] for n in ("dev", "test") if parts[n] is None]
            if missing:
                raise ValueError(f"dataset.path={self.path} must hold {' and '.join(missing)}")
            texts = {n: files.read_text(f) for n, f in parts.items() if f is not None}
        documents = {n: articles(t, n) for n, t in texts.items()}
        if "fit" not in documents:
            cut = max(1, len(documents["dev"]) * 9 // 10)
            documents["fit"], documents["dev"] = documents["dev"][:cut], documents["dev"][cut:]
        return documents

    def from_hub(self) -> dict[str, list[Document]]:
        """A data set of the Hub (or the same rows in a local file): fit from `train`, dev and test from `validation`.

        A set with `train` only is cut by position: the first 80 % fit, then 10 % dev and 10 % test.
        """
        if self.path is not None:
            return self.from_files()
        splits = hub.dataset_splits(self)
        return by_split({
            name: hub.dataset_rows(self, name, self.max_documents) for name in ("train", "validation") if name in splits
        })  # fmt: skip

    def from_files(self) -> dict[str, list[Document]]:
        """A file of text or rows (documents.py), a folder of such, or one of `datasets.save_to_disk`, with splits as on the
        Hub; else cut by position: 80 % fit, 10 % dev, 10 % test. Files stand in the order of their content's digests:
        names decide nothing."""
        path = Path(self.path)
        if path.is_dir() and files.is_saved(path):
            return by_split(
                {n: islice(texts, self.max_documents) for n, texts in files.saved(path, self.text_field).items()}
            )
        paths = [p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")] if path.is_dir() else [path]
        named = dict(zip(paths, digests.of_files(paths), strict=True)) if len(paths) > 1 else {path: ""}
        documents = islice(self.from_each(sorted(paths, key=named.get)), self.max_documents)
        return by_position(list(documents))

    def from_each(self, paths: list[Path]) -> Iterator[Document]:
        budget = files.Budget()
        for number, file in enumerate(paths):
            rows = files.kind(file) in files.ROWS
            texts = files.texts(file, self.text_field, budget) if rows else chunks(files.read_text(file, budget))
            yield from (Document(f"{number}:{i}", text) for i, text in enumerate(texts))


WIKI_FILES = {
    "fit": ("train.txt", "wiki.train.raw", "wiki.train.tokens"),
    "dev": ("valid.txt", "wiki.valid.raw", "wiki.valid.tokens"),
    "test": ("test.txt", "wiki.test.raw", "wiki.test.tokens"),
}
SPLIT_RULES = {
    "pystdlib": "sha256(file path) mod 100: below 90 fit, below 95 dev, else test",
    "wikitext": "the set's own splits; without train.txt, the first nine tenths of valid's articles are fit, the rest dev",
    "hub": "train is fit, validation is halved into dev and test; train alone is cut 80/10/10 by position",
    "files": "by position: first 80 % fit, next 10 % dev, last 10 % test; files in the order of their content's digests",
}


def by_split(texts: dict[str, Iterable[str]]) -> dict[str, list[Document]]:
    """fit from `train`, dev and test from the halves of `validation`; `train` alone is cut by position."""
    if "train" not in texts:
        raise ValueError(f"dataset: a split named train is needed, got {', '.join(texts) or 'none'}")
    train = as_documents(texts["train"], "train")
    if "validation" not in texts:
        return by_position(train)
    held_out = as_documents(texts["validation"], "validation")
    return {"fit": train, "dev": held_out[: len(held_out) // 2], "test": held_out[len(held_out) // 2 :]}


def as_documents(texts: Iterable[str], prefix: str) -> list[Document]:
    return [Document(f"{prefix}:{i}", text) for i, text in enumerate(texts)]


def by_position(documents: list[Document]) -> dict[str, list[Document]]:
    """80/10/10 in order, with at least one document in each where there are three."""
    n = len(documents)
    if n < 3:
        raise ValueError(f"dataset: {n} document(s) can't be split into fit, dev and test; at least 3 are needed")
    tenth = max(1, n // 10)
    return {
        "fit": documents[: n - 2 * tenth],
        "dev": documents[n - 2 * tenth : n - tenth],
        "test": documents[n - tenth :],
    }


def chunks(text: str, size: int = 4096) -> list[str]:
    """Consecutive pieces of about `size` characters (less for a short text, so that there are some thirty), cut between
    paragraphs where there are enough of them and between lines otherwise. Joined again they are the text."""
    size = min(size, max(1, len(text) // 30))
    paragraphs = re.compile(r"(?<=\n\n)")
    few = len(list(islice(paragraphs.finditer(text), 30))) < 29
    joined, start = [], 0
    for cut in (LINE_END if few else paragraphs).finditer(text):
        if cut.end() - start >= size:
            joined.append(text[start : cut.end()])
            start = cut.end()
    return joined + [text[start:]] * bool(text[start:].strip())


def articles(text: str, split: str) -> list[Document]:
    """WikiText's articles: from one top-level heading to the next."""
    starts = [m.start() for m in ARTICLE.finditer(text)] or [0]
    ends = [*starts[1:], len(text)]
    return [Document(f"{split}:{i}", text[a:b]) for i, (a, b) in enumerate(zip(starts, ends, strict=True))]


def batches(sequences: torch.Tensor, batch_size: int, module: nn.Module) -> Iterator[torch.Tensor]:
    """`sequences` in pieces of `batch_size` rows on the module's device, under no_grad while the caller iterates."""
    device = next(module.parameters()).device
    with torch.no_grad():
        for start in range(0, len(sequences), batch_size):
            yield sequences[start : start + batch_size].to(device)
