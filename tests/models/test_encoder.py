"""Sequence classifiers: under a new head training starts from the checkpoint's body; of a folder the classes are the
model's, whatever the order of the data's.
"""

import json

import pytest
import safetensors.torch
import torch
import transformers

from sparsebench.measure import neutral
from tests.helpers import built, tiny_tokenizer, work

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with the body alone, with another task's head, and with a tensor missing."""
    torch.manual_seed(0)
    made = {}
    for name, cls in (("body", transformers.BertModel), ("masked", transformers.BertForMaskedLM)):
        made[name] = tmp_path_factory.mktemp(name)
        cls(transformers.BertConfig(**SHAPE)).save_pretrained(made[name])
        tiny_tokenizer().save_pretrained(made[name])
    made["broken"] = tmp_path_factory.mktemp("broken")
    tensors = safetensors.torch.load_file(made["body"] / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    safetensors.torch.save_file(tensors, made["broken"] / "model.safetensors", metadata={"format": "pt"})
    for file in made["body"].glob("*.json"):
        (made["broken"] / file.name).write_bytes(file.read_bytes())
    return made


@pytest.fixture
def texts(tmp_path):
    rows = [{"text": f"{word} of {i % 7}", "label": word} for i in range(20) for word in ("alpha", "beta", "gamma")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return built(
        "dataset", "dataset=labelled-text", f"dataset.path={tmp_path}/rows.jsonl", "dataset.max_tokens=16"
    ).load(0)


def finetuned(folder, tmp_path, texts, lr=1e-7):
    given = ["steps=2", "batch_size=4", "micro_batch=4", f"lr={lr}", "min_lr=0", "warmup=0", "weight_decay=0"]
    settings = built("model", "model=all-minilm", f"model.path={folder}", *(f"model.train.{each}" for each in given))
    return settings.load(work(tmp_path), texts)


@pytest.mark.parametrize("name", ["body", "masked"])
def test_training_starts_from_the_body_in_the_folder(name, folders, tmp_path, texts):
    loaded = finetuned(folders[name], tmp_path, texts)
    start = safetensors.torch.load_file(folders[name] / "model.safetensors")
    weight = loaded.module.bert.encoder.layer[1].output.dense.weight
    stored = next(t for n, t in start.items() if n.endswith("encoder.layer.1.output.dense.weight"))
    assert 0 < float((weight - stored).abs().max()) < 1e-5  # two steps of 1e-7 away
    assert loaded.module.config.num_labels == loaded.info["classes"] == 3
    assert loaded.tokenizer("word")["input_ids"] == tiny_tokenizer()("word")["input_ids"]
    again = finetuned(folders[name], tmp_path, texts)  # from the folder it was saved to
    assert again.info["source"] == loaded.info["source"] and torch.equal(
        again.module.classifier.weight, loaded.module.classifier.weight
    )


def test_another_checkpoint_is_another_training(folders, tmp_path, texts):
    sources = {finetuned(folders[name], tmp_path, texts).info["source"] for name in ("body", "masked")}
    assert len(sources) == 2


def test_a_body_that_is_not_whole_is_refused_by_name(folders, tmp_path, texts):
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.output\.dense\.weight is missing"):
        finetuned(folders["broken"], tmp_path, texts)


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


def labelled(tmp_path, *labels):
    rows = [{"text": f"word{i} of {i % 7} and {i}", "label": labels[i % len(labels)]} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return built("dataset", "model=hf-text", f"dataset.path={tmp_path / 'rows.jsonl'}").load(0)


@pytest.mark.parametrize(
    ("labels", "numbers", "told"),
    [(("negative", "positive"), {2, 0}, "by name"), (("0", "2"), {0, 2}, "by number")],
)
def test_labels_are_numbered_as_the_model_does(labels, numbers, told, folder, tmp_path):
    data = labelled(tmp_path, *labels)
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
        built("model", "model=hf-text", f"model.path={folder}").load(work(tmp_path), labelled(tmp_path, "bad", "good"))


def test_experts_of_it_are_the_model_where_all_run(folder, tmp_path):
    data = labelled(tmp_path, "negative", "positive")
    loaded = built("model", "model=hf-text", f"model.path={folder}").load(work(tmp_path), data)
    quick = ("method.train=null", "method.activation=null", "method.routing=random", "method.experts.size=8")
    method = built("method", "method=moefication", "model=bert-tiny", *quick, keep=1.0)
    inputs, expected = neutral.probe(loaded.module, data)
    module = method.apply(loaded.module, method.fit(loaded, data, work(tmp_path)), work(tmp_path))
    torch.testing.assert_close(neutral.logits(module, inputs), expected, rtol=1e-4, atol=1e-4)
