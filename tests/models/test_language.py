"""Options for language models by name, GGUF files among their paths, and cautions where a BOS is left out."""

import pytest
import torch
import transformers

from sparsebench import config
from sparsebench.config.compose import compose_all
from sparsebench.config.identity import identity_of
from sparsebench.data.text import Document, Split, TextData
from tests.helpers import KINDS, TEXT, built, logits, tiny_model, tiny_tokenizer, work, write_gguf

PARAMETERS = {  # in millions, as their model cards or papers give them (embeddings once where tied)
    "smollm2-135m": 134.5, "smollm2-360m": 361.8, "smollm2-1.7b": 1711.4, "gemma3-270m": 268.1, "gemma3-1b": 999.9,
    "qwen3-0.6b": 596.0, "llama3.2-1b": 1235.8, "pythia-70m": 70.4, "pythia-160m": 162.3, "pythia-410m": 405.3,
    "pythia-1b": 1011.8, "pythia-1.4b": 1414.6, "opt-125m": 125.2,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_shapes_of_an_option_are_those_of_its_model(name):
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(
            built("model", f"model={name}", "model.weights=random").config()
        )
    assert round(sum(p.numel() for p in module.parameters()) / 1e6, 1) == PARAMETERS[name]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return write_gguf(folder / "tiny.gguf", tiny_model(), "llama", "Q8_0", general__name="Tiny")


@pytest.mark.parametrize("option", ["gguf", "smollm2-135m"])
def test_a_gguf_file_is_a_model_like_any_other(option, file, tmp_path):
    data = KINDS["language"].data()
    loaded = built("model", f"model={option}", f"model.path={file}").load(work(tmp_path), data)
    rows = data.test.sequences(2)
    error = (logits(loaded.module, rows) - logits(tiny_model(), rows)).norm() / logits(tiny_model(), rows).norm()
    assert 0 < error < 0.02
    about = loaded.info["gguf"]
    assert loaded.info["source"] == str(file) and about["name"] == "Tiny" and len(about["sha256"]) == 64
    assert sum(about["quantisation"].values()) == pytest.approx(1) and about["weights"].startswith(
        "dequantised from Q8_0"
    )
    assert len(loaded.info["cautions"]) == 1 and "no quantised kernel ran" in loaded.info["cautions"][0]
    cut = built("model", f"model={option}", f"model.path={file}", num_layers=1).load(work(tmp_path), None)
    assert cut.info["num_layers"] == 1


def test_its_content_is_part_of_the_runs_identity(file, tmp_path):
    copy = tmp_path / "m.gguf"

    def identity():
        return identity_of(compose_all(["model=gguf", f"model.path={copy}"])[0], {})

    copy.write_bytes(file.read_bytes())
    before = identity()
    assert identity() == before
    changed = bytearray(file.read_bytes())
    changed[-100] ^= 1
    copy.write_bytes(bytes(changed))
    assert identity() != before


def problems(path):
    given = [f"model.path={path}", "dataset=text", f"dataset.path={__file__}", "hardware=cpu"]
    with pytest.raises(config.ConfigError) as error:
        config.build_settings(compose_all(["model=gguf", *given])[0])
    return error.value.problems


def test_a_path_that_is_no_model_is_one_line_before_anything_is_loaded(file, tmp_path):
    other = tmp_path / "weights.bin"
    other.write_bytes(b"PK\3\4" + bytes(100))
    for path, line in (
        ("null", "model.path must be a folder, a Hub id or a GGUF file, got null"),
        (tmp_path / "none.gguf", "model.path must be an existing GGUF file, a folder or a Hub id, got "),
        ("none.gguf", "model.path must be an existing GGUF file, a folder or a Hub id, got 'none.gguf'"),
        (file.parent, f"model.path must name the GGUF file itself, e.g. '{file}', got its folder"),
        (other, "it is no GGUF file: it starts with b'PK\\x03\\x04', not b'GGUF'"),
    ):
        (problem,) = problems(path)
        assert line in problem and "\n" not in problem


def test_a_tokenizer_whose_bos_is_left_out_is_a_caution(tmp_path, caplog):
    path = write_gguf(tmp_path / "m.gguf", tiny_model(layers=1), "llama", tokenizer__ggml__add_bos_token=True)
    documents = [Document(str(i), part) for i, part in enumerate(TEXT.split("\n\n")[:30])]

    def cautions(bos):
        splits = {n: Split(n, documents[i : i + 10], 32, bos, 0) for n, i in (("fit", 0), ("dev", 10), ("test", 20))}
        info = built("model", "model=gguf", f"model.path={path}").load(work(tmp_path), TextData(**splits, info={})).info
        return [line for line in info["cautions"] if "dequantised" not in line]

    (line,) = cautions("none")
    assert (
        line.startswith("the tokenizer starts every text with <s>, dataset.bos=none leaves it out")
        and line in caplog.text
    )
    assert cautions("window") == []
    tiny_model().save_pretrained(tmp_path / "plain")
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    plain = built("model", "model=hf", f"model.path={tmp_path}/plain").load(work(tmp_path), KINDS["language"].data())
    assert plain.info["cautions"] == []
