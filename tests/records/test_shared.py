"""What runs share: kept whole and once, made again where it is damaged, old or of other inputs, and told in the record."""

import json
import logging
import math
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparsebench import config, runner
from sparsebench.config.compose import compose_all
from sparsebench.data.text import Document, Split
from sparsebench.measure import quality
from sparsebench.measure.effective_macs import Products
from sparsebench.measure.macs import Outside
from sparsebench.measure.uncertainty import Pieces
from sparsebench.modules.base import Cost, MapCounter
from sparsebench.records import shared
from sparsebench.records.record import Record
from sparsebench.records.state import State, write
from tests.families import family
from tests.helpers import TEXT, tiny_model, tiny_tokenizer

RUN, OTHER = "a" * 64, "b" * 64


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEBENCH_CACHE", str(tmp_path / "cache"))
    yield
    shared.begin(None)


def value():
    counter = MapCounter()
    counter.add(torch.tensor([[0.0, 1.0]]))
    losses = np.random.default_rng(0).random((3, 5)).astype(np.float32)
    return {
        "number": 0.1 + 0.2, "nan": math.nan, "count": np.int64(3), "rows": {1: True, 2: None}, "pair": (1, ("a", 2.5)),
        "losses": losses, "pieces": Pieces.of(losses, np.arange(15).reshape(3, 5) // 4), "outside": Outside(1, 2, 3, 4),
        "cost": Cost(1, 0.5, 0, 8, 4), "maps": {"a": counter}, "products": Products(shapes={torch.Size([2, 3]): (6, 2.0)}),
        "lengths": torch.arange(4, dtype=torch.float64), "!": "a key of its own",
    }  # fmt: skip


def same(a, b):
    if isinstance(a, (np.ndarray, torch.Tensor)):
        return a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "__dict__"):
        return type(a) is type(b) and same(vars(a), vars(b))
    return a == b or (math.isnan(a) and math.isnan(b))


def share(content, kind="dense", parts=1, run=RUN):
    """(what is shared under these parts, whose it is, whether it was made now)."""
    made = []
    shared.begin(run)
    got, owner = shared.shared(kind, lambda: parts, lambda: made.append(1) or content)
    return got, owner, bool(made)


def test_a_result_is_made_once_and_comes_back_as_it_was():
    content = value()
    assert share(content) == (content, None, True)
    got, owner, made = share(None, run=OTHER)
    assert same(content, got) and owner == RUN and not made
    assert share("else", parts=2)[2], "other inputs, another result"


def test_nothing_is_shared_where_it_is_off(tmp_path):
    assert share(1, run=None) == (1, None, True) and share(2, run=None) == (2, None, True)
    assert not (tmp_path / "cache").exists()


def test_what_a_file_can_not_hold_is_computed_each_time():
    assert share(object)[2] and share(lambda: 1)[2] and share({"a": threading})[2]


@pytest.mark.parametrize("damage", ["flip", "cut", "other", "foreign", "fields"])
def test_a_damaged_entry_is_made_again(damage, caplog):
    share(value())
    path = shared.place("dense", 1)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "other":
        share(value(), parts=2)
        path.write_bytes(shared.place("dense", 2).read_bytes())
    else:
        inner = {"!": "object", "of": ["subprocess", "Popen"], "fields": {}} if damage == "foreign" else {"!": "tuple"}
        write(State({}, {"value": inner, "run": RUN}), path)
    with caplog.at_level(logging.WARNING):
        assert share("new") == ("new", None, True)
    assert "is damaged" in caplog.text
    assert share("newer") == ("new", RUN, False)


