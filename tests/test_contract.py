"""What every method in methods/ must do for each kind of model it takes; new files are found by listing the folder."""

import importlib
import pkgutil

import pytest
import torch

import sparsebench.methods
from sparsebench import config, evaluate, sparsity, state
from sparsebench.compose import compose_all
from sparsebench.data.text import Document, Split, TextData
from sparsebench.models import Loaded
from tests.conftest import TEXT, tiny_model, tiny_tokenizer
from tests.test_teal import work
from tests.tiny_vision import tiny_cnn, tiny_images, tiny_vit

NAMES = sorted(m.name for m in pkgutil.iter_modules(sparsebench.methods.__path__))
NEUTRAL = {  # the setting at which a method changes nothing
    "teal": ["method.sparsity=0"],
    "dense": [],
    "prosparse": ["method.control=continued", "method.train=null"],
    "topk": ["method.keep=1", "method.activation=null", "method.train=null"],
    "cats": ["method.sparsity=0"],
    "duogpt": ["method.sparsity=0", "method.weight_sparsity=0", "method.alpha=0"],
    "larosa": ["method.sparsity=0"],
    "rsparse": ["method.sparsity=0", "method.rho=1"],
    "wina": ["method.sparsity=0", "method.rotate=false"],
    "dstf": ["method.stages=weight", "method.weight_sparsity=0"],
    "d2dmoe": ["method.tau=0", "method.activation=null", "method.train=null"],
    "moefication": ["method.keep=1", "method.activation=null", "method.train=null"],
    "lte": ["method.tau=0", "method.train=null", "method.adapt=null"],
    "fatrelu": ["method.upper=1.0e-30"],
    "spatial_topk": ["method.keep=1.0"],
}
QUICK = {  # what makes a method that trains quick enough for these tests
    "prosparse": [
        "method.train.steps=3", "method.train.warmup=1", "method.stages=[1,2,3]", "method.lambdas=[0,0.1,1]",
        "method.predictor.tokens=256", "method.predictor.epochs=2", "method.dev_sequences=4",
    ],
    "duogpt": ["method.calibration_tokens=1024"],  # it passes over the text ten times
    "topk": ["method.train.steps=3", "method.train.warmup=1", "method.probe_sequences=4"],
    "dstf": [
        "method.train.steps=6", "method.train.batch_size=8", "method.train.micro_batch=8", "method.l1_steps=3",
        "method.finetune_steps=3", "method.strengths=[1.0,10.0]",
    ],
}  # fmt: skip
for _name in ("d2dmoe", "moefication", "lte"):
    QUICK[_name] = ["method.experts.size=8"]
    _stages = ("train", "adapt" if _name == "lte" else "router")
    QUICK[_name] += [f"method.{stage}.{key}" for stage in _stages for key in ("steps=3", "warmup=1")]
# They reorder neurons, so sums are rounded otherwise; of vision models they take transformers only.
EXPERTS = ("d2dmoe", "moefication", "lte")


class Language:
    """A tiny model and data of the kind `language`."""

    default_model = "llama-tiny"

    def loaded(self):
        return Loaded(tiny_model(), tiny_tokenizer(), {})

    def data(self):
        documents = [Document(str(i), part) for i, part in enumerate(TEXT.split("\n\n"))]
        cuts = {"fit": documents[:80], "dev": documents[80:100], "test": documents[100:]}
        found = TextData(**{n: Split(n, d, 32, "none", 0) for n, d in cuts.items()}, info={})
        found.set_tokenizer(tiny_tokenizer())
        return found

    def inputs(self, count):
        return self.data().test.sequences(count)

    def logits(self, model, rows):
        with torch.no_grad():
            return model(input_ids=rows, use_cache=False).logits

    def measured(self, model):
        _, counters = evaluate.language_quality(model, self.data().test, None, 4)
        found = sparsity.summarise(model, counters)
        weights = {site: share.weight for site, share in found.items()}
        return sparsity.model_wide({site: share.sparsity for site, share in found.items()}, weights)


