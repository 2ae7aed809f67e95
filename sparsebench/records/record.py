"""The record of one run: fixed keys, written atomically, never read half-written.

`record.schema.json` beside this file is the contract (JSON Schema); docs/concepts.md explains each key in words.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sparsebench.records.files import plain, scrub, write_atomic

SCHEMA_VERSION = 1
SCHEMA_FILE = Path(__file__).with_name("record.schema.json")


@dataclass
class Record:
    """One run. A section is None until the run has got that far; a failed run keeps what it had."""

    config_hash: str
    name: str
    config: dict
    status: str = "running"  # finished | failed | interrupted, once written
    error: dict | None = None  # {type, message, traceback}
    started_at: str = ""  # ISO 8601, UTC
    seconds: float = 0.0
    env: dict | None = None
    model: dict | None = None
    dataset: dict | None = None
    fit: dict | None = None
    quality: dict | None = None
    sparsity: dict | None = None
    macs: dict | None = None
    bytes: dict | None = None
    latency: dict | None = None
    estimate: dict | None = None  # of a target that is not here; never mixed with latency, which is measured
    memory: dict | None = None
    extra: dict = field(default_factory=dict)  # a method's own findings (search history, training curves, ...)
    schema_version: int = SCHEMA_VERSION


def write(record: Record, path: Path) -> None:
    """Write `record` as JSON at `path`, atomically and free of secrets."""
    write_atomic(path, scrub(json.dumps(plain(asdict(record)), indent=1, allow_nan=False)).encode())


def read(path: Path) -> dict | None:
    """The record at `path`, or None where there is none or where it can't be one (truncated, foreign, other version)."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        return None
    return content if content.get("status") in ("finished", "failed", "interrupted") else None
