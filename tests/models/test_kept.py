"""Checkpoints stored in 8 or 4 bits: every weight is what the file says, and what can't be kept is refused in one line."""

import json

import pytest
import safetensors.torch
import torch

from sparsebench.models import gguf, kept
from sparsebench.models.language import CausalLM
from sparsebench.modules.quant_sparse import QuantLinear
from sparsebench.sites import find_blocks
from tests.helpers import tiny_model, tiny_tokenizer, work, write_gguf

IDS = torch.randint(0, 320, (2, 20), generator=torch.Generator().manual_seed(5))
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ's gemm packing: which output of eight stands in nibble i


def pack(levels, order=range(8)):
    """Eight integers of the last axis to an int32 word, nibble i from place order[i]."""
    words = sum(levels[..., place].long() << 4 * i for i, place in enumerate(order))
    return torch.where(words >= 2**31, words - 2**32, words).int()


def checkpoint(folder, method, group=32, change=lambda state, model: None, **settings):
    """A folder as AutoAWQ (gemm) or AutoGPTQ writes it, with random integers and zero points; the exact weights by path."""
    model, generator, exact = tiny_model(**SIZES), torch.Generator().manual_seed(3), {}
    state = {n: p.clone() for n, p in model.state_dict().items()}
    for site in (s for b in find_blocks(model) for s in b.sites.values()):
        m, n = model.get_submodule(site.path).weight.shape
        del state[f"{site.path}.weight"]
        levels = torch.randint(0, 16, (n, m), generator=generator)
        zeros = torch.randint(1, 15, (n // group, m), generator=generator)
        scales = (torch.rand(n // group, m, generator=generator) * 0.02 + 0.01).half()
        wide = [t.float().repeat_interleave(group, 0) for t in (scales, zeros)]
        exact[site.path] = ((levels - wide[1]) * wide[0]).t()
        state[f"{site.path}.scales"] = scales
        if method == "awq":
            state[f"{site.path}.qweight"] = pack(levels.unflatten(1, (-1, 8)), AWQ_ORDER)
            state[f"{site.path}.qzeros"] = pack(zeros.unflatten(1, (-1, 8)), AWQ_ORDER)
        else:
            state[f"{site.path}.qweight"] = pack(levels.t().unflatten(1, (-1, 8))).t().contiguous()
            state[f"{site.path}.qzeros"] = pack(zeros.unflatten(1, (-1, 8)) - 1)
            state[f"{site.path}.g_idx"] = (torch.arange(n) // group).int()
    change(state, model)
    model.config.quantization_config = {"quant_method": method, "bits": 4, "group_size": group, **settings}
    folder.mkdir()
    model.config.save_pretrained(folder)
    safetensors.torch.save_file({n: t.contiguous() for n, t in state.items()}, folder / "model.safetensors")
    tiny_tokenizer().save_pretrained(folder)
    return exact


def model_at(path, quantize="keep", **changes):
    fields = {
        "revision": None,
        "weights": "pretrained",
        "num_layers": None,
        "trust_remote_code": False,
        "architecture": None,
    }
    return CausalLM(name="q", path=str(path), train=None, quantize=quantize, **fields, **changes)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_stored_checkpoint_is_kept_weight_by_weight(method, tmp_path):
    exact = checkpoint(tmp_path / "q", method)
    model = model_at(tmp_path / "q")
    assert model.storage_problem() is None
    loaded = model.load(work(tmp_path), None)
    for path, weight in exact.items():
        held = loaded.module.get_submodule(path)
        assert isinstance(held, QuantLinear) and held.packed.bits == 4
        assert torch.equal(held.packed.dequantised(torch.float32), weight)
    assert loaded.info["quantisation"]["rounding"] == f"as stored ({method}), with zero points"
    dense = tiny_model(**SIZES)
    for path, weight in exact.items():
        dense.get_submodule(path).weight.data = weight
    torch.testing.assert_close(loaded.module(input_ids=IDS).logits, dense(input_ids=IDS).logits)


def interleaved(state, model):
    name = "model.layers.1.mlp.up_proj.g_idx"
    state[name] = state[name].flip(0).contiguous()


def without_zeros(state, model):
    del state["model.layers.0.mlp.up_proj.qzeros"]


@pytest.mark.parametrize(
    ("change", "message"),
    [(interleaved, "up_proj interleave .*desc_act"), (without_zeros, "up_proj.qzeros is missing"),
     (lambda state, model: state.pop("model.norm.weight"), "model.norm.weight is missing")],
)  # fmt: skip
def test_a_checkpoint_that_is_not_whole_or_interleaves_is_refused(change, message, tmp_path):
    checkpoint(tmp_path / "q", "gptq", change=change)
    with pytest.raises(ValueError, match=message):
        model_at(tmp_path / "q").load(work(tmp_path), None)


@pytest.mark.parametrize(
    ("settings", "quantize", "message"),
    [
        ({"bits": 8}, "keep", "4 bits are known in gptq, got 8"),
        ({"quant_method": "awq", "version": "gemv"}, "keep", "version gemm is known, got gemv"),
        ({"quant_method": "fp8"}, "keep", "known are GGUF files and folders in awq and gptq, got fp8"),
        ({}, "int4", "must be none or keep for a checkpoint that is in gptq already, got int4"),
        (
            {"quant_method": "compressed-tensors"},
            "none",
            "transformers needs compressed_tensors: pip install compressed_t",
        ),
        ({"group_size": 0}, "keep", "a group size is needed, got 0"),
    ],
)
def test_what_is_stored_otherwise_is_refused_before_it_is_read(settings, quantize, message, tmp_path, monkeypatch):
    checkpoint(tmp_path / "q", "gptq")
    monkeypatch.setattr(kept, "find_spec", lambda name: None)
    file = tmp_path / "q" / "config.json"
    content = json.loads(file.read_text())
    content["quantization_config"] |= settings
    file.write_text(json.dumps(content))
    problem = model_at(tmp_path / "q", quantize).storage_problem()
    assert message in problem and "\n" not in problem


def test_a_plain_folder_has_nothing_to_keep(tmp_path):
    tiny_model(**SIZES).save_pretrained(tmp_path)
    assert "no folder whose config.json has a quantization_config" in model_at(tmp_path).storage_problem()
    assert model_at(tmp_path, "int4").storage_problem() is None


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q4_1", 4), ("Q8_0", 8)])
def test_a_gguf_file_is_kept_in_its_bits(kind, bits, tmp_path):
    """Every map against the gguf package's own dequantisation; q and k of a Llama, whose rows the file permutes, too."""
    file = write_gguf(tmp_path / "m.gguf", tiny_model(**SIZES), "llama", kind)
    model = model_at(file)
    assert model.storage_problem() is None
    loaded, plain = model.load(work(tmp_path), None), gguf.load(str(file), model.config(), torch.float32)
    for site in (s for b in find_blocks(plain) for s in b.sites.values()):
        packed = loaded.module.get_submodule(site.path).packed
        expected = plain.get_submodule(site.path).weight
        assert packed.bits == bits and packed.group == 32
        torch.testing.assert_close(packed.dequantised(), expected, rtol=0, atol=0 if kind != "Q4_1" else 2e-3)
    torch.testing.assert_close(
        loaded.module(input_ids=IDS).logits,
        plain(input_ids=IDS).logits,
        rtol=1e-4,
        atol=1e-4 if kind != "Q4_1" else 0.1,
    )
    assert loaded.info["gguf"]["weights"].startswith("block maps as stored")
    one = loaded.module(input_ids=IDS[:1, :1]).logits
    torch.testing.assert_close(one, loaded.module(input_ids=IDS[:1]).logits[:, :1], rtol=1e-3, atol=1e-3)


def test_a_gguf_file_in_other_types_is_refused(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", tiny_model(**SIZES), "llama", {"blk.1.ffn_up.weight": "Q5_0"})
    problem = model_at(file).storage_problem()
    assert "is stored in F32 (13 of 14 maps" in problem or "is stored in" in problem
    assert "Q4_0, Q4_1, Q8_0" in problem
