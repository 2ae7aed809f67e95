"""Sweeps through the command: outcomes, resuming, shared fits, fail_fast; launchers and Optuna where they are installed."""

import importlib.util
import json
import shutil

import pytest
import yaml

from sparsebench import sweep
from sparsebench.records import files
from tests.helpers import made

SMALL = ("dataset.sequence_length=32", "method.calibration_tokens=512", "eval.text.test_sequences=8",
         "measure.latency=false", "wandb.mode=disabled", "hardware=cpu", "hardware.threads=1")  # fmt: skip


@pytest.fixture
def base(model_folder, text_file):
    return (
        "-m",
        "model=hf",
        f"model.path={model_folder('llama')}",
        "dataset=text",
        f"dataset.path={text_file}",
        *SMALL,
    )


@pytest.fixture
def command(forked, base):
    """A function that sweeps over the tiny model: returns (finished process, its last line)."""
    return lambda *arguments: with_last_line(forked(*base, *arguments))


@pytest.fixture
def installed(sparsebench, base):
    """The same, through the installed command: a launcher's workers start as it did."""
    return lambda *arguments: with_last_line(sparsebench(*base, *arguments))


def with_last_line(process):
    lines = process.stdout.strip().splitlines()
    return process, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None


def absent(module):
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:  # not even the package it would lie in
        return True


def needs(*modules):
    missing = [m for m in modules if absent(m)]
    return pytest.mark.skipif(
        bool(missing), reason=f"needs {', '.join(missing)}: pip install sparsebench[sweep,launchers]"
    )


def test_one_failure_stops_nothing_and_hides_nowhere(command, model_folder, tmp_path):
    """A model cut short fails; the other runs finish; the fit is made once; a second start resumes."""
    good, cut = model_folder("llama"), tmp_path / "cut"
    shutil.copytree(good, cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-1000])
    process, last = command(f"model.path={cut},{good}", "method.sparsity=0.25,0.5")
    assert process.returncode == 1
    assert last["outcomes"] == {"finished": 2, "failed": 2} and last["status"] == "failed"
    assert process.stderr.count("Traceback (most recent call last)") == 2
    assert process.stderr.lower().count("safetensor") >= 2 and "failed: " in process.stdout
    records = [json.loads((tmp_path / path).read_text()) for path in last["records"]]
    failed = [r for r in records if r["status"] == "failed"]
    assert len(failed) == 2 and all("Traceback" in r["error"]["traceback"] for r in failed)
    fits = [r["fit"] for r in records if r["status"] == "finished"]
    assert [f["cached"] for f in fits] == [False, True] and fits[0]["state"] == fits[1]["state"]
    again, second = command(f"model.path={good},{cut}", "method.sparsity=0.25,0.5", "fail_fast=true")
    assert second["outcomes"] == {"finished before": 2, "failed": 1, "not run": 1} and again.returncode == 1
    assert second["sweep"] != last["sweep"] and second["records"][:2] == last["records"][2:]


def test_a_wrong_point_is_said_before_anything_runs(command, tmp_path):
    process, _ = command("method.sparsity=0.3,1.5")
    assert process.returncode == 2
    assert process.stderr.strip() == "error: method.sparsity must be a number in [0, 1), got 1.5"
    assert not (tmp_path / "outputs").exists()


def test_folders_and_groups(tmp_path, monkeypatch):
    overrides = ["method.sparsity=0.1,0.2", "output_dir=a"]
    first, second = (sweep.new_folder(str(tmp_path), overrides) for _ in range(2))
    assert first != second and sweep.group_of(first) == sweep.group_of(second) == sweep.group_name(overrides)
    others = ["force=true", "output_dir=b", "hydra/launcher=joblib", "wandb.mode=disabled", "method.sparsity=0.1,0.2"]
    assert sweep.group_name(others) == sweep.group_name(overrides)
    assert sweep.group_name(["method.sparsity=0.1,0.3"]) != sweep.group_name(overrides)


def finished(dense, sparse, sparsity, higher=False):
    metric = {"dense": dense, "sparse": sparse, "higher_is_better": higher}
    return {"status": "finished", "quality": {"m": metric}, "sparsity": {"model_wide": sparsity}}


