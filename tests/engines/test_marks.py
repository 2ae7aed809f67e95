"""Where a step's time goes: roles of modules, own times of what is nested and of kernels that overlap, order of a graph."""

import time
from typing import ClassVar

import pytest
import torch
from torch import nn

from sparsebench.engines import Decoder, fused_cuda, marks
from sparsebench.engines.marks import Kernel
from sparsebench.modules.base import SparseModule
from tests.helpers import tiny_model

MAPS = {"qkv", "o", "gate_up", "down"}


def test_every_part_of_a_llama_has_its_role():
    model = tiny_model()
    told = {name: role for name, m in model.named_modules() for other, role in marks.roles(model) if other is m}
    layer = {n.removeprefix("model.layers.1."): r for n, r in told.items() if n.startswith("model.layers.1.")}
    expected = {
        "input_layernorm": "norm", "post_attention_layernorm": "norm", "self_attn": "attention", "self_attn.q_proj": "qkv",
        "self_attn.k_proj": "qkv", "self_attn.v_proj": "qkv", "self_attn.o_proj": "o", "mlp": "ffn", "mlp.gate_proj": "gate_up",
        "mlp.up_proj": "gate_up", "mlp.down_proj": "down",
    }  # fmt: skip
    assert layer == expected
    assert (told["model.embed_tokens"], told["model.norm"], told["lm_head"]) == ("embed", "norm", "head")


@pytest.mark.parametrize("kind", ["gpt2", "opt", "phi3"])
def test_other_families_have_the_same_roles(kind):
    assert {role for _, role in marks.roles(tiny_model(kind))} >= MAPS | {"norm", "attention", "head"}


def test_a_module_that_stands_for_several_maps_is_the_ffn():
    assert marks.role("model.layers.0.mlp", Whole()) == "ffn"


class Whole(SparseModule):
    """One kernel for a whole FFN."""

    covers: ClassVar = {"0.gate": 1, "0.up": 1, "0.down": 1}


class Slow(nn.Module):
    """Waits before and after what it holds."""

    def __init__(self, seconds, inner=None):
        super().__init__()
        self.seconds, self.o_proj = seconds, inner

    def forward(self, x):
        time.sleep(self.seconds)
        return x if self.o_proj is None else self.o_proj(x)


def test_time_of_a_module_is_its_own_without_what_lies_inside():
    model = nn.Module()
    model.self_attn, model.weight = Slow(0.02, Slow(0.05)), nn.Parameter(torch.zeros(1))
    actual = marks.by_module(model, lambda: [model.self_attn(0) for _ in range(2)], 2)
    assert set(actual) == {"attention", "o"}
    assert 20 <= actual["attention"] < actual["o"] and actual["o"] >= 50  # sleeps are never shorter than asked
    assert not model.self_attn._forward_hooks and not model.self_attn._forward_pre_hooks


def test_an_eager_step_is_told_by_role():
    model = tiny_model()
    decoder = Decoder(model, torch.randint(0, 320, (1, 8)), 1, compiled=False)
    actual = decoder.marked(lambda: decoder.step(torch.zeros(1, 1, dtype=torch.int64)), 1)
    assert set(actual) == MAPS | {"embed", "norm", "attention", "ffn", "head"} and min(actual.values()) > 0


def test_a_compiled_step_on_a_cpu_says_that_it_has_no_marks():
    decoder = Decoder(tiny_model(), torch.randint(0, 320, (1, 8)), 1, compiled=False)
    decoder.engine = "compiled"
    with pytest.raises(ValueError, match="no marks"):
        decoder.marked(lambda: None, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels, as the profiler would give them


def test_kernels_that_overlap_are_counted_once():
    """The second waits inside the first and the third begins after a gap: 10 + 5 + 4, and 3 of nobody."""
    every = [Kernel("a", 0, 10), Kernel("b", 4, 15), Kernel("c", 18, 22), Kernel("d", 19, 21)]
    assert marks.own_times(every) == [10, 5, 4, 0]


def test_a_graph_is_told_by_the_order_of_its_kernels(monkeypatch):
    """Two kernels of one name are two roles; a copy between steps is nobody's."""
    every = [Kernel(n, 10 * i, 10 * i + 2 + i) for i, n in enumerate(["gather", "attend", "gather", "copy"] * 2)]
    monkeypatch.setattr(marks, "kernels", lambda take: every)
    actual = marks.by_order(lambda: None, 2, ["gather", "attend", "gather"], ["qkv", "attention", "o"])
    assert actual == pytest.approx({"qkv": 0.004, "attention": 0.005, "o": 0.006})  # (2 + 6) / 2 us and so on, in ms
    with pytest.raises(ValueError, match="saw 6 kernels of 9"):
        marks.by_order(lambda: None, 3, ["gather", "attend", "gather"], ["qkv", "attention", "o"])
    with pytest.raises(ValueError, match="not in their order"):
        marks.by_order(lambda: None, 2, ["attend", "gather", "gather"], ["qkv", "attention", "o"])


def test_kernels_of_a_compiler_are_told_by_what_their_names_hold(monkeypatch):
    names = {"triton_red_fused__to_copy_mm_3": "products", "void gemv2T_kernel_val<int>": "products",
             "triton_poi_fused_add_mul_pow_0": "norms and elementwise", "flash_fwd_splitkv_kernel": "attention",
             "Memcpy DtoD (Device -> Device)": "copies", "nvjet_tst_64x8": "products"}  # fmt: skip
    monkeypatch.setattr(marks, "kernels", lambda take: [Kernel(n, 10 * i, 10 * i + 4) for i, n in enumerate(names)])
    expected = {kind: 0.004 * list(names.values()).count(kind) for kind in set(names.values())}
    assert marks.by_name(lambda: None, 1) == pytest.approx(expected)


def test_launches_of_a_fused_gpu_step_have_roles():
    labels = {
        "embed": "embed", "3.qkv": "qkv", "3.qkv.remainder": "qkv", "3.attend": "attention", "3.gate_up": "gate_up", "head": "head",
    }  # fmt: skip
    launches = {label: fused_cuda.Launch("x", label, (1, 1), 0, [], None).role for label in labels}
    assert launches == labels
