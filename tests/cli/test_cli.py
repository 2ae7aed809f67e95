"""The installed command as a user meets it: answers, exit codes, one clear line for everything wrong, nothing lost."""

import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import jsonschema
import pytest
import torch

from sparsebench.records.record import SCHEMA_FILE
from tests.helpers import COMMAND, QUICK_RUN, record_of, tiny_model, tiny_tokenizer

SECRET = "0123456789abcdef0123456789abcdef01234567"


def arguments(model_folder, text_file, *more):
    return ("model=hf", f"model.path={model_folder}", f"dataset.path={text_file}", *QUICK_RUN, *more)


def processor_seconds() -> float:
    """Of all processes that ended so far: what a busy machine does not stretch."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def kill_at_work(process):
    """(stdout, stderr) of a command whose working process is killed while it evaluates."""
    for line in process.stderr:
        if "evaluating" in line:
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    return out, err


def test_all_problems_at_once(sparsebench):
    process = sparsebench("method.sparsity=2", "measure.samples=1", "hardware.dtype=fp8", "method.nonsense=1")
    assert process.returncode == 2
    for key in ("method.sparsity", "measure.samples", "hardware.dtype", "method.nonsense"):
        assert sum(key in line for line in process.stderr.splitlines()) == 1, process.stderr


@pytest.mark.parametrize("given", [["--help"], ["--cfg", "job"], ["--version"], ["-sc", "query=bash"]])
def test_answers_at_once(given, sparsebench):
    if given == ["--version"]:
        given = ["--info", "defaults"]
    start = processor_seconds()
    environment = {"COMP_LINE": "sparsebench method=", "COMP_POINT": "19"}
    process = sparsebench(*given, env=environment)
    assert processor_seconds() - start < 2.0  # torch alone takes more
    assert process.returncode == 0, process.stderr


def test_torch_stays_out_of_the_quick_answers():
    script = (
        "import sys; sys.argv = ['sparsebench', '--cfg', 'job']\n"
        "from sparsebench import cli\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([Path(COMMAND).with_name("python"), "-c", script], capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1] == "False", done.stderr


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gpt2"])
def test_any_known_structure_from_a_folder(kind, forked, model_folder, text_file, tmp_path):
    """Issue of record: `model=hf model.path=<folder> dataset=text dataset.path=<file>`, every section filled."""
    process = forked(*arguments(model_folder(kind), text_file))
    assert process.returncode == 0, process.stderr
    record = record_of(process, tmp_path)
    jsonschema.validate(record, json.loads(SCHEMA_FILE.read_text()))
    assert record["status"] == "finished" and record["dataset"]["disjoint"]
    assert 0.3 < record["sparsity"]["model_wide"] < 0.7
    assert record["macs"]["sparse"] < record["macs"]["dense"] and record["bytes"]["sparse"] < record["bytes"]["dense"]
    assert record["latency"]["kernel"] == "cpu_numba" and record["latency"]["decode"]["speedup"] > 0
    assert len(record["latency"]["decode"]["sparse"]["samples_ms"]) >= 30
    assert "record:" in process.stdout and "perplexity" in process.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder, text_file):
    """(folder, arguments, record) of one finished run with secrets in its environment."""
    folder = tmp_path_factory.mktemp("finished")
    given = arguments(model_folder("llama"), text_file, "measure.latency=false")
    environment = {**os.environ, "WANDB_API_KEY": SECRET, "HF_TOKEN": "hf_" + SECRET, "HF_HUB_OFFLINE": "1"}
    process = subprocess.run([COMMAND, *given], cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return folder, given, record_of(process, folder)


def test_the_second_answer_comes_from_the_record(finished):
    folder, given, actual = finished
    start = processor_seconds()
    process = subprocess.run([COMMAND, *given], cwd=folder, capture_output=True, text=True)
    assert processor_seconds() - start < 2.5
    assert process.returncode == 0 and "finished before" in process.stderr
    assert record_of(process, folder) == actual


def test_another_way_of_saying_the_same_is_the_same_run(finished, forked):
    folder, given, actual = finished
    same = [g for g in given if g != "wandb.mode=disabled"] + [
        "method.sparsity=0.50",
        "wandb.mode=offline",
        "hydra.job.chdir=true",
    ]
    process = forked(*same, folder=folder)
    assert record_of(process, folder)["started_at"] == actual["started_at"]


def test_secrets_are_nowhere(finished):
    folder, *_ = finished
    written = b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
    assert SECRET.encode() not in written


def test_another_sparsity_fits_nothing_again(finished, forked):
    folder, given, _ = finished
    process = forked(*given, "method.sparsity=0.25", folder=folder)
    assert record_of(process, folder)["fit"]["cached"] is True


def test_a_finished_record_stays_when_a_forced_run_is_killed(finished, tmp_path):
    """The old record answers until a new finished one replaces it; the failed one is kept beside it, and said."""
    folder, given, _ = finished
    shutil.copytree(folder, tmp_path / "copy")
    process = subprocess.Popen(
        [COMMAND, *given, "force=true"],
        cwd=tmp_path / "copy",
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    out, err = kill_at_work(process)
    assert process.returncode == 1 and "the finished record of before stays" in err
    said = tmp_path / "copy" / json.loads(out.strip().splitlines()[-1])["record"]
    assert said.name == "result.failed.json" and json.loads(said.read_text())["status"] == "failed"
    assert json.loads(said.with_name("result.json").read_text())["status"] == "finished"


def test_a_sweep_over_dense_and_another_with_a_key_that_dense_lacks(finished, forked, tmp_path):
    """What was finished before answers; dense drops the key with one line; chdir moves nothing."""
    folder, given, _ = finished
    shutil.copytree(folder, tmp_path / "copy")
    before = len(list((tmp_path / "copy").rglob("result.json")))
    process = forked(
        "-m", *given, "method=dense,teal", "method.sparsity=0.5", "hydra.job.chdir=true", folder=tmp_path / "copy"
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("method=dense has no sparsity: method.sparsity=0.5 does not apply") == 1
    summary = json.loads(process.stdout.strip().splitlines()[-1])
    assert summary["outcomes"] == {"finished": 1, "finished before": 1}
    assert len(list((tmp_path / "copy").rglob("result.json"))) == before + 1


def failing(forked, tmp_path, *given, code=1):
    process = forked(*given)
    assert process.returncode == code, (process.stdout, process.stderr)
    record = record_of(process, tmp_path)
    jsonschema.validate(record, json.loads(SCHEMA_FILE.read_text()))
    assert record["status"] == "failed" and "Traceback" in record["error"]["traceback"]
    assert "Traceback" not in process.stderr
    return record["error"]["message"], process


def test_nan_weights_fail_with_one_line_and_a_record(forked, text_file, tmp_path):
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    message, process = failing(forked, tmp_path, *arguments(tmp_path / "m", text_file))
    assert "not finite" in message and "failed: " in process.stderr


def test_pickle_checkpoint_is_refused(forked, model_folder, text_file, tmp_path):
    shutil.copytree(model_folder("llama"), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "m" / "pytorch_model.bin")
    process = forked(*arguments(tmp_path / "m", text_file))
    assert process.returncode == 2 and "safetensors" in process.stderr and "Traceback" not in process.stderr


def test_truncated_weights_fail_clearly(forked, model_folder, text_file, tmp_path):
    shutil.copytree(model_folder("llama"), tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    failing(forked, tmp_path, *arguments(tmp_path / "m", text_file))


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGHUP, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_interrupted_run_says_so_and_leaves_a_record(model_folder, text_file, tmp_path, number, code):
    """A batch system's preemption or Ctrl-C while it works: its exit code, one line, a record that says interrupted."""
    given = [
        COMMAND,
        *arguments(
            model_folder("llama"), text_file, "method.calibration_tokens=100000000", "eval.text.test_sequences=null"
        ),
    ]
    process = subprocess.Popen(
        given, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # noqa: PLW1509 - background jobs of a shell ignore it
    )  # fmt: skip
    for line in process.stderr:
        if "evaluating" in line:
            break
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert [line for line in err.splitlines() if "told to stop" in line] == [
        f"interrupted: told to stop by {number.name}"
    ]
    record = json.loads((tmp_path / json.loads(out.strip().splitlines()[-1])["record"]).read_text())
    assert record["status"] == "interrupted" and not list(tmp_path.rglob("*.partial"))


def test_killed_child_still_has_a_record(model_folder, text_file, tmp_path):
    """kill -9 of the working process: the parent writes what happened and exits with 1."""
    given = [COMMAND, *arguments(model_folder("llama"), text_file)]
    process = subprocess.Popen(given, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    out, err = kill_at_work(process)
    assert process.returncode == 1 and "SIGKILL" in err
    assert json.loads(out.strip().splitlines()[-1])["status"] == "failed"


def test_sweep_goes_on_after_a_failed_run(forked, model_folder, text_file, tmp_path):
    shutil.copytree(model_folder("llama"), tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    given = [a for a in arguments("x", text_file, "measure.latency=false") if not a.startswith("model.path")]
    process = forked("-m", *given, f"model.path={tmp_path / 'broken'},{model_folder('llama')}")
    assert process.returncode == 1
    states = sorted(json.loads(p.read_text())["status"] for p in tmp_path.rglob("result.json"))
    assert states == ["failed", "finished"]
