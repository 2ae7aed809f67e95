"""Sequence classifiers of transformers from a folder: the classes are the model's, whatever the order of the data's."""

import json

import pytest
import torch
import transformers

from sparsebench.measure import neutral
from tests.helpers import built, tiny_tokenizer, work

LABELS = {0: "POSITIVE", 1: "NEUTRAL", 2: "NEGATIVE"}
SHAPES = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    "distilbert": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64},
}


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    shape = transformers.AutoConfig.for_model(
        request.param, vocab_size=320, max_position_embeddings=64, initializer_range=0.3, id2label=LABELS,
        **SHAPES[request.param],
    )  # fmt: skip
    target = tmp_path_factory.mktemp("classifier")
    transformers.AutoModelForSequenceClassification.from_config(shape).save_pretrained(target)
    tiny_tokenizer().save_pretrained(target)
    return target


def texts(tmp_path, *labels):
    rows = [{"text": f"word{i} of {i % 7} and {i}", "label": labels[i % len(labels)]} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return built("dataset", "model=hf-text", f"dataset.path={tmp_path / 'rows.jsonl'}").load(0)


@pytest.mark.parametrize(
    ("labels", "numbers", "told"),
    [(("negative", "positive"), {2, 0}, "by name"), (("0", "2"), {0, 2}, "by number")],
)
def test_labels_are_numbered_as_the_model_does(labels, numbers, told, folder, tmp_path):
    data = texts(tmp_path, *labels)
    original = [data.classes[i] for i in data.test.labels.tolist()]
    loaded = built("model", "model=hf-text", f"model.path={folder}").load(work(tmp_path), data)
    assert loaded.info["classes_told"] == told and loaded.info["classes"] == 3
    assert data.classes == ["POSITIVE", "NEUTRAL", "NEGATIVE"] and set(data.test.labels.tolist()) == numbers
    means = {"negative": 2, "positive": 0, "0": 0, "2": 2}
    assert data.test.labels.tolist() == [means[label] for label in original]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    (batch,) = data.test.batches(None, 64, "cpu")
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(**batch.inputs).logits, theirs(**batch.inputs).logits)


def test_other_labels_are_refused(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"classes must be its names \(POSITIVE, NEUTRAL, NEGATIVE, ...\) or numbers 0 to 2"
    ):
        built("model", "model=hf-text", f"model.path={folder}").load(work(tmp_path), texts(tmp_path, "bad", "good"))


def test_experts_of_it_are_the_model_where_all_run(folder, tmp_path):
    data = texts(tmp_path, "negative", "positive")
    loaded = built("model", "model=hf-text", f"model.path={folder}").load(work(tmp_path), data)
    quick = ("method.train=null", "method.activation=null", "method.routing=random", "method.experts.size=8")
    method = built("method", "method=moefication", "model=bert-tiny", *quick, keep=1.0)
    inputs, expected = neutral.probe(loaded.module, data)
    module = method.apply(loaded.module, method.fit(loaded, data, work(tmp_path)), work(tmp_path))
    torch.testing.assert_close(neutral.logits(module, inputs), expected, rtol=1e-4, atol=1e-4)
