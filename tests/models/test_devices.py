"""A model over several devices: which part lies where, what follows it, and that nothing of its figures changes.

There is one device here, so the second is `meta`, where shapes are computed without content, or the CPU once more.
"""

import functools

import pytest
import torch
import transformers

from sparsebench import engines
from sparsebench.engines import fused_cuda
from sparsebench.models import devices
from sparsebench.modules import storage
from sparsebench.sites import find_blocks
from tests.helpers import built, sparse_copy, tiny_model

CPU, META = torch.device("cpu"), torch.device("meta")
CARDS = [torch.device("cuda", i) for i in range(3)]


def big(layers=80, **changes):
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    return transformers.LlamaConfig(vocab_size=32000, num_hidden_layers=layers, **{**sizes, **changes})


@pytest.mark.parametrize("count, layers", [(1, 8), (2, 80), (3, 8), (2, 1)])
def test_blocks_lie_in_order_in_shares_of_equal_bytes(count, layers):
    """Llama-2-70B's shape among others: no device holds more than its share and half a block."""
    module = devices.skeleton(big(layers), torch.float16)
    placement = devices.placed(module, CARDS[:count])
    paths = [block.path for block in find_blocks(module)]
    numbers = [placement[path].index for path in paths]
    assert numbers == sorted(numbers) and placement["model.embed_tokens"] == CARDS[0]
    assert placement["lm_head"] == placement["model.norm"] == CARDS[count - 1]
    sizes = {p: sum(devices.own_bytes(m) for m in module.get_submodule(p).modules()) for p in placement}
    total, block = sum(sizes.values()), sizes[paths[0]]
    assert total == sum(p.numel() * 2 for p in module.parameters()) + sum(
        b.numel() * b.itemsize for b in module.buffers()
    )
    for device in CARDS[:count]:
        assert (
            abs(sum(s for p, s in sizes.items() if placement[p] == device) - total / count) <= block + sizes["lm_head"]
        )
    if layers == 80:
        assert [numbers.count(i) for i in range(2)] == [40, 40] and 137e9 < total < 139e9


def test_a_head_that_is_tied_stays_with_the_embeddings():
    placement = devices.placed(tiny_model(tie_word_embeddings=True), CARDS[:2])
    assert placement["lm_head"] == placement["model.embed_tokens"] == CARDS[0] and placement["model.norm"] == CARDS[1]


def test_a_fused_step_with_a_tied_head_on_another_device_is_refused():
    model = devices.skeleton(tiny_model(tie_word_embeddings=True).config, torch.float16)
    blocks = find_blocks(model)
    assert fused_cuda.elsewhere(model, blocks) is None
    model.get_submodule(blocks[-1].path).to_empty(device="cpu")
    assert fused_cuda.elsewhere(model, blocks) == "it takes a head on the device of the last block"


def test_random_weights_are_drawn_where_they_stay():
    """As transformers draws them, rotary tables included; the modules are not built with content first."""
    config = tiny_model().config
    module = devices.made_random(config, torch.float32, [CPU, CPU], seed=1).requires_grad_(False)
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
    for (name, own), (_, other) in zip(module.named_parameters(), plain.named_parameters(), strict=True):
        assert own.shape == other.shape and float(own.std()) == pytest.approx(float(other.std()), rel=0.1), name
    for own, other in zip(module.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(own, other)
    again = devices.made_random(config, torch.float32, [CPU, CPU], seed=1)
    assert torch.equal(module.lm_head.weight, again.lm_head.weight)


def test_every_part_gets_its_inputs_on_its_own_device(monkeypatch):
    """Half of the model on `meta`: a tensor that did not follow would be refused by the first product there."""
    seen = []
    monkeypatch.setattr(devices, "leave", lambda device, _, args, output: seen.append(device))
    model = tiny_model(layers=4)
    placement = devices.placed(model, [CPU, META])
    assert [placement[b.path] for b in find_blocks(model)] == [CPU, CPU, META, META]
    devices.spread(model, placement)
    output = model(input_ids=torch.arange(12)[None])
    assert output.logits.device == META and output.logits.shape == (1, 12, 320) and seen == [CPU, CPU]


def test_a_spread_model_is_the_model_eager_fused_dense_and_sparse():
    """Hooks on every part change nothing, in copies, with replaced maps, and with a cache."""
    ids, plain = torch.arange(20)[None] % 320, tiny_model()
    expected = plain(input_ids=ids).logits
    spread = devices.moved_to(tiny_model(), [CPU, CPU])
    assert torch.equal(spread(input_ids=ids).logits, expected) and devices.blocks_on(spread) == {"cpu": 2}
    twin, target = storage.sharing_copy(spread), built("hardware", "hardware=cpu", threads=1)
    target.prepare()
    step = engines.decoder(plain, ids[:, :8], 4, target, "eager").step(ids[:, 8:9])
    for engine in ("eager", "fused"):
        decoder = engines.decoder(
            storage.sharing_copy(spread), ids[:, :8], 4, target, engine, keep_all=engine == "fused"
        )
        torch.testing.assert_close(decoder.step(ids[:, 8:9]), step, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        sparse_copy(0.3, model=twin)(input_ids=ids).logits, sparse_copy(0.3)(input_ids=ids).logits
    )


def test_moved_follows_nested_inputs_and_leaves_a_cache_alone():
    class Cache:
        def to(self, device):
            raise AssertionError("a cache has layers of its own on each device")

    cache = Cache()
    given = ({"mask": torch.zeros(2), "pair": (torch.zeros(1), None)}, [torch.ones(1)], cache, 3)
    moved = devices.moved(given, META)
    assert moved[0]["mask"].device == moved[0]["pair"][0].device == moved[1][0].device == META
    assert moved[0]["pair"][1] is None and moved[2] is cache and moved[3] == 3


def test_a_model_that_does_not_fit_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80_000_000_000, 85_000_000_000))
    check = functools.partial(devices.check_room, big(), torch.float16)
    check(CARDS[:2])
    with pytest.raises(
        ValueError, match=r"hardware.devices=1: the weights take 138.0 GB, 80.0 GB are free; nothing is left on"
    ):
        check(CARDS[:1])


@pytest.mark.parametrize(
    "given, line",
    [
        (["hardware=cpu", "hardware.devices=2"], "hardware.devices must be 1 on a CPU, got 2"),
        (
            ["hardware=cuda", "hardware.devices=4"],
            "hardware.devices must be at most 3, the GPUs of this machine, got 4",
        ),
        (
            ["hardware=h200", "hardware.devices=2"],
            "hardware.devices must be at most 1, the GPUs of this machine named 'H200', got 2",
        ),
        (["hardware=h100", "hardware.devices=2"], None),
    ],
)
def test_as_many_devices_as_there_are(given, line, monkeypatch):
    monkeypatch.setattr(
        "sparsebench.records.machine.gpu_names", lambda: ["NVIDIA H100 80GB", "NVIDIA H200", "NVIDIA H100 80GB"]
    )
    hardware = built("hardware", *given)
    assert [p for p in hardware.problems(None) if "devices" in p] == ([line] if line else [])
    assert built("hardware", "hardware=h100", devices=2).chosen(["NVIDIA H100", "NVIDIA H200", "NVIDIA H100"]) == [0, 2]
