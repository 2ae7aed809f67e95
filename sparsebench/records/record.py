"""The record of one run: fixed keys, written atomically, never read half-written.

`record.schema.json` beside this file is the contract (JSON Schema); docs/concepts.md explains each key in words.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fastjsonschema

from sparsebench.records.files import plain, scrub, write_atomic

SCHEMA_VERSION = 2
SCHEMA_FILE = Path(__file__).with_name("record.schema.json")
OUTCOMES = ("finished", "failed", "interrupted")


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


@functools.cache
def validator() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The check of record.schema.json, compiled once."""
    return fastjsonschema.compile(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))


def read_any(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """(content, problem): the record at `path`, of whatever schema, and why this version does not take it as it is.

    content is None where there is no record at all; problem is None where everything is as the schema says.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=no_number)
    except FileNotFoundError:
        return None, "there is no such file"
    except OSError as error:
        return None, f"it can't be read ({error.strerror or error})"
    except (ValueError, RecursionError) as error:
        return None, f"it is no JSON, or cut short ({str(error)[:80]})"
    if not isinstance(content, dict) or "schema_version" not in content or content.get("status") not in OUTCOMES:
        return None, "it is no record of a run that ended"
    version = content["schema_version"]
    if version != SCHEMA_VERSION:
        return content, f"it is of schema {version}, this version reads {SCHEMA_VERSION}"
    try:
        validator()(content)
    except fastjsonschema.JsonSchemaValueException as error:
        return content, f"it does not fit schema {version}: {error.message.removeprefix('data.')[:200]}"
    return content, None


def read(path: Path) -> dict[str, Any] | None:
    """The record at `path`, or None where `read_any` finds a problem."""
    content, problem = read_any(path)
    return content if problem is None else None


def no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def refusal(content: Any, oldest: int = 1) -> str | None:
    """Why `content` is not the record of a run whose schema is between `oldest` and today's; None where it is one."""
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not isinstance(version, int) or content.get("status") not in OUTCOMES:
        return "not a record"
    return None if oldest <= version <= SCHEMA_VERSION else f"schema {version}, this version reads {SCHEMA_VERSION}"