def test_processes_that_need_one_result_make_it_once():
    shared.begin(RUN)
    made, got = [], []

    def make():
        made.append(1)
        time.sleep(0.2)
        return 7

    threads = [threading.Thread(target=lambda: got.append(shared.shared("dense", lambda: 1, make))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and sorted(owner or "" for _, owner in got) == ["", RUN, RUN] and {v for v, _ in got} == {7}


def test_entries_that_were_not_used_for_longest_go_first(monkeypatch):
    share(torch.zeros(1000), parts=1)
    share(torch.zeros(1000), parts=2)
    path = shared.place("dense", 1)
    monkeypatch.setattr(shared, "MOST_BYTES", int(2.5 * path.stat().st_size))
    time.sleep(0.02)
    assert not share(None, parts=1)[2]
    time.sleep(0.02)
    share(torch.zeros(1000), parts=3)
    assert [shared.place("dense", n).exists() for n in (1, 2, 3)] == [True, False, True]


class Counting:
    """A tokenizer that counts the documents it is given."""

    def __init__(self):
        self.inner, self.documents = tiny_tokenizer(), 0
        self.backend_tokenizer, self.bos_token_id = self.inner.backend_tokenizer, self.inner.bos_token_id

    def __call__(self, texts, **options):
        self.documents += len(texts)
        return self.inner(texts, **options)


@pytest.mark.parametrize("bos", ["none", "document", "window"])
def test_tokens_are_made_once_and_continued(bos):
    documents = [Document(str(i), part) for i, part in enumerate(TEXT.split("\n\n"))]

    def split(name="test", seed=0):
        made = Split(name, documents, 32, bos, seed)
        made.tokenizer, made.store = Counting(), shared
        return made

    shared.begin(None)
    expected = split()
    windows = expected.sequences()
    shared.begin(RUN)
    first, second, third, fourth, other = split(), split(), split(), split(), split("fit", seed=1)
    assert torch.equal(first.sequences(4), windows[:4]) and 0 < first.tokenizer.documents < len(documents)
    assert torch.equal(second.sequences(4), windows[:4]) and second.tokenizer.documents == 0
    assert torch.equal(second.sequences(), windows)
    assert first.tokenizer.documents + second.tokenizer.documents == len(documents)
    assert torch.equal(third.sequences(), windows) and third.tokenizer.documents == 0
    assert torch.equal(third.scored_documents(len(windows)), expected.scored_documents(len(windows)))
    assert third.describe() == expected.describe()
    assert torch.equal(fourth.sequences(4), windows[:4]) and fourth.describe() == first.describe(), "only what is used"
    other.sequences(4)
    assert other.tokenizer.documents > 0, "another order is another text"


def configured(text_file, model_folder, *changes):
    given = ["model=hf", f"model.path={model_folder('llama')}", "dataset=text", f"dataset.path={text_file}",
             "dataset.sequence_length=32", "method.calibration_tokens=512", "eval.text.test_sequences=8", "hardware=cpu",
             "hardware.threads=1", "measure.latency=false", *changes]  # fmt: skip
    return compose_all(given)[0]


def record_of_run(tmp_path, text_file, model_folder, *changes):
    configuration = configured(text_file, model_folder, f"output_dir={tmp_path}", *changes)
    record = Record((OTHER if changes else RUN), "", configuration)
    return runner.timed_run(configuration, record, tmp_path, lambda row: None)


def test_a_run_takes_the_dense_results_of_another_and_says_whose(tmp_path, text_file, model_folder, monkeypatch):
    """At another sparsity and seed the dense model is the same: every dense figure is, and no dense pass is made."""
    passes, perplexity = [], quality.perplexity
    monkeypatch.setattr(quality, "perplexity", lambda *given: passes.append(1) or perplexity(*given))
    first = record_of_run(tmp_path, text_file, model_folder)
    assert first.shared == {} and len(passes) == 2
    second = record_of_run(tmp_path, text_file, model_folder, "method.sparsity=0.7", "seed=1")
    assert second.shared == {"dense": RUN} and len(passes) == 3
    alone = record_of_run(tmp_path, text_file, model_folder, "method.sparsity=0.7", "seed=1", "share=false")
    assert alone.shared == {} and len(passes) == 5
    assert json.dumps(second.quality) == json.dumps(alone.quality) and second.macs == alone.macs
    assert second.extra == alone.extra and second.memory["dense_weight_bytes"] == alone.memory["dense_weight_bytes"]
    longer = record_of_run(tmp_path, text_file, model_folder, "eval.text.test_sequences=9")
    assert longer.shared == {}, "other windows are another text"
    names = [phase["name"].partition(" ")[0] for phase in first.phases]
    assert names == ["loading", "loading", "dense", "teal:", "teal:", "sparse"]
    assert 0.5 * first.seconds < sum(phase["seconds"] for phase in first.phases) <= first.seconds
    assert sum(phase["cpu_seconds"] for phase in first.phases) > 0


def test_tokens_of_a_tokenizer_that_nothing_describes_are_not_shared():
    shared.begin(RUN)
    for made in (Split("test", [Document("0", TEXT)], 32, "none", 0) for _ in range(2)):
        made.tokenizer, made.store = Counting(), shared
        del made.tokenizer.backend_tokenizer
        made.sequences(1)
        assert made.tokenizer.documents == 1


def test_other_measurements_are_other_results(text_file, model_folder):
    """Whatever changes what is measured of the dense model, or its weights, makes another key."""
    changes = ["eval.text.batch_size=3", "eval.neurons.enabled=true", "measure.chunk=4", "measure.context=9",
               "model.quantize=int8", "hardware.kernel=masked_dense"]  # fmt: skip
    keys = [decided(text_file, model_folder, *given) for given in ((), *((change,) for change in changes))]
    assert len({json.dumps(key) for key in keys}) == len(keys)
    assert keys[0] == decided(text_file, model_folder, "method.sparsity=0.7", "seed=1", "measure.samples=31")
    assert runner.fingerprint(tiny_model(seed=0)) == runner.fingerprint(tiny_model(seed=0))
    assert runner.fingerprint(tiny_model(seed=0)) != runner.fingerprint(tiny_model(seed=1))


def decided(text_file, model_folder, *changes):
    configuration = configured(text_file, model_folder, *changes)
    settings = config.build_settings(configuration)
    settings.hardware.prepare()
    return runner.decides_dense(settings, configuration, SimpleNamespace(info={}), ["text"])


def test_a_quantised_run_takes_each_dense_result_from_a_run_of_the_same_weights(tmp_path, text_file, model_folder):
    """The model before it was quantised from a run without quantisation; the quantised one never from there."""
    record_of_run(tmp_path, text_file, model_folder)
    first = record_of_run(tmp_path, text_file, model_folder, "model.quantize=int8")
    assert first.shared == {"unquantised": RUN}
    second = record_of_run(tmp_path, text_file, model_folder, "model.quantize=int8", "method.sparsity=0.6")
    assert second.shared == {"unquantised": RUN, "dense": OTHER}
    alone = record_of_run(
        tmp_path, text_file, model_folder, "model.quantize=int8", "method.sparsity=0.6", "share=false"
    )
    assert json.dumps(second.quality) == json.dumps(alone.quality) and second.macs == alone.macs
    assert second.bytes == alone.bytes and second.dataset == alone.dataset and "corners" in alone.quality["nll"]


def test_results_of_a_model_with_experts_can_be_kept(tmp_path, text_file):
    """Routing and what single experts dropped come back as they were, so that choices can be compared."""
    folder = tmp_path / "experts"
    family("qwen3_moe").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    first, *others = (
        record_of_run(tmp_path, text_file, lambda kind: folder, *changes)
        for changes in ((), ("method.sparsity=0.6",), ("method.sparsity=0.6", "share=false"))
    )
    second, alone = others
    assert first.shared == alone.shared == {} and second.shared == {"dense": RUN}
    assert "routing" in alone.extra and json.dumps(second.extra) == json.dumps(alone.extra)
    assert json.dumps(second.quality) == json.dumps(alone.quality)
