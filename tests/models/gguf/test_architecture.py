"""A GGUF file's model is the model it was written from: every architecture, quantised, cut, tied; refusals in one line."""

import math

import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from sparsebench.models import gguf
from sparsebench.models.gguf import architecture, header
from tests.families import family
from tests.helpers import GGUF_KINDS, logits, write_gguf

ROWS = torch.randint(1, 320, (2, 24), generator=torch.Generator().manual_seed(5))
CHANGES = {
    "llama": {"num_key_value_heads": 2}, "qwen2": {}, "qwen3": {}, "phi2": {"num_key_value_heads": 4}, "phi3": {},
    "gemma3": {"sliding_window": 8, "query_pre_attn_scalar": 16, "num_hidden_layers": 7},
}  # fmt: skip


def model_of(name, **changes):
    model = family(GGUF_KINDS[name], **{**CHANGES[name], **changes})
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if n.endswith("bias")):
            parameter.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(1))
    return model


def loaded(path, dtype=torch.float32):
    assert gguf.problem(str(path), "model.path") is None
    return gguf.load(str(path), gguf.config(str(path)), dtype).eval()


@pytest.mark.parametrize("name", GGUF_KINDS)
def test_the_logits_are_those_of_the_model_it_was_written_from(name, tmp_path):
    model = model_of(name)
    again = loaded(write_gguf(tmp_path / "m.gguf", model, name))
    assert type(again) is type(model)
    torch.testing.assert_close(logits(again, ROWS), logits(model, ROWS), rtol=1e-4, atol=1e-4)


def test_the_converters_names_of_gemmas_four_norms(tmp_path):
    """As llama.cpp's converter gives them: `ffn_norm` stands before the FFN, and each holds 1 + w."""
    model = model_of("gemma3", num_hidden_layers=1)
    file = header.read(write_gguf(tmp_path / "m.gguf", model, "gemma3"))
    layer = model.model.layers[0]
    for name, norm in {
        "attn_norm": layer.input_layernorm, "post_attention_norm": layer.post_attention_layernorm,
        "ffn_norm": layer.pre_feedforward_layernorm, "post_ffw_norm": layer.post_feedforward_layernorm,
        "attn_q_norm": layer.self_attn.q_norm,
    }.items():  # fmt: skip
        np.testing.assert_allclose(file.dequantised(f"blk.0.{name}.weight"), 1 + norm.weight.numpy(), rtol=1e-6)


@pytest.mark.parametrize(("kind", "most"), [("Q8_0", 0.02), ("Q4_0", 0.35), ("BF16", 0.02)])
def test_quantised_weights_are_those_of_the_gguf_package(kind, most, tmp_path):
    model = model_of("llama")
    path = write_gguf(tmp_path / "m.gguf", model, "llama", kind)
    again = loaded(path)
    down, stored = (
        model.model.layers[1].mlp.down_proj.weight.numpy(),
        header.read(path).tensors["blk.1.ffn_down.weight"],
    )
    expected = dequantize(quantize(down, stored.type), stored.type)
    np.testing.assert_array_equal(again.model.layers[1].mlp.down_proj.weight.detach().numpy(), expected)
    error = float((logits(again, ROWS) - logits(model, ROWS)).norm() / logits(model, ROWS).norm())
    assert 0 < error < most
    about, caution = gguf.describe(str(path), again.config, torch.float32)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    share = matrices / sum(p.numel() for p in model.parameters())
    assert about["quantisation"] == {kind: pytest.approx(share), "F32": pytest.approx(1 - share)}
    assert about["weights"].startswith(f"dequantised from {kind} (9") and "no quantised kernel ran" in caution


