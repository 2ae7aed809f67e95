"""What values and paths say before anything is loaded; nothing is left behind by looking."""

import os

import pytest

from sparsebench import config
from sparsebench.config import early
from sparsebench.config.compose import compose_all, name_of


def test_paths_that_no_system_takes(tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    given = compose_all(["dataset=text", f"dataset.path={tmp_path}/circle", f"output_dir={tmp_path}/{'a' * 300}"])[0]
    lines = early.refused_paths(given)
    assert [line.partition(" ")[0] for line in lines] == ["dataset.path", "output_dir"]
    assert "symbolic links" in lines[0] and "File name too long" in lines[1] and len(lines[1]) < 250
    given["output_dir"], given["dataset"]["path"] = "a\0b", "/nowhere"
    assert [line.partition(" ")[0] for line in early.refused_paths(given)] == ["output_dir"]


def test_a_folder_that_can_be_made_is_not_made(tmp_path):
    assert early.output_problem(str(tmp_path / "a" / "b")) is None and not list(tmp_path.iterdir())
    assert early.output_problem(str(tmp_path)) is None and not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    assert "Not a directory" in early.output_problem(str(tmp_path / "file" / "b"))
    longer = str(tmp_path / "new" / ("b" * 300))
    assert "can be made" in early.output_problem(longer) and os.listdir(tmp_path) == ["file"]


def test_values_that_are_plainly_wrong_are_said_without_the_classes():
    """In the same lines as by them; before, each such line came after seconds of imports."""
    assert not early.wrong_values(compose_all([])[0], early.SETTINGS["config"])
    for given in (
        "method.sparsity=2", "method.sparsity=x", "seed=-1", "method.greedy.stop=7", "hardware.kernel=none", "model.name=a/b",
        "hardware.dtype=bf16", "eval.neurons.aggregate=4", "measure.latency=fast", "wandb.mode=off", "output_dir=null",
    ):  # fmt: skip
        (configuration,) = compose_all([given])
        with pytest.raises(config.ConfigError) as error:
            config.build_settings(configuration)
        assert early.wrong_values(configuration, early.SETTINGS["config"]) == error.value.problems, given


def test_a_model_is_named_after_its_folder_or_id(tmp_path):
    named = {
        "HuggingFaceTB/SmolLM2-135M": "SmolLM2-135M",
        "/models/Qwen 2.5 (7B)/": "Qwen-2.5-7B-",
        "/cache/models--owner--name/snapshots/0123abcd": "name",
        "/files/model-Q4_0.gguf": "model-Q4_0",
        "": "model",
    }
    assert {path: name_of(path) for path in named} == named
    (one,) = compose_all(["model=hf", f"model.path={tmp_path}"])
    (two,) = compose_all(["model=hf", f"model.path={tmp_path}", "model.name=mine"])
    assert (one["model"]["name"], two["model"]["name"]) == (tmp_path.name, "mine")