def test_objective_is_sparsity_within_the_budget():
    assert sweep.objective(finished(10, 10.4, 0.6), 1.05) == 0.6
    assert sweep.objective(finished(10, 12, 0.8), 1.05) == pytest.approx(-0.15)
    assert sweep.objective(finished(0.9, 0.88, 0.7, higher=True), 1.05) == 0.7
    assert sweep.objective(finished(0.9, 0.45, 0.7, higher=True), 1.05) == pytest.approx(-0.95)
    assert sweep.objective({"status": "failed", "quality": None}, 1.05) == sweep.FAILED_OBJECTIVE
    assert sweep.objective(finished(0.9, 0.0, 0.7, higher=True), 1.05) == sweep.FAILED_OBJECTIVE


def test_the_table_names_what_no_job_reported_and_what_varies_in_it(tmp_path, capsys):
    common, (a, b) = ["method=teal", "wandb.mode=disabled"], (tmp_path / name / "result.json" for name in "ab")
    outcome = finished(10, 11, 0.5)
    outcome["quality"]["m"] |= {"ratio": 1.1, "ratio_stderr": 0.02}
    sweep.note(tmp_path, 0, [*common, "seed=1"], a, outcome, sweep.FINISHED)
    assert sweep.show(tmp_path, {a: [*common, "seed=1"]})
    assert not sweep.show(tmp_path, {a: [*common, "seed=1"], b: [*common, "seed=2"]})
    shown = capsys.readouterr().out.strip().splitlines()
    assert json.loads(shown[-1])["outcomes"] == {"finished": 1, "not run": 1}
    (line,) = (each for each in shown if "not run" in each and "{" not in each)
    assert "seed=2" in line and "method" not in line
    assert any("1.10 ± 0.02x" in each and "seed=1" in each for each in shown)
    assert sum(each.startswith("next: sparsebench-report ") for each in shown) == 2
    assert files.plain(sweep.outcomes(tmp_path))[0]["sparsity"] == 0.5


@needs("hydra_plugins.hydra_joblib_launcher")
def test_joblib_two_processes(installed):
    process, last = installed("method.sparsity=0.3,0.6", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert process.returncode == 0, process.stderr
    assert last["outcomes"] == {"finished": 2}


@needs("hydra_plugins.hydra_submitit_launcher")
def test_submitit_local_executor(installed):
    process, last = installed(
        "method.sparsity=0.3,0.6", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"
    )
    assert process.returncode == 0, process.stderr
    assert last["outcomes"] == {"finished": 2}


@needs("hydra_plugins.hydra_ray_launcher")
@pytest.mark.slow
def test_ray(installed):
    process, last = installed("method.sparsity=0.3,0.6", "hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2")
    assert process.returncode == 0, process.stderr
    assert last["outcomes"] == {"finished": 2}


@needs("hydra_plugins.hydra_optuna_sweeper")
def test_optuna_seeks_the_largest_sparsity_within_the_budget(command, tmp_path):
    process, last = command(
        "hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=5", "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.sampler.seed=1", "method.sparsity=interval(0.1,0.9)", "sweep.budget=1.05",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert sum(last["outcomes"].values()) == 5 and last["status"] == "finished"
    values = [sweep.objective(json.loads((tmp_path / path).read_text()), 1.05) for path in last["records"]]

    best = yaml.safe_load((tmp_path / last["sweep"] / "optimization_results.yaml").read_text())
    assert best["best_value"] == pytest.approx(max(values))


def test_a_row_shows_spread_dense_engine_and_noise():
    record = made()
    dense = {"median_ms": 1.0, "p10_ms": 0.9, "p90_ms": 1.4}
    sparse = {"median_ms": 0.5, "p10_ms": 0.45, "p90_ms": 0.6}
    decode = {"dense": dense, "sparse": sparse, "dense_engine": "fused", "speedup": 2.0}
    record["latency"] |= {"decode": decode, "noisy": True}
    each = {"overrides": [], "record": "r/result.json", "outcome": "finished", **sweep.figures(record)}
    cells = dict(zip(sweep.HEADINGS, sweep.row(each, set()), strict=True))
    assert cells["ms [p10, p90]"] == "1.000 [0.900, 1.400] (fused) -> 0.500 [0.450, 0.600]"
    assert cells["speed-up"] == "2.00x NOISY"
    nothing = {"overrides": [], "record": "r/result.json", "outcome": "failed", **sweep.figures(None)}
    assert sweep.row(nothing, set())[5:7] == ["", ""]
