"""Labelled texts, encoders that classify them, and experts in them: padding counts nowhere."""

import json

import jsonschema
import pytest
import torch
import transformers

from sparsebench import config, tasks
from sparsebench.config.compose import compose_all
from sparsebench.data.labelled import LabelledData
from sparsebench.data.labelled_text import Texts
from sparsebench.experts import conversion, routers
from sparsebench.measure import latency, macs, quality
from sparsebench.models import Loaded
from sparsebench.records import record
from sparsebench.sites import find_blocks
from sparsebench.training.from_scratch import byte_bpe
from tests.helpers import built, record_of

ROWS = [
    {"text": f"{word} " * (1 + i % 7) + str(i), "label": word} for i in range(30) for word in ("alpha", "beta", "gamma")
]


def settings(**changes) -> Texts:
    return built("dataset", "model=bert-tiny", "dataset=labelled-text", **changes)


def file_of(tmp_path, suffix="jsonl"):
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    path, table = tmp_path / f"rows.{suffix}", pyarrow.Table.from_pylist(ROWS)
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        {"csv": pyarrow.csv.write_csv, "parquet": pyarrow.parquet.write_table}[suffix](table, path)
    return path


@pytest.fixture
def texts(tmp_path) -> LabelledData:
    data = settings(path=str(file_of(tmp_path))).load(0)
    tokenizer = byte_bpe(data.fit.texts, 300)
    data.set_tokenizer(tokenizer, tokenizer.bos_token_id)
    return data


def tiny_encoder(kind="bert"):
    torch.manual_seed(0)
    shape = transformers.AutoConfig.for_model(
        kind, vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        num_labels=3, initializer_range=0.2, pad_token_id=0 if kind == "roberta" else None,
    )  # fmt: skip
    return transformers.AutoModelForSequenceClassification.from_config(shape).eval().requires_grad_(False)


def routed(kind="bert"):
    model = tiny_encoder(kind)
    for ffn in conversion.convert(model, 8, None):
        ffn.router = routers.random_router(32, 8, 8, torch.Generator().manual_seed(1), outer="abs")
    routers.harden(model, "max", 0.6)
    return model


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_rows_of_a_file(tmp_path, suffix):
    data = settings(path=str(file_of(tmp_path, suffix))).load(0)
    assert data.classes == ["alpha", "beta", "gamma"]
    assert sum(len(s) for s in (data.fit, data.dev, data.test)) == len(ROWS)
    data.check_disjoint()
    again = settings(path=str(file_of(tmp_path, suffix))).load(1)
    assert again.test.texts == data.test.texts  # the split does not depend on the seed
    wrong = settings(path=str(file_of(tmp_path, suffix)), label_field="labl")
    with pytest.raises(ValueError, match="dataset.label_field must be one of text, label, got 'labl'"):
        wrong.load(0)


def test_passages_of_the_standard_library_split_by_file():
    actual = built("dataset", "model=bert-tiny", num_classes=4, per_class=60)
    data = actual.load(0)
    assert len(data.classes) == 4 and min(len(s) for s in (data.fit, data.dev, data.test)) > 10
    data.check_disjoint()
    files = {text: group for text, _, group in actual.passages()}
    groups = [{files[t] for t in split.texts} for split in (data.fit, data.dev, data.test)]
    assert not groups[0] & groups[2] and not groups[0] & groups[1] and not groups[1] & groups[2]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_all_experts_are_the_dense_encoder(kind, texts):
    batch = next(texts.test.batches(4, 4, "cpu"))
    dense, model = tiny_encoder(kind), routed(kind)
    routers.harden(model, "max", 0.0)
    with torch.no_grad():
        torch.testing.assert_close(
            quality.logits(model, batch.inputs), quality.logits(dense, batch.inputs), rtol=1e-4, atol=1e-5
        )


def test_padding_changes_no_count_and_no_prediction(texts):
    """One text at a time (no padding) gives the counts of padded batches."""
    model, actual = routed(), {}
    for size in (1, 8):
        metrics, counters = quality.classification_quality(model, texts.test, None, size)
        actual[size] = (metrics["confusion"], {s: (c.kept.tolist(), c.sparse_tokens) for s, c in counters.items()})
    assert actual[1] == actual[8]
    assert actual[1][1]["0.ffn"][1] == int(texts.test.lengths(None).sum())


