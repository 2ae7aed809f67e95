"""Decode engines on a GPU."""

import copy

import pytest
import torch
import transformers

from sparsebench import engines
from sparsebench.engines import fused_cuda
from sparsebench.measure import breakdown, clock, energy, latency
from sparsebench.modules.input_sparse import InputSparseLinear, replace
from sparsebench.sites import find_blocks
from tests.helpers import special_model


def llama(dtype, hidden=512, inner=1376, heads=4, groups=2, layers=2):
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to("cuda", dtype).eval().requires_grad_(False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("groups, rank", [(1, 0), (2, 0), (4, 0), (2, 51)])
@pytest.mark.parametrize("threshold", [-1.0, 0.5, 1e9])
def test_cuda_decoder(dtype, groups, rank, threshold):
    model = llama(dtype, groups=groups)
    dense = copy.deepcopy(model)
    for block in find_blocks(model):
        for site in block.sites.values():
            linear = model.get_submodule(site.path)
            low_rank = [torch.randn(n, rank, device="cuda").to(dtype) / 64 for n in reversed(linear.weight.shape)]
            low_rank = (low_rank[0], low_rank[1].t()) if rank else None
            replace(model, site.path, InputSparseLinear(linear, site.name, threshold, low_rank=low_rank))
    ids = torch.randint(0, 1000, (1, 40), device="cuda")
    fused = fused_cuda.Decoder(model, ids[:, :36], 4)
    assert max(fused.parity(ids[:, 36:37]).values()) < 1e-4
    if threshold < 0:
        reference = engines.Decoder(dense, ids[:, :36], 4, compiled=False)
        for i in range(36, 40):
            expected, actual = reference.step(ids[:, i : i + 1]).float(), fused.step(ids[:, i : i + 1])
            assert float((actual - expected).norm() / expected.norm()) < (1e-2 if dtype == torch.float16 else 5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("groups, share", [(2, 0.5), (4, 0.9), (1, 0.01)])
@pytest.mark.parametrize("choose, scaled", [("inside", False), ("inside", True), ("before", True)])
def test_cuda_decoder_keeps_the_largest(dtype, groups, share, choose, scaled, monkeypatch):
    """Step after step: words and guesses are left as they must be found, also in a graph that is replayed at once."""
    model = llama(dtype, groups=groups)
    for block in find_blocks(model):
        for site in block.sites.values():
            linear = model.get_submodule(site.path)
            n = linear.weight.shape[1]
            scale = torch.rand(n, device="cuda") + 0.5 if scaled else None
            replace(model, site.path, InputSparseLinear(linear, site.name, 0.0, top_k=int(n * share), scale=scale))
    monkeypatch.setattr(fused_cuda.Step, "choose", choose)
    ids = torch.randint(0, 1000, (1, 40), device="cuda")
    fused = fused_cuda.Decoder(model, ids[:, :36], 4)
    first = [fused.step(ids[:, i : i + 1]).clone() for i in range(36, 40)]
    errors = [fused.parity(ids[:, i : i + 1]) for i in (36, 37)]
    assert max(max(e.values()) for e in errors) < 1e-4  # a channel chosen otherwise would be 1e-2
    for _ in range(50):
        fused.rewind()
        again = [fused.step(ids[:, i : i + 1]).clone() for i in range(36, 40)]
    for a, b in zip(first, again, strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-2  # sums by atomics come in another order


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rotated", "rotated by thresholds", "cats", "cats and rotated"])
def test_cuda_decoder_rotates_and_chooses_neurons(dtype, kind):
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = special_model(kind, dtype, **sizes).to("cuda")
    ids = torch.randint(0, 320, (1, 40), device="cuda")
    for keep_all in (False, True):
        fused = fused_cuda.Decoder(model, ids[:, :36], 4, keep_all)
        for i in (36, 37):
            assert max(fused.parity(ids[:, i : i + 1]).values()) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_alone_keeps_the_largest(dtype):
    """The operator, and the operator captured in a graph: the word of the choice is the graph's own."""
    linear = torch.nn.Linear(4096, 1024, device="cuda", dtype=dtype).requires_grad_(False)
    sparse = InputSparseLinear(
        linear, "0.q", 0.0, top_k=1500, scale=torch.rand(4096, device="cuda"), kernel="cuda_gather"
    )
    x = torch.randn(1, 1, 4096, device="cuda", dtype=dtype)
    sparse(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse(x)
    for seed in range(5):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        graph.replay()
        expected = torch.where(sparse.keep(x), x, 0).float() @ sparse.weight.float().t() + linear.bias.float()
        assert float((y.float() - expected).norm() / expected.norm()) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.gpu
def test_cuda_greedy_tokens_come_from_the_device():
    model = llama(torch.float16)
    engines.channel_major(model)
    ids = torch.randint(0, 1000, (1, 16), device="cuda")
    fused = fused_cuda.Decoder(model, ids, 8)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)[0, 16:].tolist()
    first = int(fused.logits[0, -1].argmax())
    values = [first]
    fused.step(torch.tensor([[first]], device="cuda"))
    values.append(int(fused.parts[-1].token))
    for _ in range(4):
        fused.step()
        values.append(int(fused.parts[-1].token))
    assert values == expected


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["fused", "compiled", "eager"])
def test_a_step_is_told_by_role_and_its_parts_fill_its_time(engine):
    """At sizes where kernels are longer than the gaps between them; fused: norms are inside the products behind them."""
    model = llama(torch.float16, hidden=2048, inner=5504, heads=16, groups=16, layers=4)
    ids = torch.randint(0, 1000, (100,), device="cuda")
    text = latency.Text.of(ids, 64, model)
    decoder = engines.decoder(model, text.prompt, text.block, None, engine) if engine != "fused" else None
    if decoder is None:
        engines.channel_major(model)
        decoder = fused_cuda.Decoder(model, text.prompt, text.block)
    latency.warm(decoder, text)
    actual = breakdown.one_engine(decoder, text, torch.device("cuda"))
    roles = {"qkv", "attention", "o", "gate_up", "down", "head"}
    wanted = {"fused": roles | {"embed"}, "compiled": {"products"}, "eager": roles | {"embed", "norm", "ffn"}}[engine]
    assert "reason" not in actual and set(actual["ms"]) >= wanted, actual
    total = sum(actual["ms"].values())
    assert 0.3 * actual["step_ms"] < total < 1.5 * actual["step_ms"], actual
    assert 0 <= actual["unattributed"] < 0.7
    if engine == "fused":
        assert actual["ms"]["gate_up"] > actual["ms"]["o"]  # five times the weights


@pytest.mark.gpu
def test_energy_of_a_product_is_that_of_a_card_at_work():
    """Between a card's idle power and more than any card draws; twice the products of a call cost about twice as much."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    once, twice = (clock.Contender(lambda _, n=n: [a @ a for _ in range(n)]) for n in (50, 100))
    actual = energy.measure({"dense": twice, "sparse": once}, 1, "token", torch.device("cuda"))
    if actual["reason"]:
        pytest.skip(actual["reason"])
    assert 20 < actual["dense"]["watts"] < 2000
    assert 1.2 < actual["dense"]["joules"] / actual["sparse"]["joules"] < 3.5
