"""What every method in methods/ must do for each kind of model it takes; new files are found by listing the folder."""

import functools
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

import sparsebench.methods
from sparsebench import config
from sparsebench.config.compose import compose_all
from sparsebench.methods.base import Method
from sparsebench.records import state
from tests.helpers import (
    KINDS,
    VisionTransformer,
    work,
)

NAMES = sorted(m.name for m in pkgutil.iter_modules(sparsebench.methods.__path__) if m.name != "base")
QUICK = Path(__file__).parents[1] / "methods" / "quick"  # <method>.txt: overrides that make its fit quick


def quick(name):
    file = QUICK / f"{name}.txt"
    return file.read_text().split() if file.exists() else []


def build(name, kind, *overrides):
    given = [f"method={name}", f"model={kind.default_model}", "hardware=cpu", *quick(name), *overrides]
    return config.build_settings(compose_all(given)[0]).method


def neutral_overrides(name):
    """The method's own word for settings at which it changes nothing, as overrides."""
    cls = next(c for c in vars(importlib.import_module(f"sparsebench.methods.{name}")).values() if is_method(c))
    return None if cls.neutral is None else [f"method.{k}={'null' if v is None else v}" for k, v in cls.neutral.items()]


def is_method(candidate):
    return isinstance(candidate, type) and issubclass(candidate, Method) and candidate is not Method


def kinds_for(name):
    """A tiny model of each kind that the method takes; of vision models the first that its checks let through."""
    module = importlib.import_module(f"sparsebench.methods.{name}")
    taken = {kind for c in vars(module).values() if is_method(c) for kind in c.kinds}
    if "language" in taken:
        yield "language", KINDS["language"]
    if "vision" in taken:
        for kind in (KINDS["vision"], VisionTransformer()):
            try:
                build(name, kind)
            except config.ConfigError:
                continue
            yield "vision", kind
            break


CASES = [pytest.param((name, each), id=f"{name}-{kind}") for name in NAMES for kind, each in kinds_for(name)]


def sparse_model(method, kind, fit, tmp_path):
    return method.apply(kind.loaded().module, fit, work(tmp_path))


def fitted(method, kind, tmp_path, data=None):
    return method.fit(kind.loaded(), data or kind.data(), work(tmp_path))


class Case:
    """A method with a tiny model of a kind that it takes, and what it fitted there without the test split."""

    def __init__(self, name, kind, folder):
        self.name, self.kind, self.folder = name, kind, folder

    @functools.cached_property
    def fit(self):
        known = self.kind.data()
        known.test = None  # touching it would fail
        return fitted(build(self.name, self.kind), self.kind, self.folder, known)

    def sparse_model(self):
        return sparse_model(build(self.name, self.kind), self.kind, self.fit, self.folder)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """Tests of one case stand together, so that most of them share its fit."""
    return Case(*request.param, tmp_path_factory.mktemp("fit"))


@pytest.mark.parametrize("name", NAMES)
def test_says_its_neutral_setting_and_takes_a_known_kind(name):
    assert neutral_overrides(name) is not None, f"{name}: say `neutral`, the settings at which it changes nothing"
    assert any(True for _ in kinds_for(name)), f"no kind of {name} has a tiny model here"


def test_neutral_setting_changes_nothing(case, tmp_path):
    kind, rows = case.kind, case.kind.inputs(3)
    method = build(case.name, kind, *neutral_overrides(case.name))
    sparse = sparse_model(method, kind, fitted(method, kind, tmp_path), tmp_path)
    actual, dense = kind.logits(sparse, rows), kind.logits(kind.loaded().module, rows)
    if not method.neutral_is_exact:
        torch.testing.assert_close(actual, dense, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(actual, dense)


def test_never_sees_test_data(case):
    assert case.fit.tensors is not None


def test_fit_is_deterministic_and_apply_needs_the_state_only(case, tmp_path):
    """The second fit stands beside test data that the first one did not have."""
    kind, second = case.kind, fitted(build(case.name, case.kind), case.kind, tmp_path)
    assert case.fit.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(case.fit.tensors[k], second.tensors[k]) for k in second.tensors)
    state.write(case.fit, tmp_path / "s.safetensors")
    rows = kind.inputs(3)
    fresh = kind.logits(case.sparse_model(), rows)
    reloaded = state.read(tmp_path / "s.safetensors")
    again = kind.logits(sparse_model(build(case.name, kind), kind, reloaded, tmp_path), rows)
    assert torch.equal(fresh, again)


def test_batch_size_and_order_do_not_matter(case):
    model, rows = case.sparse_model(), case.kind.inputs(6)
    apart = torch.cat([case.kind.logits(model, row[None]) for row in rows.flip(0)]).flip(0)
    torch.testing.assert_close(case.kind.logits(model, rows), apart, rtol=1e-3, atol=1e-3)


def test_measured_is_near_requested(case):
    requested = build(case.name, case.kind).requested
    if requested:
        assert case.kind.measured(case.sparse_model()) == pytest.approx(requested, abs=0.05)
