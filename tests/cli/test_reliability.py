"""What may go wrong, through the installed command: nothing finished is lost, nothing half-written is read as a result,
and a second start completes. (An unreachable W&B server is in test_tracking.py.)
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch

from sparsebench.records import record, state
from tests.helpers import COMMAND, record_of, tiny_model, tiny_tokenizer

SMALL = ("dataset.sequence_length=32", "method.calibration_tokens=512", "eval.text.test_sequences=8",
         "measure.latency=false", "wandb.mode=disabled", "hardware=cpu", "hardware.threads=1")  # fmt: skip


@pytest.fixture
def arguments(model_folder, text_file):
    return ["model=hf", f"model.path={model_folder('llama')}", "dataset=text", f"dataset.path={text_file}", *SMALL]


@pytest.fixture
def start(tmp_path):
    """Start the command without waiting for it."""
    started = []

    def begin(*arguments, **kwargs) -> subprocess.Popen:
        process = subprocess.Popen(
            [COMMAND, *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"}, **kwargs,
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def records(folder: Path) -> dict[Path, dict]:
    """Every result.json below `folder`, each of which must be whole."""
    values = {}
    for file in folder.rglob("result.json"):
        json.loads(file.read_text())
        values[file] = record.read(file)
        assert values[file] is not None, file
    return values


def check_whole(folder: Path) -> dict[Path, dict]:
    """What lies in an output folder is whole: records, states, outcomes."""
    for file in folder.rglob("*.safetensors"):
        assert state.read(file) is not None, file
    for file in folder.rglob("sweeps/*/[0-9]*.json"):
        json.loads(file.read_text())
    return records(folder)


def last_line(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


def child_of(process: subprocess.Popen, output: Path) -> psutil.Process:
    """The process of the run itself, once it works."""
    while process.poll() is None and not list(output.glob("*/*/*/run.log")):
        time.sleep(0.02)
    return psutil.Process(process.pid).children()[0]


# ---------------------------------------------------------------------------------------------------------------------
# Killed


def kill_and_complete(start, output: Path, command: list[str], moments: list[float], num_records: int) -> list[dict]:
    """Start `command`, kill -9 it at each moment (seconds after its start), then let it complete."""
    finished: dict[Path, str] = {}
    for moment in moments:
        process = start(*command)
        children = []
        end = time.monotonic() + moment
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.communicate()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive, "a run outlived its killed parent"
        actual = check_whole(output) if output.exists() else {}
        for file, before in finished.items():
            assert actual[file]["started_at"] == before, "a finished run was lost or made again"
        finished = {f: r["started_at"] for f, r in actual.items() if r["status"] == "finished"}
    process = start(*command)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    actual = check_whole(output)
    assert len(actual) == num_records and {r["status"] for r in actual.values()} == {"finished"}
    assert all(actual[file]["started_at"] == before for file, before in finished.items())
    return list(actual.values())


def moments(seed: int, count: int, length: float) -> list[float]:
    """Random moments of a process that takes `length` seconds; most of them after the imports."""
    chosen = random.Random(seed)
    return [chosen.uniform(0.3, length) for _ in range(count)]


@pytest.mark.slow
def test_kill_9_of_a_run(start, arguments, tmp_path, count=10):
    start_at = time.monotonic()
    (whole,) = kill_and_complete(start, tmp_path / "a", [*arguments, "output_dir=a"], [], 1)
    length = time.monotonic() - start_at
    (resumed,) = kill_and_complete(
        start, tmp_path / "b", [*arguments, "output_dir=b"], moments(count, count, length), 1
    )
    assert resumed["quality"] == whole["quality"] and resumed["sparsity"] == whole["sparsity"]


@pytest.mark.parametrize("count", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_kill_9_of_a_sweep(start, arguments, tmp_path, count):
    sweep = ["-m", *arguments, "method.sparsity=0.2,0.4,0.6", "output_dir=o"]
    actual = kill_and_complete(start, tmp_path / "o", sweep, moments(7 + count, count, 7 if count == 1 else 12), 3)
    assert {r["config"]["method"]["sparsity"] for r in actual} == {0.2, 0.4, 0.6}


def test_a_killed_child_is_a_failed_record_and_a_second_start_completes(start, arguments, forked, tmp_path):
    """What the kernel's out-of-memory killer does: SIGKILL to the run's own process."""
    process = start(*arguments)
    child = child_of(process, tmp_path / "outputs")
    child.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "ended without a record: SIGKILL (out of memory?)" in err
    (record,) = check_whole(tmp_path / "outputs").values()
    assert record["status"] == "failed" and record["error"]["type"] == "ProcessDied"
    assert record_of(forked(*arguments), tmp_path)["status"] == "finished"


def test_ctrl_c_ends_a_sweep_with_its_table(start, arguments, tmp_path):
    process = start("-m", *arguments, "method.sparsity=0.2,0.4,0.6", "output_dir=o", start_new_session=True,
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # whatever the tests' own shell set  # fmt: skip
    child_of(process, tmp_path / "o")
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    said = [line for line in err.splitlines() if line.startswith("interrupted: told to stop by SIG")]
    assert len(said) == 2 and "Traceback" not in err, err  # the run's line and the sweep's; 40 of traceback before
    outcomes = last_line(out)["outcomes"]
    assert outcomes["not run"] >= 2 and sum(outcomes.values()) == 3
    assert all(r["status"] == "interrupted" for r in check_whole(tmp_path / "o").values())


# ---------------------------------------------------------------------------------------------------------------------
# The file system


@pytest.fixture
def small_disk(tmp_path):
    """A function size -> tmpfs of that size mounted at tmp_path/disk; needs the right to mount."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str, action=("-t", "tmpfs", "tmpfs")):
        done = subprocess.run(["mount", *action, "-o", options, disk], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")
        return disk

    yield mount
    subprocess.run(["umount", disk], capture_output=True)


def test_disk_full_then_space_again(forked, arguments, small_disk, tmp_path):
    small_disk("size=32k")
    full = forked(*arguments, "output_dir=disk")
    assert full.returncode == 1
    assert "No space left on device" in full.stderr and "Traceback" not in full.stderr
    assert all(r["status"] == "failed" for r in check_whole(tmp_path / "disk").values())
    small_disk("remount,size=64m", ())
    assert record_of(forked(*arguments, "output_dir=disk"), tmp_path)["status"] == "finished"
    check_whole(tmp_path / "disk")


def test_read_only_output(forked, arguments, small_disk):
    disk = small_disk("size=1m")
    small_disk("remount,ro", ())
    for command in ((), ("-m",)):
        process = forked(*command, *arguments, f"output_dir={disk}/outputs")
        assert process.returncode == 2
        (line,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
        assert (
            "Read-only file system" in line
            and f"output_dir must be a folder that can be written, got '{disk}/outputs'" in line
        )
        assert "Traceback" not in process.stderr


def test_corrupt_record_and_corrupt_state_are_made_again(forked, arguments, tmp_path):
    first = record_of(forked(*arguments), tmp_path)
    (result,) = (tmp_path / "outputs").rglob("result.json")
    (cached,) = (tmp_path / "outputs" / "states").glob("*.safetensors")
    result.write_text(result.read_text()[:1000])
    cached.write_bytes(cached.read_bytes()[:-20])
    process = forked(*arguments)
    second = record_of(process, tmp_path)
    assert "is damaged" in process.stderr and "fitting again" in process.stderr
    assert second["quality"] == first["quality"] and second["fit"]["cached"] is False
    check_whole(tmp_path / "outputs")


def test_two_sweeps_at_once_share_one_folder(forked, arguments, tmp_path):
    sweep = ("-m", *arguments, "method.sparsity=0.2,0.4", "output_dir=o")
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: forked(*sweep), range(2)))
    assert [p.returncode for p in both] == [0, 0], both
    summaries = [last_line(p.stdout) for p in both]
    assert summaries[0]["sweep"] != summaries[1]["sweep"]
    actual = check_whole(tmp_path / "o")
    assert len(actual) == 2 and sorted(r["fit"]["cached"] for r in actual.values()) == [False, True]


