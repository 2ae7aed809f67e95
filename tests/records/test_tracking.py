"""The W&B mirror: the offline file read back holds the config, the history, the figures and the per-site table."""

import http.server
import json
import multiprocessing
import os
import struct
import tempfile
import threading
import time

import pytest
import wandb
from wandb.proto import wandb_internal_pb2 as messages

from sparsebench.config.compose import compose_all
from sparsebench.records import tracking
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
        for item in (*entry.run.config.update, *entry.config.update):
            config[item.key] = json.loads(item.value_json)
        if entry.HasField("history"):
            history.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in entry.history.item})
        for item in entry.summary.update:
            summary[".".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return config, history, summary


def test_offline_file_of_a_real_run(sparsebench, model_folder, text_file, tmp_path):
    """Before: the id of the environment for every run, three folders left in the temporary folder, times of no machine."""
    (tmp_path / "temporary").mkdir()
    process = sparsebench(
        "model=hf", f"model.path={model_folder('llama')}", "dataset=text", f"dataset.path={text_file}", *SMALL,
        env={"WANDB_RUN_ID": "same", "WANDB_RESUME": "must", "TMPDIR": str(tmp_path / "temporary")},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    content = record_of(process, tmp_path)
    (folder,) = (tmp_path / "outputs").glob("*/teal/*")
    (offline,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert offline.name == f"run-{content['config_hash'][:16]}.wandb"
    assert not list((tmp_path / "temporary").iterdir()) and not (folder / "wandb" / "tmp").exists()
    assert list((folder / "wandb" / "artifacts" / "staging").iterdir())
    config, history, summary = read_back(folder)
    machine = config["machine"]
    assert machine["cpu"] == content["env"]["cpu"] and machine["versions"] == content["env"]["versions"]
    assert machine["dtype"] == "float32" and machine["threads"] == content["env"]["threads"] and "argv" not in machine
    assert config["method"]["sparsity"] == 0.5 and config["model"]["name"] == model_folder("llama").name
    assert any(key.startswith("per_site") for row in history for key in row)
    assert summary["quality/perplexity/sparse"] == pytest.approx(content["quality"]["perplexity"]["sparse"])
    assert summary["macs/sparse"] == pytest.approx(content["macs"]["sparse"])
    assert summary["flops/sparse"] == pytest.approx(2 * content["macs"]["sparse"])
    assert summary["latency/decode/speedup"] == pytest.approx(content["latency"]["decode"]["speedup"])


def test_disabled_writes_nothing(forked, model_folder, text_file, tmp_path):
    arguments = ("model=hf", f"model.path={model_folder('llama')}", "dataset=text", f"dataset.path={text_file}", *SMALL)
    assert forked(*arguments, "wandb.mode=disabled", "measure.latency=false").returncode == 0
    assert not list(tmp_path.rglob("*wandb*"))


SECRET = "0123456789" * 4


class Fails(http.server.BaseHTTPRequestHandler):
    """A server that answers 500 to everything."""

    def answer(self):
        self.send_error(500)

    def __getattr__(self, name):
        if name.startswith("do_"):
            return self.answer
        raise AttributeError(name)

    def log_message(self, *arguments):
        pass


class Hangs(Fails):
    """A server that takes every request and never answers."""

    def answer(self):
        time.sleep(600)


@pytest.fixture
def server(request):
    """The address of a server on the loopback that behaves as the parameter says; None: nobody listens there."""
    if request.param is None:
        yield "http://127.0.0.1:9"
        return
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), request.param) as listening:
        listening.daemon_threads, listening.block_on_close = True, False
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


SERVERS = pytest.mark.parametrize("server", [None, Fails, Hangs], indirect=True, ids=["refuses", "fails", "hangs"])


@SERVERS
def test_a_server_that_can_not_be_used_costs_nothing_but_a_little_time(server, tmp_path, monkeypatch):
    """The figures lie in the folder, for `wandb sync`."""
    for name, value in {"WANDB_BASE_URL": server, "WANDB_API_KEY": SECRET, "WANDB_MODE": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tracking, "START_SECONDS", 1)
    settings = {"mode": "online", "project": "p", "entity": None, "group": None, "artifacts": False}

    def body():
        tracker = tracking.start(settings, "name", tmp_path, {"seed": 1}, "a" * 16, alone=True)
        tracker.log({"loss": 1.0})
        tracker.finish(made())
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join(120)
    assert process.exitcode == 0
    kept = [read_back_file(file) for file in tmp_path.glob("wandb/offline-run-*/*.wandb")]
    assert [summary["quality/perplexity/sparse"] for _, _, summary in kept] == [12.0]
    assert SECRET.encode() not in b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


@pytest.mark.slow
@SERVERS
def test_a_server_that_can_not_be_used_does_not_lose_the_run(server, sparsebench, model_folder, text_file, tmp_path):
    process = sparsebench(
        "model=hf", f"model.path={model_folder('llama')}", "dataset=text", f"dataset.path={text_file}", *SMALL,
        "wandb.mode=online", "measure.latency=false",
        env={"WANDB_BASE_URL": server, "WANDB_API_KEY": SECRET, "WANDB_MODE": ""},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert record_of(process, tmp_path)["status"] == "finished"
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"01234567890123456789" not in written


def test_a_server_that_hangs_at_the_end_is_left_after_a_while(tmp_path, monkeypatch, caplog):
    class Stuck:
        config, summary = {}, {}

        def log(self, row):
            pass

        def finish(self, exit_code):
            threading.Event().wait()

    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.2)
    start = time.perf_counter()
    tracking.WandbTracker(Stuck()).finish({**made(), "env": None})
    assert time.perf_counter() - start < 30 and "not everything was sent within" in caplog.text


def test_temporary_files_go_where_they_are_told(tmp_path):
    with tracking.temporary_files(tmp_path / "a"):
        assert tempfile.mkdtemp().startswith(str(tmp_path / "a"))
    assert not tempfile.mkdtemp(dir=tmp_path).startswith(str(tmp_path / "a"))


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
