"""Many records in one parquet file: what is shared, published and kept in git.

One row per record. The main figures stand in plain columns, so that any tool that reads parquet can filter and plot
them; the whole record with all its samples is the column `record`, JSON text. Columns are compressed over all rows
(zstd), since records of one experiment repeat each other: a thousand records take about two megabytes.
"""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparsebench.config.identity import digest
from sparsebench.records import files, record

SUFFIX = ".parquet"
TEXT = ("kind", "config_hash", "name", "command", "commit", "machine", "started_at", "status", "model", "method",
        "dataset", "kernel", "engine")  # fmt: skip
WHOLE = ("schema_version", "seed")
FIGURES = ("perplexity_dense", "perplexity_sparse", "accuracy_dense", "accuracy_sparse", "sparsity_requested", "sparsity",
           "macs_dense", "macs_sparse", "macs_executed", "bytes_dense", "bytes_sparse", "decode_dense_ms", "decode_sparse_ms",
           "forward_dense_ms", "forward_sparse_ms", "speedup")  # fmt: skip
SCHEMA = pa.schema([
    *((name, pa.string()) for name in TEXT), *((name, pa.int64()) for name in WHOLE),
    *((name, pa.float64()) for name in FIGURES), ("record", pa.string()),
])  # fmt: skip
LEVEL = 19  # of zstd: seconds to write, and no slower to read
MOST_BYTES = 8 << 30  # of an unpacked archive: a hundred thousand records and more
ONE_PAGE = 1 << 30  # bytes: all records of a file in one page, so that what they share is stored once


class ArchiveError(ValueError):
    """A file that can't be read as an archive; the message is one line."""


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write `records` (runs and benchmarks, of any schema version) as an archive at `path`, atomically.

    The same records give the same bytes: rows are sorted by name, settings, seed and start, equal ones are kept once.
    """
    unique = {digest(content): content for content in records}
    rows = sorted((row(content) for content in unique.values()), key=order)
    columns = {field.name: [each[field.name] for each in rows] for field in SCHEMA}
    file = io.BytesIO()
    pq.write_table(
        pa.table(columns, schema=SCHEMA), file, compression="zstd", compression_level=LEVEL, data_page_size=ONE_PAGE,
        use_dictionary=False, write_statistics=False, write_page_checksum=True, store_schema=False,
    )  # fmt: skip
    files.write_atomic(path, file.getvalue())


def order(row: dict[str, Any]) -> tuple[str, ...]:
    return row["kind"], str(row["model"]), str(row["method"]), str(row["name"]), row["started_at"] or "", row["record"]


def read(path: Path) -> list[dict[str, Any]]:
    """The records of the archive at `path`, in the order of its rows. Raises ArchiveError in one line otherwise."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            missing = [name for name in ("kind", "record") if name not in file.schema_arrow.names]
            if missing:
                raise ArchiveError(f"{path} is no archive of records: it has no column {missing[0]!r}")
            about = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            size = sum(part.column(i).total_uncompressed_size for part in about for i in range(part.num_columns))
            if size > MOST_BYTES:
                raise ArchiveError(f"{path} would unpack to {size / 1e9:.0f} GB, no archive is larger than 8 GB")
            texts = file.read(columns=["record"]).column("record").to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ArchiveError(f"{path} can't be read as an archive: {' '.join(str(error).split())[:200]}") from None
    return [parsed(text, path, number) for number, text in enumerate(texts)]


def parsed(text: Any, path: Path, number: int) -> dict[str, Any]:
    try:
        content = record.parsed(text)
    except (TypeError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise ArchiveError(f"{path}: row {number} holds no record")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# One record as a row


def row(content: dict[str, Any]) -> dict[str, Any]:
    """The columns of one record; None where it doesn't hold a figure."""
    bench = content.get("kind") == "bench"
    env, settings = content.get("env") or {}, content.get("config") or {}
    model = content.get("model") if bench else (settings.get("model") or {}).get("name")
    return {
        **dict.fromkeys(SCHEMA.names),
        "kind": "bench" if bench else "run",
        "config_hash": key(content),
        "name": f"{model}/bench" if bench else content.get("name"),
        "command": command(env.get("argv") or [], bench),
        "commit": env.get("git_commit"),
        "machine": device(env),
        "model": model,
        "method": (settings.get("method") or {}).get("name"),
        "dataset": (settings.get("dataset") or {}).get("name"),
        "seed": settings.get("seed"),
        **{name: content.get(name) for name in ("started_at", "status", "schema_version")},
        **({} if bench else figures(content)),
        "record": json.dumps(content, separators=(",", ":"), ensure_ascii=False),
    }


def key(content: dict[str, Any]) -> str:
    """The record's identity; a benchmark has none of its own and is named by its content."""
    return content.get("config_hash") or digest(content)


def device(env: dict[str, Any]) -> str | None:
    """The name of the device that a record's run computed on."""
    on_gpu = "cuda" in str((env.get("hardware") or {}).get("device"))
    return env.get("gpu") if on_gpu else env.get("cpu")


def command(argv: list[str], bench: bool) -> str:
    """What was typed: the name of the command for that of its file, without the folder that a sweep adds by itself."""
    own = [word for word in argv[1:] if not word.startswith("hydra.sweep.dir=")]
    return shlex.join(["sparsebench-bench" if bench else "sparsebench", *own])


def figures(content: dict[str, Any]) -> dict[str, Any]:
    """The main medians of a run's record."""
    quality, costs, latency = (content.get(name) or {} for name in ("quality", "macs", "latency"))
    measured, traffic = content.get("sparsity") or {}, content.get("bytes") or {}
    decode = latency.get("decode") or {}
    forward: dict[str, Any] = next(iter((latency.get("forward") or {}).values()), {})  # the smallest batch stands first
    timed = decode or forward
    return {
        **{f"{name}_{side}": (quality.get(name) or {}).get(side)
           for name in ("perplexity", "accuracy") for side in ("dense", "sparse")},
        "sparsity_requested": measured.get("requested"), "sparsity": measured.get("model_wide"),
        **{f"macs_{side}": costs.get(side) for side in ("dense", "sparse", "executed")},
        **{f"bytes_{side}": traffic.get(side) for side in ("dense", "sparse")},
        **{f"{part}_{side}_ms": (times.get(side) or {}).get("median_ms")
           for part, times in (("decode", decode), ("forward", forward)) for side in ("dense", "sparse")},
        "speedup": timed.get("speedup"), "kernel": timed.get("kernel") or latency.get("kernel"),
        "engine": timed.get("sparse_engine"),
    }  # fmt: skip
