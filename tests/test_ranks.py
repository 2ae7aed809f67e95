"""Several processes train as one, and a killed training ends as one never killed: through the installed command."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sparsebench import cli
from sparsebench.records import state
from tests import forks
from tests.helpers import COMMAND, record_of

STEPS = 24
TRAINING = [
    "method=prosparse", f"method.train.steps={STEPS}", "method.stages=[4,8,16,24]", "method.lambdas=[0,0.1,1,1]",
    "method.train.warmup=2", "method.train.precision=no", "method.train.batch_size=8", "method.train.micro_batch=2",
    "method.train.log_every=1", "method.train.checkpoint_every=3", "method.predictor=null", "method.dev_sequences=8",
    "dataset=text", "dataset.sequence_length=32", "hardware=cpu", "hardware.threads=1", "hardware.kernel=masked_dense",
    "measure.latency=false", "eval.text.test_sequences=8", "wandb.mode=disabled",
]  # fmt: skip


@pytest.fixture(scope="module")
def arguments(text_file, model_folder):
    return [
        *TRAINING,
        "model=hf",
        f"model.path={model_folder('llama')}",
        f"dataset.path={text_file}",
        "output_dir=outputs",
    ]


@pytest.fixture(scope="module")
def whole(warm, arguments, tmp_path_factory):
    """(a run of one process that nobody killed, its folder)."""
    folder = tmp_path_factory.mktemp("whole")
    process = forks.run(arguments, folder, warm, 300)
    assert process.returncode == 0, process.stderr
    return process, folder


def weights(folder: Path) -> dict:
    (file,) = (folder / "outputs" / "states").glob("*.safetensors")
    return state.read(file)


def test_two_processes_are_one(whole, tmp_path, arguments):
    """Same loss curve, penalty and weights at the same global batch; one record; followers leave no record."""
    (tmp_path / "both").mkdir()
    both = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
         COMMAND, *arguments],
        cwd=tmp_path / "both", capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert both.returncode == 0, both.stderr
    one, two = record_of(*whole), record_of(both, tmp_path / "both")
    assert (one["extra"]["processes"], two["extra"]["processes"]) == (1, 2)
    curves = [[(r["fit/loss"], r["fit/penalty"]) for r in record["extra"]["training"]] for record in (one, two)]
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-4, atol=1e-5)
    assert one["fit"]["tokens"] == two["fit"]["tokens"] == STEPS * 8 * 32
    first, second = weights(whole[1]), weights(tmp_path / "both")
    worst = max(float((first.tensors[k] - second.tensors[k]).abs().max()) for k in first.tensors)
    assert worst < 1e-3
    assert len(list((tmp_path / "both").rglob("result.json"))) == 1
    assert two["quality"]["perplexity"]["sparse"] == pytest.approx(one["quality"]["perplexity"]["sparse"], rel=1e-3)


def kill_at(arguments: list[str], folder: Path, step: int, said: Path, environment: dict[str, str]) -> None:
    """Start the command and kill -9 it once `step` steps of its training are logged."""
    said.mkdir()
    process = forks.begin(arguments, folder, said, environment, cli.main)
    while process.is_alive():
        logged = re.findall(r"^fit (\d+)/", (said / "err").read_text() if (said / "err").exists() else "", re.MULTILINE)
        if logged and int(logged[-1]) >= step:
            process.kill()
            break
        time.sleep(0.01)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def test_killed_three_times_ends_with_the_same_weights(whole, forked, tmp_path, arguments, warm):
    """kill -9 at three random steps of a ProSparse run; each start goes on from the last checkpoint."""
    folder = tmp_path / "killed"
    folder.mkdir()
    steps = sorted(random.Random().sample(range(4, STEPS - 6), 3))
    for step in steps:
        kill_at(arguments, folder, step, tmp_path / f"said-{step}", warm)
        time.sleep(0.5)
        assert not list((folder / "outputs").rglob("result.json"))
    last = forked(*arguments, folder=folder)
    assert last.returncode == 0, last.stderr
    record = record_of(last, folder)
    # a checkpoint may have been finished between the logged step and the signal
    assert record["extra"]["resumed_at"] >= (steps[-1] - 1) // 3 * 3, steps
    expected, resumed = weights(whole[1]), weights(folder)
    assert expected.tensors.keys() == resumed.tensors.keys()
    assert all(torch.equal(expected.tensors[k], resumed.tensors[k]) for k in expected.tensors), steps
    assert record["quality"] == record_of(*whole)["quality"]
    assert not list((folder / "outputs" / "states").glob("*/step-*"))  # checkpoints are gone once the state is safe


def test_divergence_is_reported_with_its_step(forked, tmp_path, arguments):
    process = forked(*arguments, "method.train.lr=1e6", "method.train.clip=null", "method.train.min_lr=1e6")
    assert process.returncode == 1
    assert "the loss is" in process.stderr and "at step" in process.stderr and "last checkpoint kept" in process.stderr