def test_macs_per_text(texts):
    """By hand: t (4 d d + 2 d f) per layer, 2 d t^2 for attention, pooler and head once; experts as counted, routers too."""
    task, settings = (
        tasks.load("classification"),
        config.build_settings(compose_all(["model=bert-tiny", "method=d2dmoe"])[0]),
    )
    lengths = texts.test.lengths(None)
    tokens, attention = float(lengths.mean()), 2 * 2 * 32 * float(lengths.square().mean())
    by_hand = tokens * 2 * (4 * 32 * 32 + 2 * 32 * 64) + attention + 32 * 32 + 32 * 3
    loaded, model = Loaded(tiny_encoder(), None, {}), routed()
    dense, sparse = (task.assess(loaded, module, texts, settings) for module in (loaded.module, model))
    _, counters = quality.classification_quality(model, texts.test, None, 8)
    compared = task.compare(dense, sparse, texts, settings)
    section, multiplied = compared.sparsity, compared.macs
    assert multiplied["dense"] == pytest.approx(by_hand)
    pairs = sum(int(c.kept.sum()) for c in counters.values()) / len(texts.test)
    ffn, router = tokens * 2 * 2 * 32 * 64, tokens * 2 * 8 * (32 + 8)
    routed_macs = by_hand - ffn + pairs * 2 * 32 * 8 + router
    assert multiplied["sparse"] == pytest.approx(routed_macs) and multiplied["executed"] is None  # nothing ran yet
    everywhere = latency.Timing(latency={}, skipping=set(multiplied["per_site"]))
    assert task.executed(multiplied, everywhere) == pytest.approx(routed_macs)
    assert task.executed(multiplied, latency.Timing(latency={})) == pytest.approx(by_hand + router)
    matrices = {name: sum(p.numel() * 4 for p in m.parameters() if p.dim() > 1)
                for name, m in (("dense", loaded.module), ("sparse", model))}  # fmt: skip
    assert {name: compared.bytes[name] for name in matrices} == matrices
    assert compared.bytes["sparse"] - compared.bytes["dense"] == 4 * 2 * 8 * (32 + 8)  # the routers, nothing else
    assert multiplied["overhead"] == pytest.approx(router) and 0 < section["model_wide"] < 1
    assert macs.dense_sites(tiny_encoder()).keys() == {
        f"{b.index}.{r}" for b in find_blocks(tiny_encoder()) for r in b.sites
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model=bert-tiny", "dataset=labelled-text", "method=lte"],
            "dataset.path must be a .jsonl, .ndjson, .json, .csv, .parquet",
        ),
        (["model=bert-tiny", "method=teal"], "method=teal takes models of kind language"),
        (
            ["model=bert-tiny", "dataset=pystdlib", "method=lte"],
            "dataset must hold classification data for model=bert-tiny",
        ),
        (["model=bert-tiny", "method=lte", "dataset.dev_share=0.9"], "dataset.test_share must be below 1 - dev_share"),
        (["model=bert-tiny", "method=lte", "model.weights=pretrained"], "model.path must be a folder or a Hub id"),
        (["model=bert-tiny", "method=d2dmoe", "method.experts.size=7"], "must divide the 512 neurons of an FFN, got 7"),
    ],
)
def test_bad_settings_are_one_clear_line(overrides, message):
    with pytest.raises(config.ConfigError, match=message):
        config.build_settings(compose_all(overrides)[0])


def test_a_whole_run_through_the_command(forked, tmp_path):
    quick = ("dataset.max_tokens=64", "model.train.batch_size=8", "model.train.micro_batch=8", "model.train.steps=20",
             "model.train.warmup=2", "method.train.steps=3", "method.train.warmup=1",
             "method.router.steps=3", "method.router.warmup=1", "measure.samples=30", "measure.warmup=3",
             "eval.classifier.test_examples=30", "dataset.num_classes=3", "dataset.per_class=60", "hardware.threads=1")  # fmt: skip
    process = forked("model=bert-tiny", "method=d2dmoe", "hardware=cpu", *quick, timeout=580)
    assert process.returncode == 0, process.stderr
    content = record_of(process, tmp_path)
    jsonschema.validate(content, json.loads(record.SCHEMA_FILE.read_text()))
    assert content["quality"]["accuracy"]["protocol"]["examples"] == 30 and content["macs"]["per"] == "text"
    assert content["macs"]["executed"] == pytest.approx(content["macs"]["sparse"])  # every expert FFN ran its kernel
    assert set(content["latency"]["forward"]) == {"1", "32"} and content["latency"]["forward"]["1"]["speedup"] > 0
