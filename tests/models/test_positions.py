"""Windows beyond a model's positions, and tokenizers that are missing or lack a BOS token, are named before weights load."""

import logging
import shutil

import pytest
import transformers

from sparsebench import config
from sparsebench.config.compose import compose_all
from sparsebench.models import positions
from tests.helpers import KINDS, built, tiny_model, tiny_tokenizer, work


def problems(*overrides):
    try:
        config.build_settings(compose_all(["dataset=text", "dataset.path=.", "hardware=cpu", *overrides])[0])
    except config.ConfigError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    tiny_model("gpt2", n_positions=64).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_learned_positions_end_the_run_with_both_numbers(gpt2):
    line = f"dataset.sequence_length must be at most 64, the learned positions of model={gpt2.name}, got 65"
    given = ["model=hf", f"model.path={gpt2}", "measure.context=16", "measure.prompt=16"]
    assert line in problems(*given, "dataset.sequence_length=65")
    assert "positions" not in problems(*given, "dataset.sequence_length=64")
    assert "measure.prompt must be at most 64" in problems(*given, "measure.prompt=65", "dataset.sequence_length=64")
    short = problems(*given, "measure.prompt=65", "dataset.sequence_length=64", "measure.latency=false")
    assert "measure.prompt" not in short


def test_gpt2s_own_data_set_is_named_before_anything_is_loaded():
    actual = problems("model=gpt2", "model.weights=random", "dataset.sequence_length=2048")
    assert "dataset.sequence_length must be at most 1024, the learned positions of model=gpt2, got 2048" in actual


def test_encoders_too():
    actual = problems("model=bert-tiny", "dataset=labelled-text", "dataset.max_tokens=100000")
    assert "dataset.max_tokens must be at most" in actual


@pytest.mark.parametrize(
    ("kind", "is_learned"),
    [
        ("gpt2", True),
        ("opt", True),
        ("bert", True),
        ("llama", False),
        ("gptj", False),
        ("bloom", False),
        ("gpt_neox", False),
    ],
)
def test_which_positions_are_learned(kind, is_learned):
    assert positions.learned(transformers.AutoConfig.for_model(kind)) == is_learned


def test_rotary_positions_are_a_caution_in_the_record(tmp_path, caplog):
    tiny_model(max_position_embeddings=16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        info = built("model", "model=hf", f"model.path={tmp_path}").load(work(tmp_path), KINDS["language"].data()).info
    line = "windows of 32 tokens are longer than the 16 positions that the model was made for"
    assert info["cautions"] == [line] and line in caplog.text and info["positions"] == 16


def test_a_missing_tokenizer_is_named(gpt2, tmp_path):
    folder = shutil.copytree(gpt2, tmp_path / "bare")
    for file in folder.glob("token*"):
        file.unlink()
    assert "must be a folder with a tokenizer" in problems("model=hf", f"model.path={folder}")


def test_a_tokenizer_without_bos_is_named_before_weights_load(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights loaded")
    )
    data = KINDS["language"].data()
    for split in (data.fit, data.dev, data.test):
        split.bos = "document"
    with pytest.raises(
        ValueError, match=r"dataset.bos must be none for the tokenizer of .* has no BOS token, got document"
    ):
        built("model", "model=hf", f"model.path={tmp_path}").load(work(tmp_path), data)