@pytest.mark.slow
def test_the_clock_runs_backwards(start, arguments, tmp_path, monkeypatch):
    """Every look at the wall clock shows an earlier time than the one before."""
    (tmp_path / "backwards").mkdir()
    (tmp_path / "backwards" / "sitecustomize.py").write_text(
        "import time\n_start, _real = time.time(), time.time\ntime.time = lambda: _start - 1000 * (_real() - _start)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'backwards'}:{os.environ.get('PYTHONPATH', '')}")
    command = ["-m", *arguments, "method.sparsity=0.2,0.4", "output_dir=o"]
    out, err = start(*command).communicate(timeout=200)
    assert last_line(out)["outcomes"] == {"finished": 2}, err
    actual = check_whole(tmp_path / "o")
    assert all(r["seconds"] > 0 for r in actual.values())
    for file in actual:  # and a record that seems to come from the future is still the record
        os.utime(file, (4e9, 4e9))
    out, err = start(*command).communicate(timeout=200)
    assert last_line(out)["outcomes"] == {"finished before": 2}, err


OTHER_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_text_is_utf8_whatever_the_locale(sparsebench):
    process = sparsebench("--cfg", "job", "output_dir='aüs'", env=OTHER_LOCALE, encoding="utf-8")
    assert process.returncode == 0 and "output_dir: aüs" in process.stdout, process.stderr


