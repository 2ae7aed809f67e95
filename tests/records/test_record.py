"""Records: whole or absent, JSON without NaN, free of secrets, as the schema says."""

import json
import os

import jsonschema
import pytest

from sparsebench.records import record
from sparsebench.records.record import Record
from tests.helpers import made

SCHEMA = json.loads(record.SCHEMA_FILE.read_text())


def minimal(**changes) -> Record:
    return Record(
        "ab" * 32, "m/t/abab", {"seed": 0}, status="failed", started_at="2026-01-01T00:00:00+00:00", **changes
    )


def test_write_and_read(tmp_path):
    record.write(minimal(), tmp_path / "a" / "result.json")
    content = record.read(tmp_path / "a" / "result.json")
    jsonschema.validate(content, SCHEMA)
    assert content["status"] == "failed" and content["schema_version"] == record.SCHEMA_VERSION


def test_nan_becomes_null(tmp_path):
    record.write(minimal(quality={"perplexity": {"dense": float("nan"), "sparse": float("inf")}}), tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["quality"] == {"perplexity": {"dense": None, "sparse": None}}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "there is no such file"),
        ("{", "it is no JSON, or cut short"),
        ("[" * 200_000, "it is no JSON, or cut short"),
        ('{"schema_version": NaN}', "it is no JSON"),
        ("[1]", "it is no record of a run that ended"),
        ('{"schema_version": 2, "status": "running"}', "it is no record of a run that ended"),
        ('{"schema_version": 1, "status": "finished"}', "it is of schema 1, this version reads 2"),
        ('{"schema_version": 3, "status": "failed"}', "it is of schema 3, this version reads 2"),
        ('{"schema_version": 2, "status": "finished"}', "it does not fit schema 2: data must contain"),
    ],
)
def test_what_is_wrong_with_a_record_is_told_apart(tmp_path, content, problem):
    file = tmp_path / "result.json"
    if content is not None:
        file.write_text(content)
    outcome, said = record.read_any(file)
    assert problem in said and "\n" not in said
    assert record.read(file) is None
    assert (outcome is not None) == ("schema" in problem)  # the content of another version can still be shown


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("config_hash", "ab", "config_hash must match pattern"),
        ("seconds", "9", "seconds must be number"),
        ("fit", {"kind": "x", "seconds": 1, "tokens": 1, "cached": False}, "fit must contain"),
        ("latency", {"kernel": "k", "device": "cpu", "compile_seconds": 0, "warmup_seconds": 0}, "latency"),
        ("unknown", 1, "must not contain {'unknown'}"),
    ],
)
def test_the_schema_is_checked_when_a_record_is_read(tmp_path, key, value, said):
    """By the compiled check that reads records and by jsonschema alike."""
    file = tmp_path / "result.json"
    record.write(minimal(), file)
    assert record.read_any(file)[1] is None
    content = json.loads(file.read_text()) | {key: value}
    file.write_text(json.dumps(content))
    assert said in record.read_any(file)[1]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, SCHEMA)


@pytest.mark.parametrize(
    "content", ["", "{", '{"status": "finished"}', "[]", '{"schema_version": 1, "status": "running"}', "\0\0"]
)
def test_what_is_no_record_reads_as_none(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    assert record.read(tmp_path / "r.json") is None


def test_which_schemas_the_report_takes():
    for version, reason in ((1, None), (2, None), (3, "schema 3, this version reads 2"), ("2", "not a record")):
        assert record.refusal({**made(), "schema_version": version}) == reason
    assert record.refusal({"schema_version": 2, "status": "running"}) == record.refusal([]) == "not a record"
    assert record.refusal({"schema_version": 1, "status": "failed"}).startswith("not a whole record: ")


def test_a_failing_write_leaves_the_old_record(tmp_path, monkeypatch):
    record.write(minimal(), tmp_path / "r.json")
    before = (tmp_path / "r.json").read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        record.write(minimal(seconds=9.0), tmp_path / "r.json")
    assert (tmp_path / "r.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_secrets_never_reach_a_record(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecrettoken")
    record.write(
        minimal(error={"message": "401 for hf_verysecrettoken", "type": "E", "traceback": None}), tmp_path / "r.json"
    )
    text = (tmp_path / "r.json").read_text()
    assert "verysecret" not in text and "<HF_TOKEN>" in text
