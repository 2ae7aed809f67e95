"""Which record answers a run: only its own, whole and of this schema; damaged states are fitted again, and it is said."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparsebench import cli
from sparsebench.config.compose import compose_all
from sparsebench.records import record, state
from tests.helpers import QUICK_RUN, made, record_of


@pytest.fixture
def configuration(tmp_path):
    return compose_all([f"output_dir={tmp_path}/outputs", "dataset=digits", "model=lenet5"])[0]


def finished_record(configuration: dict) -> dict:
    """A record that answers `configuration`, with made-up figures."""
    folder, identity = cli.location(configuration)
    content = record.Record(identity, "a/b", configuration, status="finished", started_at="2026-01-01T00:00:00+00:00")
    record.write(content, folder / "result.json")
    return record.read(folder / "result.json")


def test_a_runs_own_record_answers(configuration):
    assert cli.finished(configuration) is None
    record = finished_record(configuration)
    assert cli.finished(configuration) == record
    assert cli.finished({**configuration, "force": True}) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.update(config_hash="0" * 64), "it is the record of another run (0000000000)"),
        (lambda r: r.update(schema_version=1), "it is of schema 1, this version reads 2"),
        (lambda r: r.update(seconds="long"), "it does not fit schema 2: seconds must be number"),
        (lambda r: r.update(status="running"), "it is no record of a run that ended"),
    ],
)
def test_what_does_not_fit_is_made_again_with_one_line(configuration, monkeypatch, caplog, change, said):
    content = finished_record(configuration)
    file = cli.location(configuration)[0] / "result.json"
    change(content)
    file.write_text(json.dumps(content))
    monkeypatch.setattr(cli, "isolated", lambda *arguments: "made again")
    assert cli.finished(configuration) is None
    assert cli.obtain(configuration) == "made again"
    (line,) = [r.getMessage() for r in caplog.records if "is made again" in r.getMessage()]
    assert said in line and str(file) in line and "\n" not in line


def test_a_copied_record_and_a_flipped_byte_in_a_cached_state(forked, model_folder, text_file, tmp_path):
    """Before: the copied record was answered, and the flipped byte gave another perplexity; both with exit 0."""
    command = ["model=hf", f"model.path={model_folder('llama')}", f"dataset.path={text_file}", *QUICK_RUN,
               "measure.latency=false", "hardware=cpu"]  # fmt: skip
    first = record_of(forked(*command), tmp_path)
    (cached,) = (tmp_path / "outputs" / "states").glob("*.safetensors")
    (own,) = (tmp_path / "outputs").rglob(state.FILE)
    assert first["fit"]["state_sha256"] == state.load(cached)[1] == state.load(own)[1]
    answer = forked(*command)
    assert record_of(answer, tmp_path)["started_at"] == first["started_at"] and "finished before" in answer.stderr

    content = cached.read_bytes()
    cached.write_bytes(content[:-700] + bytes([content[-700] ^ 64]) + content[-699:])
    other = [*command, "method.sparsity=0.25"]
    folder, _ = cli.location(compose_all([*other, f"output_dir={tmp_path}/outputs"])[0])
    folder.mkdir()
    shutil.copy(own.with_name("result.json"), folder / "result.json")
    process = forked(*other)
    record = record_of(process, tmp_path)
    assert record["config"]["method"]["sparsity"] == record["sparsity"]["requested"] == 0.25
    assert "is made again: it is the record of another run" in process.stderr
    assert "is damaged (its SHA-256 is" in process.stderr and "fitting again" in process.stderr
    assert record["fit"]["cached"] is False and state.load(own)[1] == first["fit"]["state_sha256"]


def test_an_answer_from_a_record_is_instant_and_without_torch(configuration, tmp_path):
    """The whole way of a second start. Processor time, so that a busy machine does not matter."""
    finished_record(configuration)
    code = (
        "import sys, time, sparsebench.cli as c; from sparsebench.config.compose import compose_all;"
        f"configuration = compose_all(['output_dir={tmp_path}/outputs', 'dataset=digits', 'model=lenet5'])[0];"
        "assert c.finished(configuration); assert 'torch' not in sys.modules; print(time.process_time())"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) for _ in range(3)
    ]
    assert min(times) < 2.5  # about 0.5 s on an idle machine; importing torch and transformers takes 5


def test_made_up_records_of_the_first_schema_are_still_told_apart(tmp_path):
    file = Path(tmp_path, "result.json")
    file.write_text(json.dumps({**made(), "schema_version": 1}))
    content, problem = record.read_any(file)
    assert content["status"] == "finished" and problem == "it is of schema 1, this version reads 2"
