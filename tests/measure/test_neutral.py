"""With nothing dropped the sparse model is the dense one, or the run ends with one line before anything is measured."""

import pytest
import torch

from sparsebench.measure import neutral, quality, sparsity
from sparsebench.methods.cats import Cats
from sparsebench.models import Loaded
from sparsebench.modules import gate_sparse, rotated_norm
from sparsebench.records.state import State
from sparsebench.sites import find_blocks
from tests.families import ROWS, Windows, family
from tests.helpers import KINDS, Rows, built, logits, tiny_model, work


def applied(name, kind, tmp_path, *given):
    method, model = built("method", f"method={name}", *given), family(kind)
    inputs, expected = neutral.probe(model, Windows)
    state = method.fit(Loaded(model, None, {}), Windows, work(tmp_path))
    return method, method.apply(family(kind), state, work(tmp_path)), inputs, expected


@pytest.mark.parametrize("name, kind", [("wina", "olmo2"), ("teal_rotated", "olmo3"), ("larosa", "exaone4")])
def test_rotating_post_norms_is_refused(kind, name, tmp_path, monkeypatch):
    """By the block before calibration, and without that by the logits (the rotated model differs by about 140 %)."""
    with pytest.raises(ValueError, match=r"norms in front of the maps they feed, and model.layers.0"):
        applied(name, kind, tmp_path)
    monkeypatch.setattr(rotated_norm, "check_fed", lambda model, blocks: None)
    method, sparse, inputs, expected = applied(name, kind, tmp_path, "method.calibration_tokens=64")
    with pytest.raises(
        ValueError, match=rf"method={name} does not fit \w+: with nothing dropped its logits differ"
    ) as line:
        neutral.check(method, sparse, inputs, expected)
    assert float(str(line.value).partition(" by ")[2].split()[0]) > 0.5 and "\n" not in str(line.value)


def test_a_norm_inside_the_ffn_is_not_left_out(tmp_path):
    with pytest.raises(ValueError, match="ffn_sub_norm beside gate, up, down"):
        applied("cats", "bitnet", tmp_path)


def test_the_check_itself_finds_a_norm_that_was_left_out():
    model = family("bitnet")
    inputs, expected = neutral.probe(model, Windows)
    for block in find_blocks(model):
        path = block.sites["gate"].path.rpartition(".")[0]
        ffn = gate_sparse.GateSparseFFN(model.get_submodule(path), block.index, 0.1)
        rotated_norm.replace(model, path, ffn)
    with pytest.raises(ValueError, match="method=cats does not fit BitNetForCausalLM"):
        neutral.check(built("method", "method=cats"), model, inputs, expected)


def test_what_changes_by_design_is_skipped_with_its_reason():
    duo = built("method", "method=duogpt")
    assert neutral.unchecked(duo) == "it changes the model itself (weight_sparsity, alpha)"
    assert "train" in neutral.unchecked(built("method", "method=prosparse"))
    assert neutral.unchecked(built("method", "method=topk", "method.train=null", "method.activation=null")) is None
    assert neutral.unchecked(Cats) is None and neutral.unchecked(built("method", "method=dense")) is None


def test_the_operating_point_is_put_back(tmp_path):
    method, sparse, inputs, expected = applied("teal", "llama", tmp_path, "method.calibration_tokens=64")
    before = logits(sparse, ROWS[:2])
    assert neutral.check(method, sparse, inputs, expected) < 1e-5
    assert torch.equal(logits(sparse, ROWS[:2]), before)


def test_images_are_checked_too(tmp_path):
    kind = KINDS["vision"]
    loaded, data = kind.loaded(), kind.data()
    inputs, expected = neutral.probe(loaded.module, data)
    method = built("method", "method=spatial_topk", "method.keep=0.2")
    sparse = method.apply(loaded.module, State(), work(tmp_path))
    assert neutral.check(method, sparse, inputs, expected) < 1e-6
    kept = [m.keep for m in sparse.modules() if hasattr(m, "keep") and not callable(m.keep)]
    assert set(kept) == {0.2}


# ---------------------------------------------------------------------------------------------------------------------
# Models that flatten their tokens before a map


@pytest.mark.parametrize("name", ["teal", "wina_plain", "rsparse"])
def test_opt_keeps_its_prompt_dense_where_asked(name, data, tmp_path):
    """OPT flattens [B, T] before fc1; prompt=none must leave every token of a whole text dense there, too."""
    method = built("method", f"method={name}", "method.prompt=none", "method.calibration_tokens=256")
    state = method.fit(Loaded(tiny_model("opt"), None, {}), data, work(tmp_path))
    sparse, rows = method.apply(tiny_model("opt"), state, work(tmp_path)), data.test.rows[:4]
    torch.testing.assert_close(logits(sparse, rows), logits(tiny_model("opt"), rows), rtol=1e-4, atol=1e-4)


def test_opt_counts_dense_and_sparse_tokens_of_every_site_alike(data, tmp_path):
    method = built("method", "method=teal", "method.prompt=half", "method.calibration_tokens=256")
    state = method.fit(Loaded(tiny_model("opt"), None, {}), data, work(tmp_path))
    sparse = method.apply(tiny_model("opt"), state, work(tmp_path))
    _, counters = quality.language_quality(sparse, Rows(data.test.rows[:4]), None, 2)
    actual = sparsity.summarise(sparse, counters)
    assert {(f.dense_tokens, f.sparse_tokens) for f in actual.values()} == {(64, 64)}