class Vision:
    """The same for the kind `vision`."""

    default_model = "lenet5"

    def loaded(self):
        return Loaded(tiny_cnn(), None, {})

    def data(self):
        return tiny_images()

    def inputs(self, count):
        return next(self.data().test.batches(count, count, "cpu")).inputs

    def logits(self, model, rows):
        with torch.no_grad():
            return model(rows)


class VisionTransformer(Vision):
    """The same for methods that need transformer blocks."""

    default_model = "vit-tiny"

    def loaded(self):
        return Loaded(tiny_vit(), None, {})

    def logits(self, model, rows):
        with torch.no_grad():
            return model(rows).logits

    def measured(self, model):
        _, counters = evaluate.classification_quality(model, self.data().test, None, 8)
        found = sparsity.summarise(model, counters)
        return sparsity.model_wide({s: f.sparsity for s, f in found.items()}, {s: f.weight for s, f in found.items()})


KINDS = {"language": Language(), "vision": Vision()}


def kinds_of(name):
    """The kinds that a method's class takes, as far as a tiny model of them exists here."""
    module = importlib.import_module(f"sparsebench.methods.{name}")
    classes = [c for c in vars(module).values() if isinstance(c, type) and hasattr(c, "fit") and hasattr(c, "apply")]
    return [kind for kind in KINDS if any(kind in c.kinds for c in classes)]


def kind_for(name, kind):
    return VisionTransformer() if kind == "vision" and name in EXPERTS else KINDS[kind]


CASES = [pytest.param(name, kind_for(name, kind), id=f"{name}-{kind}") for name in NAMES for kind in kinds_of(name)]


def build(name, kind, *overrides):
    given = [f"method={name}", f"model={kind.default_model}", "hardware=cpu", *QUICK.get(name, []), *overrides]
    return config.build_settings(compose_all(given)[0]).method


def sparse_model(method, kind, fit, tmp_path):
    return method.apply(kind.loaded().module, fit, work(tmp_path))


def fitted(method, kind, tmp_path):
    return method.fit(kind.loaded(), kind.data(), work(tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_has_a_neutral_setting_listed_here_and_a_kind(name):
    assert name in NEUTRAL, f"add method {name} to NEUTRAL"
    assert kinds_of(name), f"no kind of {name} has a tiny model here"


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_neutral_setting_changes_nothing(name, kind, tmp_path):
    method, rows = build(name, kind, *NEUTRAL[name]), kind.inputs(3)
    sparse = sparse_model(method, kind, fitted(method, kind, tmp_path), tmp_path)
    found, dense = kind.logits(sparse, rows), kind.logits(kind.loaded().module, rows)
    if name in EXPERTS:
        torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(found, dense)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_fit_is_deterministic_and_apply_needs_the_state_only(name, kind, tmp_path):
    method = build(name, kind)
    first, second = fitted(method, kind, tmp_path / "a"), fitted(method, kind, tmp_path / "b")
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[k], second.tensors[k]) for k in first.tensors)
    state.write(first, tmp_path / "s.safetensors")
    rows = kind.inputs(3)
    fresh = kind.logits(sparse_model(method, kind, first, tmp_path), rows)
    reloaded = state.read(tmp_path / "s.safetensors")
    again = kind.logits(sparse_model(build(name, kind), kind, reloaded, tmp_path), rows)
    assert torch.equal(fresh, again)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_batch_size_and_order_do_not_matter(name, kind, tmp_path):
    method = build(name, kind)
    model = sparse_model(method, kind, fitted(method, kind, tmp_path), tmp_path)
    rows = kind.inputs(6)
    apart = torch.cat([kind.logits(model, row[None]) for row in rows.flip(0)]).flip(0)
    torch.testing.assert_close(kind.logits(model, rows), apart, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_measured_is_near_requested(name, kind, tmp_path):
    method = build(name, kind)
    model = sparse_model(method, kind, fitted(method, kind, tmp_path), tmp_path)
    if method.requested:
        assert kind.measured(model) == pytest.approx(method.requested, abs=0.05)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_never_sees_test_data(name, kind, tmp_path):
    method, known = build(name, kind), kind.data()
    known.test = None  # touching it would fail
    method.fit(kind.loaded(), known, work(tmp_path))
