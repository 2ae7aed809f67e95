"""The record of one run: fixed keys, written atomically, never read half-written.

`record.schema.json` beside this file is the contract (JSON Schema); docs/concepts.md explains each key in words.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparsebench.records.files import plain, scrub, write_atomic

SCHEMA_VERSION = 1
SCHEMA_FILE = Path(__file__).with_name("record.schema.json")


@dataclass
class Record:
    """One run. A section is None until the run has got that far; a failed run keeps what it had."""

    config_hash: str
    name: str
    config: dict[str, Any]
    status: str = "running"  # finished | failed | interrupted, once written
    error: dict[str, Any] | None = None  # {type, message, traceback}
    started_at: str = ""  # ISO 8601, UTC
    seconds: float = 0.0
    env: dict[str, Any] | None = None
    model: dict[str, Any] | None = None
    dataset: dict[str, Any] | None = None
    fit: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None
    sparsity: dict[str, Any] | None = None
    macs: dict[str, Any] | None = None
    bytes: dict[str, Any] | None = None
    latency: dict[str, Any] | None = None
    estimate: dict[str, Any] | None = None  # of a target that is not here; never mixed with latency, which is measured
    memory: dict[str, Any] | None = None
    extra: dict[str, Any] = field(
        default_factory=dict
    )  # a method's own findings (search history, training curves, ...)
    schema_version: int = SCHEMA_VERSION


def write(record: Record, path: Path) -> None:
    """Write `record` as JSON at `path`, atomically and free of secrets."""
    write_atomic(path, scrub(json.dumps(plain(asdict(record)), indent=1, allow_nan=False)).encode())


def read(path: Path) -> dict[str, Any] | None:
    """The record at `path`, or None where there is none or where it can't be one (truncated, foreign, other version)."""
    return look(path)[0]


def look(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """(the record at `path`, None), or (None, why it can't be used)."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None, "not a record"
    reason = refusal(content, SCHEMA_VERSION)
    return (None, reason) if reason else (content, None)


def refusal(content: Any, oldest: int = 1) -> str | None:
    """Why `content` is not the record of a run whose schema is between `oldest` and today's; None where it is one."""
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not isinstance(version, int) or content.get("status") not in ("finished", "failed", "interrupted"):
        return "not a record"
    return None if oldest <= version <= SCHEMA_VERSION else f"schema {version}, this version reads {SCHEMA_VERSION}"
