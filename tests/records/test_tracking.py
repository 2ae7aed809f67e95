"""The W&B mirror: the offline file read back holds the config, the history, the figures and the per-site table."""

import json
import struct

import pytest
import wandb
from wandb.proto import wandb_internal_pb2 as messages

from sparsebench.config.compose import compose_all
from sparsebench.records import tracking
from sparsebench.records.files import SECRETS
from sparsebench.report import page, rows, upload
from tests.helpers import failed, laid, made, record_of

SMALL = ("dataset.sequence_length=32", "method.calibration_tokens=512", "eval.text.test_sequences=8", "measure.context=8",
         "measure.prompt=8", "measure.samples=30", "measure.warmup=3")  # fmt: skip


def entries(file):
    """The messages in a W&B offline file: a LevelDB log (7 bytes of file header, then 32 KiB blocks of framed pieces)."""
    content, at, message = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        message += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole message, or the last piece of one
            yield message
            message = b""


def read_back(folder):
    """Config, history rows and summary of the one offline run below `folder`."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    return read_back_file(file)


def read_back_file(file):
    config, history, summary = {}, [], {}
    for content in entries(file):
        entry = messages.Record()
        entry.ParseFromString(content)
        for item in entry.run.config.update:
            config[item.key] = json.loads(item.value_json)
        if entry.HasField("history"):
            history.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in entry.history.item})
        for item in entry.summary.update:
            summary[".".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return config, history, summary


def test_offline_file_of_a_real_run(sparsebench, model_folder, text_file, tmp_path):
    process = sparsebench(
        "model=hf", f"model.path={model_folder('llama')}", "dataset=text", f"dataset.path={text_file}", *SMALL
    )
    assert process.returncode == 0, process.stderr
    record = record_of(process, tmp_path)
    (folder,) = (tmp_path / "outputs" / "hf" / "teal").iterdir()
    config, history, summary = read_back(folder)
    assert config["method"]["sparsity"] == 0.5 and config["model"]["name"] == "hf"
    assert any(key.startswith("per_site") for row in history for key in row)
    assert summary["quality/perplexity/sparse"] == pytest.approx(record["quality"]["perplexity"]["sparse"])
    assert summary["macs/sparse"] == pytest.approx(record["macs"]["sparse"])
    assert summary["flops/sparse"] == pytest.approx(2 * record["macs"]["sparse"])
    assert summary["latency/decode/speedup"] == pytest.approx(record["latency"]["decode"]["speedup"])


def test_disabled_writes_nothing(sparsebench, model_folder, text_file, tmp_path):
    arguments = ("model=hf", f"model.path={model_folder('llama')}", "dataset=text", f"dataset.path={text_file}", *SMALL)
    assert sparsebench(*arguments, "wandb.mode=disabled", "measure.latency=false").returncode == 0
    assert not list(tmp_path.rglob("*wandb*"))


def test_unreachable_server_does_not_lose_the_run(sparsebench, model_folder, text_file, tmp_path):
    process = sparsebench(
        "model=hf", f"model.path={model_folder('llama')}", "dataset=text", f"dataset.path={text_file}", *SMALL,
        "wandb.mode=online", "measure.latency=false",
        env={"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0123456789" * 4, "WANDB_MODE": ""},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert record_of(process, tmp_path)["status"] == "finished"
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"01234567890123456789" not in written


def test_summary_has_flops_and_no_samples():
    flat = tracking.summary(
        {"macs": {"dense": 10, "unit": "x"}, "latency": {"decode": {"dense": {"median_ms": 1.0, "samples_ms": [1.0]}}}}
    )
    assert flat == {"macs/dense": 10, "macs/unit": "x", "flops/dense": 20, "latency/decode/dense/median_ms": 1.0}


def test_a_tracker_that_breaks_is_only_a_warning(caplog):
    class Broken:
        def log(self, row):
            raise RuntimeError("lost")

    tracking.WandbTracker(Broken()).log({"a": 1})
    assert "lost" in caplog.text
    assert SECRETS


def test_late_upload_of_records_and_report(tmp_path):
    """Records made without W&B, sent afterwards: each a run with its figures, and the report with its plots and tables."""
    folder = laid(tmp_path / "outputs", made(), made("wina"), failed())
    actual = rows.collect([folder])
    page.write(actual, tmp_path / "report", "title")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        assert upload.send(actual, tmp_path / "report", "project") == 3
    files = sorted((tmp_path / "report").glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 4
    sent = [read_back_file(file) for file in files]
    perplexities = {s.get("quality/perplexity/sparse") for _, _, s in sent}
    assert {12.0} <= perplexities and {s.get("status") for _, _, s in sent} >= {"finished", "failed"}
    keys = {key for _, history, _ in sent for line in history for key in line}
    for name in ("group-1-sparsity", "table-1", "runs", "at equal sparsity", "comparisons-1", "perplexity over work"):
        assert any(name in k for k in keys), name
    for name in ("sparsity by layer", "cost", "per_site"):  # of the runs themselves
        assert any(name in k for k in keys), name
    assert {s.get("machine/device") for _, _, s in sent} >= {"Test CPU"}


def test_artifacts_are_off_by_default_and_hold_what_load_needs(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    (tmp_path / "state.safetensors").write_bytes(b"x")
    tracker = tracking.WandbTracker(None, tmp_path)
    artifact = tracker.files(tracker.artifact, {"config_hash": "ab" * 32})
    assert isinstance(artifact, wandb.Artifact)
    assert set(artifact.manifest.entries) == {"result.json", "state.safetensors"}
    assert compose_all([])[0]["wandb"]["artifacts"] is False
