"""Records: whole or absent, JSON without NaN, free of secrets, as the schema says."""

import json
import os

import jsonschema
import pytest

import sparsebench
from sparsebench.records import record
from sparsebench.records.record import Record

SCHEMA = json.loads(record.SCHEMA_FILE.read_text())


def minimal(**changes) -> Record:
    return Record(
        "ab" * 32, "m/t/abab", {"seed": 0}, status="failed", started_at="2026-01-01T00:00:00+00:00", **changes
    )


def test_write_and_read(tmp_path):
    record.write(minimal(), tmp_path / "a" / "result.json")
    found = record.read(tmp_path / "a" / "result.json")
    jsonschema.validate(found, SCHEMA)
    assert found["status"] == "failed" and found["schema_version"] == record.SCHEMA_VERSION


def test_nan_becomes_null(tmp_path):
    record.write(minimal(quality={"perplexity": {"dense": float("nan"), "sparse": float("inf")}}), tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["quality"] == {"perplexity": {"dense": None, "sparse": None}}


@pytest.mark.parametrize(
    "content", ["", "{", '{"status": "finished"}', "[]", '{"schema_version": 1, "status": "running"}', "\0\0"]
)
def test_what_is_no_record_reads_as_none(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    assert record.read(tmp_path / "r.json") is None


def test_why_a_record_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "SCHEMA_VERSION", 2)
    file = tmp_path / "result.json"
    for version, reason in ((1, "schema 1, this version reads 2"), (3, "schema 3, this version reads 2"), (2, None)):
        file.write_text(json.dumps({"schema_version": version, "status": "finished"}))
        assert record.look(file)[1] == reason and (record.read(file) is None) == (version != 2)
        if reason:
            with pytest.raises(ValueError, match=f"is no record of a finished run: {reason}"):
                sparsebench.load(tmp_path)
    assert record.look(tmp_path / "nowhere") == (None, "not a record")


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
