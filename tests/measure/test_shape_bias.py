"""Shape bias: the scorer against published figures, the pictures' way through a classifier, wrong folders."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sparsebench import config, tasks
from sparsebench.config.compose import compose_all
from sparsebench.data.image_sources import Files
from sparsebench.data.images import Recipe
from sparsebench.measure import shape_bias
from sparsebench.models import Loaded
from tests.helpers import tiny_cnn, tiny_images

PUBLISHED = {  # keep: (bias, cue accuracy) over 1,200 trials, docs/methods/spatial_topk.md
    "alexnet": {
        1: (0.239, 0.630), 0.5: (0.435, 0.483), 0.4: (0.538, 0.451), 0.3: (0.633, 0.398), 0.2: (0.710, 0.391),
        0.1: (0.719, 0.321), 0.05: (0.631, 0.246),
    },
    "vgg16": {
        1: (0.079, 0.807), 0.5: (0.097, 0.753), 0.4: (0.151, 0.697), 0.3: (0.240, 0.627), 0.2: (0.384, 0.547),
        0.1: (0.555, 0.455), 0.05: (0.584, 0.337),
    },
}  # fmt: skip


def trials(shapes: int, textures: int, total: int = 1200, equal: int = 80) -> list[tuple[str, str, str]]:
    neither = total - shapes - textures
    rows = (
        [("cat", "cat", "clock")] * shapes
        + [("clock", "cat", "clock")] * textures
        + [("car", "cat", "clock")] * neither
    )
    return rows + [("cat", "cat", "cat")] * equal


@pytest.mark.parametrize("network", PUBLISHED)
def test_published_figures_from_their_trials(network):
    """docs/methods/metrics.md, Shape bias: bias and cue accuracy to 1e-3, images with equal cues left out."""
    for bias, accuracy in PUBLISHED[network].values():
        answered = round(1200 * accuracy)
        actual = shape_bias.score(trials(round(bias * answered), answered - round(bias * answered)))
        assert actual["shape_bias"] == pytest.approx(bias, abs=1e-3)
        assert actual["cue_accuracy"] == pytest.approx(accuracy, abs=1e-3)
        assert actual["trials"] == 1200


def test_counts_that_were_published_with_the_figures():
    """AlexNet: shape answers 181 to 277, texture answers 575 to 108, dense and at keep 0.1."""
    assert shape_bias.score(trials(181, 575))["shape_bias"] == pytest.approx(0.239, abs=1e-3)
    assert shape_bias.score(trials(277, 108))["shape_bias"] == pytest.approx(0.719, abs=1e-3)


def test_no_answer_at_all_is_no_bias():
    assert shape_bias.score([("car", "cat", "clock")])["shape_bias"] is None
    assert shape_bias.score([])["cue_accuracy"] is None


class Brightness(torch.nn.Module):
    """Class 0 where the picture is dark, 1 where it is grey, 2 where it is bright."""

    def __init__(self):
        super().__init__()
        self.centres = torch.nn.Parameter(torch.tensor([0.0, 0.5, 1.0]))

    def forward(self, x):
        return -100 * (x.mean((1, 2, 3))[:, None] - self.centres) ** 2


@pytest.fixture
def pictures(tmp_path):
    for name, value in (("dark1-grey2", 5), ("dark2-bright1", 250), ("grey1-bright3", 128), ("grey4-grey1", 128)):
        (tmp_path / "cues").mkdir(exist_ok=True)
        Image.fromarray(np.full((20, 20), value, np.uint8)).save(tmp_path / "cues" / f"{name}.png")
    return tmp_path / "cues"


class Data:
    def __init__(self, classes):
        self.classes, self.test = classes, self
        self.size, self.channels = 16, 1

    def read_files(self, paths):
        recipe = Recipe("of the set", self.size, None, (0.0,), (1.0,))
        return Files(paths, torch.zeros(len(paths))).read(torch.arange(len(paths)), False, recipe)

    def prepare(self, pixels):
        return pixels.float() / 255


def test_pictures_are_scored_by_name(pictures):
    actual = shape_bias.measure(Brightness(), Data(["dark", "grey", "bright"]), str(pictures), 2)
    assert actual == {
        "shape_bias": 2 / 3, "cue_accuracy": 1.0, "shape_answers": 2, "texture_answers": 1, "trials": 3,
    }  # fmt: skip


def test_names_of_several_classes_share_their_chances(pictures):
    data = Data(["a", "b", "c"])
    with pytest.raises(ValueError, match="bright, dark, grey must be among a, b, c"):
        shape_bias.measure(Brightness(), data, str(pictures), 2)
    (pictures / "groups.json").write_text(json.dumps({"dark": [0], "grey": [1], "bright": [2, 1]}))
    assert shape_bias.measure(Brightness(), data, str(pictures), 2)["trials"] == 3
    (pictures / "groups.json").write_text(json.dumps({"dark": [0], "grey": [7], "bright": [2]}))
    with pytest.raises(ValueError, match="names class 7, the data set has 3"):
        shape_bias.measure(Brightness(), data, str(pictures), 2)


def settings_with(folder):
    given = ["model=lenet5", "method=spatial_topk", f"eval.classifier.cue_conflict={folder}", "hardware=cpu"]
    return config.build_settings(compose_all(given)[0])


def test_a_folder_without_such_pictures_is_refused(tmp_path):
    with pytest.raises(config.ConfigError) as error:
        settings_with(tmp_path)
    assert len(error.value.problems) == 1
    assert "eval.classifier.cue_conflict" in str(error.value) and "holds no image" in str(error.value)


def test_the_task_of_image_classifiers_measures_it(pictures, monkeypatch):
    asked = []
    monkeypatch.setattr(
        shape_bias, "measure", lambda module, data, folder, size: asked.append((folder, size)) or {"x": 1}
    )
    loaded = Loaded(tiny_cnn(), None, {})
    actual = tasks.load("vision").assess(loaded, loaded.module, tiny_images(), settings_with(pictures))
    assert actual.further == {"shape_bias": {"x": 1}} and asked == [(str(pictures), 256)]
