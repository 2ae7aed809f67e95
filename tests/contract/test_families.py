"""Families of transformers times language methods: the dense model with nothing dropped, a masked reference at its
operating point, or a refusal in one line; every map's product and the MACs of a step against the model itself. The whole
matrix makes docs/families.md (scripts/make_families.py)."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from sparsebench import engines
from sparsebench.engines import check
from sparsebench.measure import macs, neurons
from sparsebench.sites import find_blocks, weight_of
from tests.families import DENSE, KNOWN, METHODS, MIXTURES, ROWS, UNKNOWN, family, outcome

# One of each layout and of each peculiarity: post-norms, multipliers, parallel blocks, a norm in the FFN, flattened tokens.
REPRESENTATIVE = ("llama", "phi3", "gpt2", "opt", "gpt_neox", "olmo2", "granite", "cohere", "bitnet", "gemma2")
QUICK = ("teal", "wina", "larosa", "cats")
REFUSED = {
    "wina": {"gpt2", "opt", "gpt_neox", "olmo2", "cohere"},
    "larosa": {"gpt2", "opt", "gpt_neox", "olmo2", "cohere"},
    "cats": {"gpt2", "opt", "gpt_neox", "bitnet", "phi3"},
    "teal": set(),
}
# Further layouts and peculiarities for the structure itself, cheaper than a method: fused QKV by group, residuals inside the
# FFN, partial rotary, keys of other layers, maps beside the blocks, latent attention, experts.
LAYOUTS = (
    "apertus", "bloom", "codegen", "deepseek_v3", "falcon", "gemma3n_text", "gemma4_text", "glm", "gpt_neo", "gpt_oss", "gptj",
    "mixtral", "nanochat", "nemotron", "persimmon", "phi", "qwen2_moe", "starcoder2",
)  # fmt: skip


@pytest.mark.parametrize("kind", REPRESENTATIVE)
def test_a_family_and_a_method(kind, tmp_path):
    record = {name: outcome(kind, name, tmp_path) for name in QUICK}
    assert {name for name, line in record.items() if line != "equal"} == {n for n in QUICK if kind in REFUSED[n]}, (
        record
    )


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen2_moe"])
def test_a_mixture_and_a_method(kind, tmp_path):
    record = {name: outcome(kind, name, tmp_path) for name in ("teal", "wina_plain", "cats", "larosa")}
    assert record.pop("larosa") == "method=larosa takes no model with experts, got one with model.layers.0.mlp.experts"
    assert set(record.values()) == {"equal"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KNOWN)
def test_every_family_and_every_method(kind, tmp_path):
    record = {name: outcome(kind, name, tmp_path) for name in METHODS}
    equal = ("teal", "wina_plain", "cats") if kind in MIXTURES else ("teal", "wina_plain", "rsparse")
    assert {record[name] for name in equal} == {"equal"}


def check_structure(kind: str) -> None:
    """Every site's input times its weight is the model's own output; a decode step multiplies what is said; decode with a
    cache is the model."""
    model = family(kind)
    model.set_attn_implementation("eager")
    if kind in MIXTURES:
        model.set_experts_implementation("eager")  # its loop multiplies what it counts
    seen = []

    def compare(linear, args, output):
        seen.append(torch.allclose(F.linear(args[0], weight_of(linear), linear.bias), output, atol=1e-4))

    sites = {s.path for b in find_blocks(model) for s in b.sites.values()}
    hooks = [model.get_submodule(path).register_forward_hook(compare) for path in sites]
    with torch.no_grad():
        model(input_ids=ROWS[:2], use_cache=False)
    assert len(seen) == len(sites) and all(seen)
    for hook in hooks:
        hook.remove()
    dense, outside = macs.dense_sites(model), macs.outside_blocks(model, context := 7)
    with torch.no_grad():
        decoder = engines.Decoder(model, ROWS[:1, : context - 1], 1, compiled=False)
        with FlopCounterMode(display=False, custom_mapping=SDPA) as flops:
            decoder.step(ROWS[:1, context - 1 : context])
    assert sum(c.dense_macs for c in dense.values()) + outside.macs == flops.get_total_flops() / 2
    assert check.cache_error(model, ROWS[:1, :8], ROWS[0, 8:11]) < 1e-5
    if kind in LAYOUTS:
        assert engines.llama_type(model, (torch.float32,)).startswith(
            "it takes blocks with q, k, v, o, gate, up and down, got"
        )


def on_cpu(query, key, value, *args, out_shape=None, **kwargs):
    return sdpa_flop_count(query, key, value)


SDPA = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: on_cpu}  # what FlopCounterMode does not know


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_structure_of_a_layout_is_the_models(kind):
    check_structure(kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({*KNOWN} - {*LAYOUTS}))
def test_the_structure_of_every_family_is_the_models(kind):
    check_structure(kind)


def test_gemma_3n_is_sparse_by_itself_and_is_counted_as_it_comes():
    """Its statistical top-k leaves a tenth of the neurons in the layers that have it: zeros of the dense model."""
    model = family("gemma3n_text")
    zeros = neurons.zeros(model, ROWS[:4], 4, [1])["per_layer"]
    assert [round(zeros[layer], 1) for layer in range(4)] == [0.9, 0, 0.9, 0]


def test_a_family_of_unknown_structure_names_the_block():
    for kind in UNKNOWN:
        with pytest.raises(
            ValueError, match=r"\.0 is a block of an unknown structure; its linear maps: .*known families"
        ) as line:
            find_blocks(family(kind))
        assert "\n" not in str(line.value)
    assert not set(UNKNOWN) & {*DENSE, *MIXTURES}
