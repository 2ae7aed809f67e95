"""The quick answers of the three commands, and what they say to a key or an option that is none."""

import subprocess

import pytest

import sparsebench as package
from sparsebench import config
from sparsebench.cli import FAILED_BESIDE, file_for
from sparsebench.config.arguments import read
from sparsebench.config.compose import compose_all, plan
from tests.helpers import COMMAND

THREE = ("sparsebench", "sparsebench-bench", "sparsebench-report")


def call(name, *given, **kwargs):
    return subprocess.run(
        [COMMAND.with_name(name), *given], capture_output=True, text=True, timeout=120, check=False, **kwargs
    )


@pytest.mark.parametrize("name", THREE)
def test_version(name, tmp_path):
    process = call(name, "--version", cwd=tmp_path)
    assert (process.returncode, process.stdout.strip()) == (0, f"{name} {package.__version__}")


def test_help_names_commands_groups_and_every_key(sparsebench):
    text = sparsebench("--help").stdout
    assert all(name in text for name in THREE) and "sparsebench --explain KEY" in text
    assert "paper/teal" in text and "eval.text.test_sequences=128" in text and "held-out windows scored" in text
    assert "method.sparsity=0.5" in text and "of each block's weights" in text
    assert (
        "method.sparsity"
        not in sparsebench("--help", "method=dense").stdout.split("== Keys")[1].split("sparsebench --explain")[0]
    )


def test_bench_describes_itself(tmp_path):
    text = call("sparsebench-bench", "--help", cwd=tmp_path).stdout
    assert "random weights" in text and "sparsebench-bench model=" in text
    assert "samples=30" in text and "timed repetitions kept" in text and "eval.text" not in text


@pytest.mark.parametrize(
    ("query", "pieces"),
    [
        (
            "eval.text.test_sequences",
            ["held-out windows scored", "default: 128", "allowed: a whole number > 0 or null"],
        ),
        ("test_sequences", ["eval.text.test_sequences", "default: 128"]),
        ("method=teal", ["TEAL (arXiv 2408.14690)", "method.greedy.stop=0.9"]),
    ],
)
def test_explain(query, pieces, sparsebench):
    process = sparsebench("--explain", query)
    assert process.returncode == 0 and all(piece in process.stdout for piece in pieces), process.stdout


@pytest.mark.parametrize("given", [["--help"], ["--explain", "method=teal"], ["--explain", "eval.text.batch_size"]])
def test_torch_stays_out_of_help_and_explain(given):
    script = (
        f"import sys; sys.argv = ['sparsebench', *{given!r}]\n"
        "from sparsebench import cli\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    assert call("python", "-c", script).stderr.strip() == "False"


def test_info_prints(sparsebench):
    assert "Config search path" in sparsebench("--info", "searchpath").stdout


def test_a_misplaced_key_in_a_file_of_ones_own_is_told_its_place(sparsebench, tmp_path):
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text("# @package _global_\neval:\n  test_sequences: 4\n")
    process = sparsebench("--config-dir", "own", "experiment=mine")
    assert process.returncode == 2 and "did you mean eval.text.test_sequences?" in process.stderr


def test_a_plugin_that_is_not_installed_names_its_extra(monkeypatch):
    from sparsebench.config import compose

    options = compose.options_of
    monkeypatch.setattr(compose, "options_of", lambda g: ["basic"] if g == "hydra/launcher" else options(g))
    with pytest.raises(config.ConfigError) as error:
        compose_all(["hydra/launcher=joblib"], sweep=True)
    assert error.value.problems == ["hydra/launcher=joblib is not installed: pip install 'sparsebench[launchers]'"]


def test_plugins_of_others_and_globs_of_no_group():
    said = {
        ("hydra/sweeper=ax",): "hydra/sweeper=ax is not installed: pip install hydra-ax-sweeper",
        ("hydra/launcher=rq",): "hydra/launcher=rq is not installed: pip install hydra-rq-launcher",
        ("hydra/launcher=nope",): "hydra/launcher must be one of basic",
        ("method.sparsity=glob(x)",): "'method.sparsity=glob(x)' matches nothing: glob() is for dataset, model, method",
        ("hydra.job.chdir=maybe",): "is not a valid bool",
        ("method=dense", "method.sparsity=0.5"): "method.sparsity is not a known key",
    }
    for given, words in said.items():
        with pytest.raises(config.ConfigError) as error:
            compose_all(list(given), sweep=True)
        (line,) = error.value.problems
        assert words in line, line


@pytest.mark.parametrize(
    "given",
    [
        ["method=teal", "-m", "method.sparsity=0.1,0.2", "seed=1"],
        ["-m", "method=teal", "--config-dir", "own", "method.sparsity=0.1,0.2", "seed=1"],
        ["method=teal", "--multirun", "method.sparsity=0.1,0.2", "--config-dir=own", "seed=1"],
    ],
)
def test_options_may_stand_between_keys(given):
    """`sparsebench method=teal -m method.sparsity=0.1,0.2`: before, "is no option"."""
    arguments = read("sparsebench", given)
    assert arguments.multirun and arguments.overrides == ["method=teal", "method.sparsity=0.1,0.2", "seed=1"]
    assert given[:3] == arguments.overrides and len(given) in (4, 5, 6)


def test_keys_that_only_some_swept_methods_have_apply_there():
    actual = plan(["method=dense,teal", "method.sparsity=0.25,0.5"], sweep=True)
    assert [c["method"].get("sparsity") for c in actual.configurations] == [None, None, 0.25, 0.5]
    assert actual.partial == {"method.sparsity=0.25,0.5"}
    with pytest.raises(config.ConfigError):
        compose_all(["method=dense,fatrelu", "method.sparsity=0.5"], sweep=True)
    assert len(compose_all(["method=glob(teal*)"], sweep=True)) == 2


def test_full_and_closed_standard_output(tmp_path):
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [COMMAND, "--cfg", "job"], stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path
        )
    assert process.returncode == 2 and process.stderr == "error: standard output: [Errno 28] No space left on device\n"
    process = subprocess.run(
        ["sh", "-c", f"{COMMAND} --cfg job >&-"], stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path
    )
    assert process.returncode == 2 and process.stderr == "error: standard output is closed\n"


def test_a_failed_record_never_takes_the_place_of_a_finished_one(tmp_path):
    kept = tmp_path / "result.json"
    assert file_for(tmp_path, "failed") == kept
    kept.write_text('{"schema_version": 1, "status": "failed"}')
    assert file_for(tmp_path, "failed") == kept
    kept.write_text('{"schema_version": 1, "status": "finished"}')
    assert file_for(tmp_path, "finished") == kept
    assert file_for(tmp_path, "interrupted") == tmp_path / FAILED_BESIDE
