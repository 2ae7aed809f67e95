"""Texts out of files: plain text, JSON (lines or one array), CSV and Parquet, packed (gz, bz2, xz, zst) or not, and folders
of `datasets.save_to_disk`.

Files are anybody's: a value that is no text is an error, not its `str()`; what is unpacked is counted while it is read, so
that a file that unpacks without end, or one line without end, is one line of error and not all of the memory.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

MOST_BYTES = 1 << 30  # of text in one data set, unpacked
LONGEST = 1 << 26  # bytes of one line of rows
LARGEST_ARRAY = 1 << 28  # bytes of JSON that is one array, which is parsed as a whole: some twenty times that in memory
ROW = 256  # bytes that a row takes in memory however short it is
BLOCK = 1 << 20
ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
PACKED: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open,
    ".zst": lambda file: pa.input_stream(str(file), compression="zstd"),
}  # fmt: skip
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)


class Budget:
    """How much text may still be read."""

    def __init__(self) -> None:
        self.left = MOST_BYTES

    def take(self, size: int, file: Path) -> None:
        """Raises ValueError in one line where it is used up."""
        self.left -= max(size, ROW)
        if self.left < 0:
            raise ValueError(
                f"dataset.path: {file} holds more than {megabytes(MOST_BYTES)} of text: give a part of it, or rows with "
                "dataset.max_documents"
            )


def megabytes(size: int) -> str:
    return f"{size / (1 << 20):.4g} MB"


def kind(file: Path) -> str:
    """The suffix that says what a file holds, that of packing left aside: `.json` of c4-train.00000.json.gz."""
    name = file.name.lower()
    for packing in PACKED:
        name = name.removesuffix(packing)
    return Path(name).suffix


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """The unpacked bytes of a file. Raises ValueError in one line where it can't be opened or unpacked."""
    try:
        with PACKED.get(file.suffix.lower(), lambda path: open(path, "rb", buffering=0))(file) as stream:
            yield io.BufferedReader(stream)
    except DAMAGED as error:
        how = f"unpacked as {file.suffix[1:]}" if file.suffix.lower() in PACKED else "read"
        raise ValueError(f"dataset.path: {file} can't be {how}: {' '.join(str(error).split())[:150]}") from error


def lines(stream: BinaryIO, file: Path, budget: Budget) -> Iterator[bytes]:
    """The lines of an open file, each with its end."""
    while line := stream.readline(LONGEST + 1):
        if len(line) > LONGEST:
            raise ValueError(f"dataset.path: {file} has a line of more than {megabytes(LONGEST)}")
        budget.take(len(line), file)
        yield line


def blocks(stream: BinaryIO, file: Path, budget: Budget) -> Iterator[bytes]:
    while block := stream.read(BLOCK):
        budget.take(len(block), file)
        yield block


def decoded(content: bytes, file: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"dataset.path: {file} is not UTF-8 text (byte {error.start})") from error