@pytest.mark.slow
def test_a_failing_runs_own_message_in_another_locale(sparsebench, text_file, bad_inputs, tmp_path):
    """Before: `the run's process ended without a record`."""
    shutil.copytree(bad_inputs / "cut", tmp_path / "mödel")
    process = sparsebench(
        "model=hf", "model.path='mödel'", "dataset=text", f"dataset.path={text_file}", *SMALL, "output_dir='aüs'",
        env=OTHER_LOCALE, encoding="utf-8",
    )  # fmt: skip
    assert process.returncode == 1 and "ended without a record" not in process.stderr, process.stderr
    (content,) = check_whole(tmp_path / "aüs").values()
    assert content["error"]["traceback"] and content["config"]["output_dir"] == "aüs"


# ---------------------------------------------------------------------------------------------------------------------
# Inputs and memory


def test_out_of_memory_says_so(sparsebench, text_file, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (int(4.5e9),) * 2)

    process = sparsebench(
        "model=llama2-7b", "model.weights=random", "model.num_layers=8", "dataset=text", f"dataset.path={text_file}", *SMALL,
        preexec_fn=limit,
    )  # fmt: skip
    assert process.returncode == 1, process.stderr
    assert "out of memory" in process.stderr and "Traceback" not in process.stderr
    (record,) = check_whole(tmp_path / "outputs").values()
    assert (
        record["status"] == "failed" and "out of memory" in record["error"]["message"] and record["error"]["traceback"]
    )


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory):
    """Model folders with NaN weights and with a cut-off file."""
    root = tmp_path_factory.mktemp("bad")
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    for name in ("nan", "cut"):
        broken.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    weights = root / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return root


def test_bad_weights_are_one_line_each_and_a_failed_record(forked, arguments, bad_inputs, tmp_path):
    rest = [a for a in arguments if not a.startswith("model.path")]
    models = forked("-m", *rest, f"model.path={bad_inputs}/nan,{bad_inputs}/cut")
    assert models.returncode == 1
    values = [r["error"]["message"] for r in check_whole(tmp_path / "outputs").values()]
    assert len(values) == 2 and all("\n" not in message for message in values)
    for text in ("not finite (NaN or infinite weights?)", "safetensor"):
        assert sum(text.lower() in message.lower() for message in values) == 1, (text, values)
