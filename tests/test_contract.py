"""What every method in methods/ must do; new files are found by listing the folder."""

import pkgutil

import pytest
import torch

import sparsebench.methods
from sparsebench import config, evaluate, sparsity, state
from sparsebench.data.text import Document, Split, TextData
from sparsebench.models.language import Loaded
from tests.conftest import TEXT, tiny_model, tiny_tokenizer
from tests.test_teal import work

NAMES = sorted(m.name for m in pkgutil.iter_modules(sparsebench.methods.__path__))
NEUTRAL = {  # the setting at which a method changes nothing
    "cats": ["method.sparsity=0"],
    "dense": [],
    "duogpt": ["method.sparsity=0", "method.weight_sparsity=0", "method.alpha=0"],
    "larosa": ["method.sparsity=0"],
    "rsparse": ["method.sparsity=0", "method.rho=1"],
    "teal": ["method.sparsity=0"],
    "wina": ["method.sparsity=0", "method.rotate=false"],
}


FAST = {"duogpt": ["method.calibration_tokens=1024"]}  # it passes over the text ten times


def data():
    documents = [Document(str(i), part) for i, part in enumerate(TEXT.split("\n\n"))]
    cuts = {"fit": documents[:80], "dev": documents[80:100], "test": documents[100:]}
    found = TextData(**{n: Split(n, d, 32, "none", 0) for n, d in cuts.items()}, info={})
    found.set_tokenizer(tiny_tokenizer())
    return found


def build(name, *overrides):
    return config.build_settings(
        config.compose_all([f"method={name}", "hardware=cpu", *FAST.get(name, []), *overrides])[0]
    ).method


def sparse_model(method, fit, tmp_path):
    return method.apply(tiny_model(), fit, work(tmp_path))


def fitted(method, tmp_path):
    return method.fit(Loaded(tiny_model(), tiny_tokenizer(), {}), data(), work(tmp_path))


def logits(model, rows):
    with torch.no_grad():
        return model(input_ids=rows, use_cache=False).logits


@pytest.mark.parametrize("name", NAMES)
def test_has_a_neutral_setting_listed_here(name):
    assert name in NEUTRAL, f"add method {name} to NEUTRAL"


@pytest.mark.parametrize("name", NAMES)
def test_neutral_setting_changes_nothing(name, tmp_path):
    method = build(name, *NEUTRAL[name])
    rows = data().test.sequences(3)
    assert torch.equal(
        logits(sparse_model(method, fitted(method, tmp_path), tmp_path), rows), logits(tiny_model(), rows)
    )


@pytest.mark.parametrize("name", NAMES)
def test_fit_is_deterministic_and_apply_needs_the_state_only(name, tmp_path):
    method = build(name)
    first, second = fitted(method, tmp_path / "a"), fitted(method, tmp_path / "b")
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[k], second.tensors[k]) for k in first.tensors)
    state.write(first, tmp_path / "s.safetensors")
    rows = data().test.sequences(3)
    fresh = logits(sparse_model(method, first, tmp_path), rows)
    again = logits(sparse_model(build(name), state.read(tmp_path / "s.safetensors"), tmp_path), rows)
    assert torch.equal(fresh, again)


@pytest.mark.parametrize("name", NAMES)
def test_batch_size_and_order_do_not_matter(name, tmp_path):
    method = build(name)
    model = sparse_model(method, fitted(method, tmp_path), tmp_path)
    rows = data().test.sequences(6)
    together, apart = logits(model, rows), torch.cat([logits(model, row[None]) for row in rows.flip(0)]).flip(0)
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_measured_is_near_requested(name, tmp_path):
    method = build(name)
    model = sparse_model(method, fitted(method, tmp_path), tmp_path)
    _, counters = evaluate.language_quality(model, data().test, None, 4)
    found = sparsity.summarise(model, counters)
    if method.requested:
        weights = {site: share.weight for site, share in found.items()}
        shares = {site: share.sparsity for site, share in found.items()}
        assert sparsity.model_wide(shares, weights) == pytest.approx(method.requested, abs=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_never_sees_test_data(name, tmp_path):
    method = build(name)
    known = data()
    known.test = None  # touching it would fail
    method.fit(Loaded(tiny_model(), tiny_tokenizer(), {}), known, work(tmp_path))
