"""Structure decides where a model can be sparse."""

import pytest
import torch
from torch import nn

from sparsebench.sites import find_blocks, shape
from tests.helpers import tiny_model


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_gated_models(kind):
    blocks = find_blocks(tiny_model(kind))
    assert [b.index for b in blocks] == [0, 1]
    assert list(blocks[1].sites) == ["q", "k", "v", "o", "gate", "up", "down"]
    assert blocks[1].sites["k"].path == "model.layers.1.self_attn.k_proj"
    assert {blocks[0].sites[r].group for r in ("q", "k", "v")} == {"attn_in"}
    assert {blocks[0].sites[r].group for r in ("gate", "up")} == {"mlp_in"}


def test_gpt2_stores_its_weights_the_other_way_round():
    model = tiny_model("gpt2")
    block = find_blocks(model)[0]
    assert list(block.sites) == ["qkv", "o", "fc1", "fc2"]
    assert shape(model.get_submodule(block.sites["qkv"].path)) == (192, 64)


def test_unknown_structure_lists_what_was_found():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"mixer": nn.Linear(4, 4), "expand": nn.Linear(4, 8)})])
    with pytest.raises(ValueError, match="expand, mixer"):
        find_blocks(model)


def test_right_names_with_wrong_shapes_are_no_match():
    model = tiny_model()
    model.model.layers[0].mlp.gate_proj = nn.Linear(64, 99)
    with pytest.raises(ValueError, match="model.layers.0 is a block of an unknown structure"):
        find_blocks(model)


def test_an_extra_linear_map_is_no_match():
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.router = nn.Linear(64, 4)
    with pytest.raises(ValueError, match=r"mlp\.router"):
        find_blocks(model)


def test_fused_projections_are_known():
    with torch.device("meta"):
        model = tiny_phi3()
    assert list(find_blocks(model)[0].sites) == ["qkv", "o", "gate_up", "down"]


def tiny_phi3():
    import transformers

    config = transformers.Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def test_a_block_that_differs_from_the_others_is_named():
    model = tiny_model(layers=3)
    model.model.layers[1].mlp.router = nn.Linear(64, 4)
    with pytest.raises(
        ValueError, match=r"model.layers.1 is a block of an unknown structure \(2 other blocks are"
    ) as line:
        find_blocks(model)
    assert "mlp.router" in str(line.value) and "GPT-NeoX, Pythia" in str(line.value)
