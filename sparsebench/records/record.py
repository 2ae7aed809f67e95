"""The record of one run: fixed keys, written atomically, never read half-written.

`record.schema.json` beside this file is the contract (JSON Schema); docs/concepts.md explains each key in words.
"""

from __future__ import annotations

import functools
import json
import stat
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fastjsonschema

from sparsebench.records.files import plain, scrub, scrubbed, write_atomic

SCHEMA_VERSION = 2
SCHEMA_FILE = Path(__file__).with_name("record.schema.json")
OUTCOMES = ("finished", "failed", "interrupted")
DEEPEST = 64  # levels of a record: its own are about ten, settings of a user's method may add some
MOST_BYTES = 1 << 28  # of a record's file
LARGEST = 1e300  # above any figure, below what arithmetic overflows at


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
    phases: list[dict[str, Any]] = field(default_factory=list)  # what each took: name, seconds, cpu_seconds
    shared: dict[str, str] = field(default_factory=dict)  # what another run measured, and that run's hash
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
    write_atomic(path, json.dumps(scrubbed(plain(asdict(record))), indent=1, allow_nan=False).encode())


@functools.cache
def validator() -> Callable[[Any], Any]:
    """The check of record.schema.json, compiled once."""
    return fastjsonschema.compile(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))


@functools.cache
def bench_validator() -> Callable[[Any], Any]:
    """The check of what table and plot read of a record of sparsebench-bench."""
    file = SCHEMA_FILE.with_name("bench.schema.json")
    return fastjsonschema.compile(json.loads(file.read_text(encoding="utf-8")))


READ = {  # what a comparison must find in a record; every other key may be missing there, as it was in older versions
    "schema_version", "status", "config", "config_hash", "seconds", "dense", "sparse", "higher_is_better",
    "sparsity", "dense_macs", "sparse_macs", "median_ms", "dense_ms", "sparse_ms", "speedup", "target", "fitted_on", "device",
    "cautions",
}  # fmt: skip


@functools.cache
def comparable() -> Callable[[Any], Any]:
    """The check of what a comparison reads of a record, whatever its version: today's types and bounds, fewer keys."""
    schema = relaxed(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))
    schema["properties"]["schema_version"] = {"type": "integer"}
    schema["required"].append("name")
    settings, groups = schema["properties"]["config"], ["model", "dataset", "method", "hardware"]
    settings["required"] = ["seed", *groups]
    settings["properties"]["seed"] = {"type": "integer"}
    for group in groups:
        settings["properties"][group]["required"] = ["name"]
    return fastjsonschema.compile(schema)


def relaxed(node: Any) -> Any:
    """A schema without its demands on keys that no comparison reads."""
    if isinstance(node, list):
        return [relaxed(each) for each in node]
    if not isinstance(node, dict):
        return node
    kept = {k: relaxed(v) for k, v in node.items() if k not in ("anyOf", "minItems", "pattern") and v is not False}
    if isinstance(kept.get("required"), list):
        kept["required"] = [key for key in kept["required"] if key in READ]
    return kept


def misfit(check: Callable[[Any], Any], content: Any) -> str | None:
    """What `check` finds wrong with a record, in one line, or None."""
    try:
        check(content)
    except fastjsonschema.JsonSchemaValueException as error:
        return str(error.message).removeprefix("data.").replace("\n", " ")[:200]
    return None


def parsed(text: str) -> Any:
    """JSON from anybody. Raises ValueError in one line: not JSON, nested without end, or a number that is none."""
    try:
        content = json.loads(text, parse_constant=no_number)
    except RecursionError:
        raise ValueError("nested without end") from None
    waiting = [(content, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} levels deep")
        if isinstance(value, (dict, list)):
            waiting += [(each, depth + 1) for each in (value.values() if isinstance(value, dict) else value)]
        elif isinstance(value, (int, float)) and not abs(value) < LARGEST:
            raise ValueError("a number too large to be one")
    return content


def file_text(path: Path) -> str:
    """The text of a file that may be anybody's: a plain file of a size that a record can have. Raises OSError, ValueError."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no plain file")
    if status.st_size > MOST_BYTES:
        raise ValueError(f"{status.st_size / 1e6:.0f} MB, no record is longer than {MOST_BYTES / 1e6:.0f} MB")
    return path.read_text(encoding="utf-8")


def read_any(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """(content, problem): the record at `path`, of whatever schema, and why this version does not take it as it is.

    content is None where there is no record at all; problem is None where everything is as the schema says.
    """
    try:
        content = parsed(file_text(path))
    except FileNotFoundError:
        return None, "there is no such file"
    except OSError as error:
        return None, f"it can't be read ({error.strerror or error})"
    except ValueError as error:
        return None, f"it is no JSON, or cut short ({str(error)[:80]})"
    if not isinstance(content, dict) or "schema_version" not in content or not ended(content):
        return None, "it is no record of a run that ended"
    version = content["schema_version"]
    if not isinstance(version, int) or version != SCHEMA_VERSION:
        return content, f"it is of schema {str(version)[:20]}, this version reads {SCHEMA_VERSION}"
    wrong = misfit(validator(), content)
    return content, wrong and f"it does not fit schema {version}: {wrong}"


def ended(content: dict[str, Any]) -> bool:
    return isinstance(content.get("status"), str) and content["status"] in OUTCOMES


def read(path: Path) -> dict[str, Any] | None:
    """The record at `path`, or None where `read_any` finds a problem."""
    content, problem = read_any(path)
    return content if problem is None else None


def no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def refusal(content: Any, oldest: int = 1) -> str | None:
    """Why `content` can't be compared: no record of a benchmark or of a run that ended, of a schema that is not between
    `oldest` and today's, or not whole. None where it can."""
    if is_bench(content):
        wrong = misfit(bench_validator(), content)
        return wrong and f"not a whole record of a benchmark: {wrong}"
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or not ended(content):
        return "not a record"
    if not oldest <= version <= SCHEMA_VERSION:
        return f"schema {version}, this version reads {SCHEMA_VERSION}"
    wrong = misfit(comparable(), content)
    return wrong and f"not a whole record: {wrong}"


def is_bench(content: Any) -> bool:
    """Whether this says it is a record of sparsebench-bench."""
    return isinstance(content, dict) and content.get("kind") == "bench"


def explain(error: BaseException) -> str:
    """What happened, in one line for the user."""
    text = scrub(" ".join(str(error).split()))
    kind = type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return text or "interrupted"
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in text:
        return f"out of memory: {text or 'the process could not allocate more'}"
    if isinstance(error, (ValueError, FloatingPointError, ArithmeticError, OSError)) and text:
        return text
    return f"{kind}: {text}" if text else kind