def read_text(file: Path, budget: Budget | None = None) -> str:
    """The file as text, lines ended by newlines alone. Raises ValueError for an empty, binary or endless file."""
    budget = budget or Budget()
    if file.suffix.lower() not in PACKED and file.stat().st_size > budget.left:
        budget.take(file.stat().st_size, file)
    with opened(file) as stream:
        start = stream.peek(65536)[:65536]  # type: ignore[attr-defined]  (a BufferedReader)
        if b"\0" in start:
            raise ValueError(f"dataset.path: {file} is a binary file, not text")
        text = decoded(b"".join(blocks(stream, file, budget)), file)
    if not text.strip():
        raise ValueError(f"dataset.path: {file} holds no text")
    return text.replace("\r\n", "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def texts(file: Path, text_field: str, budget: Budget | None = None) -> Iterator[str]:
    """The text field of a file's rows; rows without one are left out. Raises ValueError where it is something else."""
    budget = budget or Budget()
    for number, (value,) in enumerate(rows(file, {"text_field": text_field}, budget)):
        if value is not None:
            yield text_of(value, f"dataset.text_field={text_field}", f"row {number} of {file}")


def text_of(value: Any, key: str, where: str) -> str:
    """`value`, if it is text; halves of characters, which no encoding has, become question marks."""
    if not isinstance(value, str):
        held = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
        raise ValueError(
            f"{key} must name a field of text, got {held.get(type(value), type(value).__name__)} in {where}"
        )
    return value.encode("utf-8", "replace").decode()


def rows(file: Path, fields: dict[str, str], budget: Budget) -> Iterator[tuple[Any, ...]]:
    """The values of some fields in each row, None where a row has it not. fields: by the setting that names the field.

    Raises ValueError where the file can't be read or no row has such a field.
    """
    if kind(file) == ".parquet":
        yield from parquet_rows(file, fields, budget)
        return
    known: dict[str, None] = {}
    with opened(file) as stream:
        read = csv_objects if kind(file) == ".csv" else json_objects
        for number, row in enumerate(read(stream, file, budget)):
            if not isinstance(row, dict):
                raise ValueError(f"dataset.path: {file} can't be read as {kind(file)[1:]}: row {number} is no object")
            known |= dict.fromkeys(row)
            yield tuple(row.get(name) for name in fields.values())
    check_fields(fields, list(known))


def check_fields(fields: dict[str, str], known: list[str]) -> None:
    for key, name in fields.items():
        if name not in known:
            raise ValueError(
                f"dataset.{key} must be one of {', '.join(known[:30]) or 'no fields at all'}, got {name!r}"
            )


def json_objects(stream: BinaryIO, file: Path, budget: Budget) -> Iterator[Any]:
    """The elements of one array, or what stands on each line."""
    start = stream.peek(1 << 12)  # type: ignore[attr-defined]
    if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        content, read = [], 0
        for block in blocks(stream, file, budget):
            content.append(block)
            read += len(block)
            if read > LARGEST_ARRAY:
                raise ValueError(
                    f"dataset.path: {file} is one JSON array of more than {megabytes(LARGEST_ARRAY)}: write one object a line"
                )
        yield from parsed(b"".join(content), file, "as one array")
        return
    for number, line in enumerate(lines(stream, file, budget)):
        if line.strip():
            yield parsed(line, file, f"line {number + 1}")


def parsed(content: bytes, file: Path, where: str) -> Any:
    try:
        return json.loads(decoded(content, file))
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested without end"
        raise ValueError(f"dataset.path: {file} can't be read as {kind(file)[1:]}, {where}: {reason}") from None


def csv_objects(stream: BinaryIO, file: Path, budget: Budget) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(LONGEST)
    try:
        for row in csv.DictReader(decoded(line, file) for line in lines(stream, file, budget)):
            yield {name: value for name, value in row.items() if name is not None}
    except csv.Error as error:
        raise ValueError(f"dataset.path: {file} can't be read as csv: {error}") from error


def parquet_rows(file: Path, fields: dict[str, str], budget: Budget) -> Iterator[tuple[Any, ...]]:
    """As `rows`; only the columns asked for are read, a few rows at a time."""
    try:
        with pq.ParquetFile(file) as table:
            check_fields(fields, table.schema_arrow.names)
            columns = list(dict.fromkeys(fields.values()))
            for batch in table.iter_batches(batch_size=256, columns=columns):
                budget.take(max(batch.nbytes, ROW * batch.num_rows), file)
                values = {name: batch.column(name).to_pylist() for name in columns}
                yield from zip(*(values[name] for name in fields.values()), strict=True)
    except DAMAGED as error:
        raise ValueError(
            f"dataset.path: {file} can't be read as parquet: {' '.join(str(error).split())[:150]}"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Folders of datasets.save_to_disk


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of a Dataset or a DatasetDict."""
    one = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return one or (folder / "dataset_dict.json").is_file()


def saved(folder: Path, text_field: str) -> dict[str, Iterator[str]]:
    """split -> texts of a folder of `save_to_disk`; a Dataset without splits is `train`."""
    from datasets import Dataset, load_from_disk

    try:
        content = load_from_disk(str(folder))
    except (*DAMAGED, ValueError, KeyError, TypeError) as error:
        line = " ".join(str(error).split())[:150]
        raise ValueError(
            f"dataset.path: {folder} can't be read as a folder of datasets.save_to_disk: {line}"
        ) from error
    splits = {"train": content} if isinstance(content, Dataset) else dict(content)
    for rows in splits.values():
        check_fields({"text_field": text_field}, rows.column_names)
    return {name: saved_texts(rows, text_field, folder) for name, rows in splits.items()}


def saved_texts(rows: Iterable[Any], text_field: str, folder: Path) -> Iterator[str]:
    budget = Budget()
    for number, row in enumerate(rows.select_columns(text_field)):  # type: ignore[attr-defined]
        if row[text_field] is not None:
            text = text_of(row[text_field], f"dataset.text_field={text_field}", f"row {number} of {folder}")
            budget.take(len(text), folder)
            yield text