def test_the_runs_dtype_and_a_cut_depth(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"), "llama")
    config = gguf.config(str(path))
    config.num_hidden_layers = 1
    cut = gguf.load(str(path), config, torch.bfloat16)
    assert len(cut.model.layers) == 1 and {p.dtype for p in cut.parameters()} == {torch.bfloat16}


def test_heads_tied_untied_and_stored_twice(tmp_path):
    untied = loaded(write_gguf(tmp_path / "untied.gguf", model_of("llama", tie_word_embeddings=False), "llama"))
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    tied = model_of("llama", tie_word_embeddings=True)
    assert loaded(write_gguf(tmp_path / "tied.gguf", tied, "llama")).config.tie_word_embeddings

    kinds = {"token_embd.weight": "Q4_1", "output.weight": "Q8_0"}
    path = write_gguf(tmp_path / "twice.gguf", tied, "llama", kinds, change=twice)
    again = loaded(path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    finer = header.read(path).dequantised("output.weight")
    np.testing.assert_array_equal(again.lm_head.weight.detach().numpy(), finer)
    apart = write_gguf(tmp_path / "apart.gguf", tied, "llama", kinds, change=lambda t: twice(t, shift=0.1))
    assert not gguf.config(str(apart)).tie_word_embeddings


def twice(tensors, shift=0.0):
    """Head and embedding as two tensors."""
    return {**tensors, "output.weight": tensors["token_embd.weight"] + shift}


def test_phi2s_fused_queries_keys_and_values(tmp_path):
    """Older files hold q, k and v one under the other in one tensor."""
    model = model_of("phi2")

    def fused(tensors):
        kept = {k: v for k, v in tensors.items() if not any(f".attn_{p}." in k for p in "qkv")}
        for layer in range(2):
            for end in ("weight", "bias"):
                parts = [tensors[f"blk.{layer}.attn_{p}.{end}"] for p in "qkv"]
                kept[f"blk.{layer}.attn_qkv.{end}"] = np.concatenate(parts)
        return kept

    again = loaded(write_gguf(tmp_path / "m.gguf", model, "phi2", change=fused))
    torch.testing.assert_close(logits(again, ROWS), logits(model, ROWS), rtol=1e-4, atol=1e-4)


def test_llama_3s_stored_factors_are_its_rule():
    """Llama 3.2's factors, worked out from its published rule for each wavelength."""
    theta, factor, low, high, length = 500000.0, 32.0, 1.0, 4.0, 8192
    factors = []
    for i in range(32):
        wavelength = 2 * math.pi * theta ** (i / 32)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    rope = architecture.llama3(np.array(factors, np.float32), theta)
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("llama3", 32.0, 8192)
    other = architecture.llama3(np.linspace(1, 3, 8, dtype=np.float32), 10000.0)
    assert other["rope_type"] == "longrope" and other["long_factor"] == other["short_factor"]


@pytest.mark.parametrize("factors", ["llama3", "other"])
def test_stored_factors_divide_the_frequencies(factors, tmp_path):
    rope = {"rope_theta": 10000.0}
    llama3 = {"rope_type": "llama3", "factor": 8.0, **architecture.LLAMA3}
    model = model_of("llama", rope_parameters=rope | (llama3 if factors == "llama3" else {"rope_type": "default"}))
    rotary = model.model.rotary_emb
    plain = 10000.0 ** -(torch.arange(8) / 8)
    if factors == "other":
        rotary.inv_freq = plain / torch.linspace(1, 3, 8)

    def stored(tensors):
        return {**tensors, "rope_freqs.weight": (plain / rotary.inv_freq).numpy()}

    again = loaded(write_gguf(tmp_path / "m.gguf", model, "llama", change=stored))
    torch.testing.assert_close(again.model.rotary_emb.inv_freq, rotary.inv_freq, rtol=1e-5, atol=0)
    torch.testing.assert_close(logits(again, ROWS), logits(model, ROWS), rtol=1e-4, atol=1e-4)


def test_scaled_rotary_embeddings(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    model = model_of("llama", rope_parameters=rope)
    fields = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
    again = loaded(write_gguf(tmp_path / "m.gguf", model, "llama", **fields))
    torch.testing.assert_close(logits(again, ROWS), logits(model, ROWS), rtol=1e-4, atol=1e-4)


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def beside(tensors):
    return {**tensors, "blk.0.attn_k.bias": np.zeros(32, np.float32)}


def narrow(tensors):
    return {**tensors, "blk.1.ffn_up.weight": tensors["blk.1.ffn_up.weight"][:96]}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"general__architecture": "mamba"}, "its architecture is 'mamba', known are llama, qwen2, qwen3, gemma3, phi2, phi3"),
        ({"llama__expert_count": 8}, "it is a mixture of 8 experts"),
        ({"llama__block_count": None}, "llama.block_count is missing"),
        ({"llama__rope__scaling__type": "odd", "llama__rope__scaling__factor": 2.0}, "scaled by 'odd', known are none, linear"),
        ({"llama__attention__head_count_kv": [2, 1]}, "attention.head_count_kv differs between blocks"),
        ({"tokenizer__ggml__pre": "tekken"}, "its pre-tokenizer is 'tekken', known are gpt-2, phi-2, smollm"),
        ({"tokenizer__ggml__model": "bert"}, "its tokenizer is of kind 'bert', known are gpt2"),
        ({"change": without("blk.1.attn_v.weight")}, "it is no whole LlamaForCausalLM: blk.1.attn_v.weight is missing"),
        ({"change": without("token_embd.weight")}, "token_embd.weight is missing"),
        ({"change": beside}, "blk.0.attn_k.bias is in the file but not in a LlamaForCausalLM"),
        ({"change": narrow}, "blk.1.ffn_up.weight has shape [96, 64], the model [160, 64]"),
    ],
)  # fmt: skip
def test_what_can_not_be_loaded_is_said_in_one_line(given, line, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"), "llama", **given)
    said = gguf.problem(str(path), "model.path")
    assert said.startswith("model.path must be a whole GGUF file of a known architecture, got ") and line in said
    assert "\n" not in said
