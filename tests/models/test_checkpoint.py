"""A checkpoint is loaded whole or refused by the name of what is wrong in it, for every kind of model."""

import json
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import torchvision
import transformers

from sparsebench.config import inputs
from sparsebench.models.weights import fill, named, translate_vit
from tests.helpers import QUICK_RUN, built, tiny_cnn, tiny_model, tiny_tokenizer, variants, work


def folder_with(tmp_path, change, model=None):
    """A saved folder whose tensors went through `change` (a function of the dict, in place)."""
    (model or tiny_model()).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    return tmp_path


def language(folder, tmp_path, **changes):
    return built("model", "model=hf", f"model.path={folder}", **changes).load(work(tmp_path), None).module


UP = "model.layers.1.mlp.up_proj.weight"
CHANGES = {
    "missing": (lambda t: t.pop(UP), rf"{UP} is missing"),
    "head": (lambda t: t.pop("lm_head.weight"), r"lm_head.weight is missing"),
    "two": (lambda t: (t.pop(UP), t.pop("model.norm.weight")), r"\(and 1 more\)"),
    "extra": (lambda t: t.update({"model.layers.0.mlp.router.weight": torch.ones(4)}), r"router.weight is in the checkpoint"),
    "later": (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(160, 64)}), r"layers.2.mlp.up_proj"),
    "shape": (lambda t: t.update({UP: torch.ones(8, 64)}), rf"{UP} has shape \[8, 64\] in the checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_language_model_that_is_not_whole(name, tmp_path):
    change, message = CHANGES[name]
    folder = folder_with(tmp_path / "model", change)
    with pytest.raises(ValueError, match=message) as error:
        language(folder, tmp_path)
    assert "\n" not in str(error.value)


def test_a_tied_head_computed_tensors_and_cut_layers_are_no_fault(tmp_path):
    def older(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    tied = folder_with(tmp_path / "tied", older, tiny_model(tie_word_embeddings=True))
    assert "lm_head.weight" not in safetensors.torch.load_file(tied / "model.safetensors")
    module = language(tied, tmp_path)
    assert torch.equal(module.get_output_embeddings().weight, tiny_model(tie_word_embeddings=True).lm_head.weight)
    cut = language(folder_with(tmp_path / "cut", lambda t: None, tiny_model(layers=3)), tmp_path, num_layers=1)
    assert len(cut.model.layers) == 1


def test_the_command_ends_before_scoring(tmp_path, text_file, forked):
    folder = folder_with(tmp_path / "broken", lambda t: t.pop(UP))
    process = forked("model=hf", f"model.path={folder}", f"dataset.path={text_file}", *QUICK_RUN)
    assert process.returncode != 0 and f"{UP} is missing" in process.stderr and "evaluating" not in process.stderr


def test_an_encoder_that_is_not_whole(tmp_path):
    shape = transformers.BertConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=2
    )
    model = transformers.BertForSequenceClassification(shape)
    folder = folder_with(tmp_path / "bert", lambda t: t.pop("classifier.weight"), model)
    settings = built("model", "model=bert-tiny", f"model.path={folder}", "model.weights=pretrained")
    with pytest.raises(ValueError, match="classifier.weight is missing"):
        settings.load(work(tmp_path), SimpleNamespace(classes=["no", "yes"]))


def test_networks_that_are_not_whole():
    weights = tiny_cnn().state_dict()
    weights.pop("conv2.weight")
    with pytest.raises(ValueError, match="conv2.weight"):
        fill(tiny_cnn(), weights, "cnn.pth")
    plain = torchvision.models.VisionTransformer(8, 4, 2, 2, 32, 64, num_classes=3).state_dict()
    name = "encoder.layers.encoder_layer_1.mlp.0.bias"
    assert translate_vit(plain)
    plain.pop(name)
    with pytest.raises(ValueError, match=f"{name} is missing"):
        named(plain, "vit.pth")


@pytest.mark.parametrize("count", [30, pytest.param(1500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer_config.json"])
def test_a_foreign_model_folder_is_one_line_before_anything_loads(tmp_path, name, count):
    """Before: a configuration of other types ended the check of a command in a traceback, an index its identity."""
    tiny_model().save_pretrained(tmp_path, max_shard_size="200KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    good = json.loads((tmp_path / name).read_text())
    model = built("model", "model=hf", path=str(tmp_path))
    lengths = SimpleNamespace(measure=SimpleNamespace(latency=False), dataset=SimpleNamespace(sequence_length=32))
    for said, text in variants(good, count, depth=3):
        (tmp_path / name).write_bytes(text)
        files = inputs.read_files(str(tmp_path), "model", {})
        assert name in files and all(path.is_file() for path in files.values()), said
        try:
            problems = model.problems(lengths)
        except ValueError as error:
            problems = [str(error)]
            assert problems[0].startswith(f"model.path: {tmp_path}/config.json is no configuration of a model ("), said
        assert all("\n" not in line for line in problems), said
