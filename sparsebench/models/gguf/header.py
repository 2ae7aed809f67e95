"""The head of a GGUF file: its metadata, and the type, shape and place of each tensor, checked against the file's length.

Read here and not by the gguf package, whose reader makes arrays of every word of a vocabulary (4 s for 49,152 tokens,
21 s for 262,144). Layout: the GGUF specification of ggml (github.com/ggml-org/ggml), versions 2 and 3.
"""

from __future__ import annotations

import functools
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize, quant_shape_to_byte_shape

from sparsebench.config import digests

MAGIC, VERSIONS = b"GGUF", (2, 3)
NUMBERS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.FLOAT32: "f", GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d",
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: `shape` as torch has it (rows first), `start` in bytes from the file's begin."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bits(self) -> float:
        """Bits per element."""
        block, size = GGML_QUANT_SIZES[self.type]
        return 8 * size / block

    @property
    def end(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return self.start + self.elements // block * size


@dataclass(frozen=True)
class File:
    """A GGUF file whose tensors all lie inside it."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Tensor]

    def get(self, key: str, default: Any = None) -> Any:
        """A field of the model's own architecture, e.g. `block_count` for `llama.block_count`."""
        return self.fields.get(f"{self.fields.get('general.architecture')}.{key}", default)

    def dequantised(self, name: str, rows: int | None = None) -> np.ndarray:
        """A tensor, or its first rows, as float32."""
        tensor = self.tensors[name]
        shape = tensor.shape if rows is None else (min(rows, tensor.shape[0]), *tensor.shape[1:])
        stored = quant_shape_to_byte_shape(shape, tensor.type)
        count = int(np.prod(stored, dtype=np.int64))
        data = np.memmap(self.path, np.uint8, "r", tensor.start, (count,)).reshape(stored)
        return np.array(dequantize(data, tensor.type), dtype=np.float32)


class Cursor:
    """Reads little-endian values one after the other. Raises struct.error or ValueError at the end of the data."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def number(self, code: str) -> Any:
        value = struct.unpack_from(f"<{code}", self.data, self.at)[0]
        self.at += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        length = self.number("Q")
        raw = self.data[self.at : self.at + length]
        if len(raw) < length:
            raise ValueError("a text goes on behind the end")
        self.at += length
        return raw.decode("utf-8")

    def value(self, kind: int) -> Any:
        """One value of a GGUF type: a number, a text, or a list of either."""
        kind = GGUFValueType(kind)
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            return self.number(NUMBERS[kind])
        inner, count = GGUFValueType(self.number("I")), self.number("Q")
        if inner not in NUMBERS:
            return [self.value(inner) for _ in range(count)]
        values = np.frombuffer(self.data, np.dtype(NUMBERS[inner]).newbyteorder("<"), count, self.at)
        self.at += values.nbytes
        return values.tolist()


def read(path: str | Path) -> File:
    """The head of a GGUF file. Raises ValueError, in one line, where it is none, in parts, cut short or damaged."""
    try:
        return remembered(Path(path), digests.stamp(Path(path)))
    except OSError as error:
        raise ValueError(f"it can't be read ({error.strerror or error})") from error


@functools.lru_cache(maxsize=4)
def remembered(path: Path, stamp: str) -> File:
    """`read` of a file in the state that `stamp` stands for."""
    if path.stat().st_size < 24:
        raise ValueError("it is no GGUF file: it has fewer bytes than a head")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        check_start(data[:8])
        try:
            fields, entries, start = parsed(Cursor(data))
        except (struct.error, ValueError, KeyError, OverflowError, MemoryError) as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"its head is cut short or damaged ({line})") from error
        size = len(data)
    parts = fields.get("split.count", 0)
    if parts > 1:
        number = fields.get("split.no", 0) + 1
        raise ValueError(f"it is part {number} of {parts}: join them first (llama-gguf-split --merge)")
    tensors = {name: Tensor(name, kind, shape, start + offset) for name, kind, shape, offset in entries}
    last = max(tensors.values(), key=lambda t: t.end, default=None)
    if last is None:
        raise ValueError("it holds no tensors")
    if last.end > size:
        raise ValueError(f"it is cut short: {last.name} ends at byte {last.end}, the file at {size}")
    return File(path, fields, tensors)


def check_start(start: bytes) -> None:
    """Raise ValueError where a file's first 8 bytes are not those of a GGUF file of a known version."""
    if start[:4] != MAGIC:
        raise ValueError(f"it is no GGUF file: it starts with {start[:4]!r}, not {MAGIC!r}")
    version = struct.unpack("<I", start[4:])[0]
    if version not in VERSIONS:
        order = " in the other byte order" if version & 0xFFFF == 0 else ""
        raise ValueError(f"it is of version {version}{order}, known are {' and '.join(map(str, VERSIONS))}")


def parsed(cursor: Cursor) -> tuple[dict[str, Any], list[tuple], int]:
    """(metadata, (name, type, shape, offset) of each tensor, where the tensors' data begin)."""
    cursor.at = 8
    count, pairs = cursor.number("Q"), cursor.number("Q")
    fields: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.text()
        fields[key] = cursor.value(cursor.number("I"))
    entries = []
    for _ in range(count):
        name, dimensions = cursor.text(), cursor.number("I")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        entries.append((name, GGMLQuantizationType(cursor.number("I")), shape, cursor.number("Q")))
        quant_shape_to_byte_shape(shape, entries[-1][1])
    alignment = fields.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    return fields, entries, -(-cursor.at // alignment) * alignment
