"""Training from scratch: one folder per recipe, trained once, whole or not there."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

from sparsebench.training import from_scratch
from tests.helpers import training_settings, work


class Pairs:
    """Eight inputs with their targets, as training takes rows."""

    unit = "rows"

    def __len__(self):
        return 8

    def __getitem__(self, rows):
        return torch.eye(8)[rows]


def trained(folder: Path, name="tiny", shape=None, save=None) -> tuple[Path, list]:
    """(the folder, whether it was trained now)."""
    begun = []

    def begin():
        begun.append(True)
        torch.manual_seed(0)
        return nn.Linear(8, 1), Pairs()

    def keep(module, target):
        target.mkdir()
        safetensors.torch.save_file(module.state_dict(), target / "model.safetensors")

    model = SimpleNamespace(name=name, train=training_settings(steps=4, batch_size=4))
    path = from_scratch.trained(
        model, shape or {"a": 1}, work(folder), begin, lambda m, h: {"steps": h.steps}, save or keep,
        loss=lambda module, batch: module(batch).square().mean(),
    )  # fmt: skip
    return path, begun


def test_trained_once_and_named_after_its_recipe(tmp_path):
    path, begun = trained(tmp_path)
    facts = json.loads((path / "training.json").read_text())
    assert begun and facts["a"] == 1 and facts["steps"] == 4 and facts["history"]
    assert trained(tmp_path) == (path, [])
    other, again = trained(tmp_path, shape={"a": 2})
    assert again and other != path
    assert {p.name for p in path.parent.iterdir() if p.is_dir()} == {path.name, other.name}  # no checkpoints left


def test_names_with_a_dot_keep_their_own_files(tmp_path):
    for shape in ({"a": 1}, {"a": 2}):
        path, _ = trained(tmp_path, name="tiny-3.2", shape=shape)
        assert path.with_name(path.name + ".lock").exists()


def test_what_a_crash_left_is_no_model(tmp_path):
    def broken(module, target):
        target.mkdir()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        trained(tmp_path, save=broken)

    assert not list((tmp_path / "models").glob("*/training.json"))
    path, begun = trained(tmp_path)
    (path / "training.json").unlink()  # as if an older version had been killed while it wrote into the folder
    assert begun and trained(tmp_path) == (path, [True])
    assert {p.name for p in path.iterdir()} == {"model.safetensors", "training.json"}
