"""Polar Sparsity: docs/methods/polar.md, its checks by number (4 is in tests/kernels, 5 in tests/measure)."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from sparsebench import config, kernels
from sparsebench.config.compose import compose_all
from sparsebench.engines import Decoder
from sparsebench.kernels import cpu_numba, masked_dense
from sparsebench.measure import few_rows, latency, macs, sparsity, unions
from sparsebench.methods.polar import budgets
from sparsebench.models import Loaded
from sparsebench.modules import heads
from sparsebench.modules.heads import HeadSparseOutput
from sparsebench.sites import find_blocks
from tests.helpers import built, tiny_model, work

IDS = torch.randint(0, 320, (4, 20), generator=torch.Generator().manual_seed(5))


class Text:
    sequence_length = 20

    def sequences(self, limit=None):
        return torch.randint(0, 320, (8, 20), generator=torch.Generator().manual_seed(6))[:limit]


def polar(model, tmp_path, kernel="cpu_numba", **changes):
    """`model` with the method applied, and its state."""
    method = built("method", "method=polar", calibration_tokens=160, **changes)
    loaded = Loaded(module=model, tokenizer=None, info={})
    place = work(tmp_path)
    state = method.fit(loaded, SimpleNamespace(fit=Text()), place)
    place.hardware.kernel_name = kernel
    return method.apply(model, state, place), state


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def outputs(model):
    return {m.layer: m for m in model.modules() if isinstance(m, HeadSparseOutput)}


def projected(model, ids=IDS):
    """What each head-sparse projection multiplies, [B, T, heads, size] by layer."""
    seen = {}
    product = torch.nn.functional.linear

    def linear(x, weight, bias=None):
        for layer, m in outputs(model).items():
            if weight is m.weight:
                seen[layer] = x.unflatten(-1, (m.heads, -1))
        return product(x, weight, bias)

    heads.F.linear, before = linear, heads.F.linear
    try:
        logits(model, ids)
    finally:
        heads.F.linear = before
    return seen


def test_all_heads_are_the_dense_model_bit_for_bit(tmp_path):
    """Check 1."""
    dense = logits(tiny_model())
    model, _ = polar(tiny_model(), tmp_path, density=1.0, router="oracle")
    assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("router", ["oracle", "previous", "static", "trained"])
def test_exactly_k_heads_in_every_layer_but_the_first(router, tmp_path):
    """Check 2, for every router; 8 heads, 3 kept."""
    shape = {"num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 3}
    model, _ = polar(tiny_model(**shape), tmp_path, density=0.4, router=router)
    seen = projected(model)
    assert sorted(seen) == [1, 2]
    for parts in seen.values():
        assert (parts.norm(dim=-1) > 0).sum(-1).eq(3).all()
    sparse = outputs(model)[1]
    sparse.hidden = torch.zeros(2, 3, 64)
    keep = sparse.keep(torch.zeros(2, 3, 64))  # ties everywhere: still distinct
    assert keep.sum(-1).eq(3).all()


def test_the_oracle_keeps_the_longest_heads(tmp_path):
    shape = {"num_attention_heads": 8, "num_key_value_heads": 8}
    model, _ = polar(tiny_model(**shape), tmp_path, density=0.5, router="oracle")
    x = torch.randn(2, 3, 64)
    keep = outputs(model)[1].keep(x)
    norms = x.unflatten(-1, (8, 8)).norm(dim=-1)
    assert (norms.masked_fill(~keep, 9).amin(-1) >= norms.masked_fill(keep, 0).amax(-1)).all()
    model, _ = polar(tiny_model(**shape), tmp_path, density=0.5, router="previous")
    shifted = outputs(model)[1].keep(x)
    assert torch.equal(shifted[:, 1:], keep[:, :-1]) and torch.equal(shifted[:, 0], keep[:, 0])


def test_heads_of_a_group_share_the_decision(tmp_path):
    """Check 3: two query heads a group; with as many groups as heads, groups are heads."""
    model, _ = polar(tiny_model(), tmp_path, density=0.5, router="oracle")
    alive = projected(model)[1].norm(dim=-1) > 0  # 4 heads, 2 groups
    assert torch.equal(alive[..., 0], alive[..., 1]) and torch.equal(alive[..., 2], alive[..., 3])
    assert alive.sum(-1).eq(2).all()
    x = torch.randn(1, 3, 64)
    by_head = heads.head_scores(x, 4, 4)
    assert torch.equal(heads.head_scores(x, 4, 2), by_head.unflatten(-1, (2, 2)).amax(-1))
    same = {"num_attention_heads": 4, "num_key_value_heads": 4}
    grouped, _ = polar(tiny_model(**same), tmp_path, density=0.5, router="oracle", unit="group")
    single, _ = polar(tiny_model(**same), tmp_path, density=0.5, router="oracle", unit="head")
    assert torch.equal(logits(grouped), logits(single))


def test_how_many_are_kept_follows_the_official_code():
    counts = [budgets.head_count(8, d, grouped) for d in (0.625, 0.3) for grouped in (True, False)]
    assert counts == [5, 5, 3, 2] and budgets.head_count(32, 0.3, False) == 9 and budgets.head_count(4, 0.1, False) == 1


@pytest.mark.parametrize("router", ["static", "trained"])
@pytest.mark.parametrize("groups", [2, 4])
def test_decode_reads_the_kept_cache_only_and_is_the_masked_model(router, groups, tmp_path, monkeypatch):
    """Check 4 inside a model: NaN in the caches of dropped groups changes nothing; logits are those of whole windows."""
    model, _ = polar(tiny_model(num_key_value_heads=groups), tmp_path, density=0.5, router=router)
    expected, calls = logits(model)[:, -1], []
    attention = cpu_numba.selective_attention

    def poisoned(q, keys, values, keep, lengths, scaling):
        calls.append(keep)
        keys, values = (torch.where(keep[..., None, None], t, float("nan")) for t in (keys, values))
        return attention(q, keys, values, keep, lengths, scaling)

    monkeypatch.setattr(cpu_numba, "selective_attention", poisoned)
    decoder = Decoder(model, IDS[:, :-1], 3, compiled=False)
    assert not calls  # the prompt is masked
    torch.testing.assert_close(decoder.step(IDS[:, -1:])[:, 0], expected, rtol=1e-3, atol=1e-3)
    assert len(calls) == 1 and calls[0].shape == (4, groups) and calls[0].sum(-1).eq(groups // 2).all()


def test_a_router_learns_what_the_input_says(tmp_path):
    """The trained router finds the longest heads of its own text better than the fixed ranking."""
    shape = {"num_attention_heads": 8, "num_key_value_heads": 8}
    rights = {}
    for router in ("static", "trained"):
        training = {"epochs": 12, "density": 0.5}
        model, _ = polar(tiny_model(**shape), tmp_path, density=0.5, router=router, training=training)
        sparse, hits = outputs(model)[1], []

        def compare(module, args, sparse=sparse, hits=hits):
            truth = heads.head_scores(args[0], 8, 8)
            best = torch.zeros_like(truth, dtype=torch.bool).scatter_(-1, truth.topk(4, -1).indices, True)
            hits.append((sparse.keep(args[0]) & best).sum() / best.sum())

        with sparse.register_forward_pre_hook(compare):
            logits(model, Text().sequences())
        rights[router] = float(torch.stack(hits).mean())
    assert rights["trained"] > rights["static"] + 0.02 > 0.5, rights


def relu_model():
    return tiny_model("opt")


def test_exact_zeros_of_relu_neurons_are_skipped_by_the_union(tmp_path):
    """Check 6: with neurons=exact nothing changes, and a batch reads the neurons that any row needs."""
    dense = logits(relu_model())
    model, _ = polar(relu_model(), tmp_path, density=1.0, neurons="exact", router="oracle")
    torch.testing.assert_close(logits(model), dense, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="models with ReLU, got silu"):
        polar(tiny_model(), tmp_path, density=1.0, neurons="exact", router="oracle")
    x, up, down = torch.randn(4, 1, 24), torch.randn(40, 24), torch.randn(40, 24).t()
    gate = torch.relu(torch.randn(4, 1, 40) - 1)
    idle = (gate == 0).flatten(0, 1).all(0)
    assert idle.any()
    poisoned, below = up.clone(), down.t().clone()
    poisoned[idle], below[idle] = float("nan"), float("nan")
    y = cpu_numba.neuron_sparse_ffn(x, gate, poisoned, below.t())
    torch.testing.assert_close(y, masked_dense.neuron_sparse_ffn(x, gate, up, down), rtol=1e-5, atol=1e-5)


def test_the_cache_holds_all_heads(tmp_path):
    """Check 7: layer 0 is bit-equal to dense after a sparse step, and every layer writes keys of all groups."""
    dense = Decoder(tiny_model(), IDS[:1, :-1], 2, compiled=False)
    model, _ = polar(tiny_model(), tmp_path, density=0.5, router="static")
    sparse = Decoder(model, IDS[:1, :-1], 2, compiled=False)
    for decoder in (dense, sparse):
        decoder.step(IDS[:1, -1:])
    for name in ("keys", "values"):
        assert torch.equal(getattr(dense.cache.layers[0], name), getattr(sparse.cache.layers[0], name))
        held = getattr(sparse.cache.layers[1], name)[:, :, : IDS.shape[1]]
        assert (held.abs().sum(-1) > 0).all()


def test_scores_by_output_drop_no_more_of_the_output():
    """Check 8: sum over dropped heads of ||W_h a_h|| is never larger with score=out at equal k."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48, bias=False)
    linear.weight.data *= torch.logspace(-1, 1, 16).repeat_interleave(4)
    x, bounds = torch.randn(2, 9, 64), {}
    parts = heads.head_scores(x, 16, 16, linear.weight)
    for by_output in (False, True):
        sparse = HeadSparseOutput(copy.deepcopy(linear), 1, 16, 16, 8, router="oracle", by_output=by_output)
        bounds[by_output] = parts.masked_fill(sparse.keep(x), 0).sum(-1)
    assert (bounds[True] <= bounds[False] + 1e-6).all() and (bounds[True] < bounds[False] - 0.1).any()


def test_the_recall_search_of_neurons():
    """Check 9: recall never falls with k; k is a multiple of 128, and at least the true union where the router is right."""
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(6, 4, 1000, generator=generator) < torch.rand(1000, generator=generator) * 0.3
    noisy = active.float() + torch.rand(6, 4, 1000, generator=generator) * 2
    recalls = [budgets.recall(noisy, active, k) for k in range(50, 1001, 50)]
    assert recalls == sorted(recalls) and recalls[0] < 0.5 and recalls[-1] == 1
    k, reached = budgets.search(active.float(), active, 64)
    assert k % 128 == 0 and reached >= 0.99 and k >= 0.99 * active.any(1).sum(-1).float().min()
    assert budgets.search(noisy * 0, active, 64, step=4000)[0] <= 1024


def test_bytes_of_a_batch_are_what_a_cache_of_its_size_holds(tmp_path):
    """Check 10: the byte model equals counted reads; the ratio tends to 1 / mean density as the batch grows."""
    dense = tiny_model(num_key_value_heads=4, num_hidden_layers=4)
    model, _ = polar(copy.deepcopy(dense), tmp_path, density=0.5, router="static")
    figures = {str(b): {"per_site": {f"{layer}.heads": 0.5 for layer in (1, 2, 3)}} for b in (1, 8)}
    read = few_rows.step_bytes(dense, model, figures, 8, 20)
    counted = 0
    decoder = Decoder(model, IDS[:1].repeat(8, 1)[:, :-1], 1, compiled=False)
    for layer, held in enumerate(decoder.cache.layers):
        share = 1 if layer == 0 else 0.5
        counted += share * 2 * held.keys[:, :, :20].numel() * 4
    weights = macs.dense_sites(dense)
    rows = sum(c.dense_bytes * (0.5 if name.endswith(".o") and name != "0.o" else 1) for name, c in weights.items())
    head = dense.get_output_embeddings().weight.numel() * 4
    assert read["sparse_bytes"] == counted + rows + head
    many = few_rows.step_bytes(dense, model, figures | {"1000000": figures["8"]}, 10**6, 20)
    assert many["dense_bytes"] / many["sparse_bytes"] == pytest.approx(1 / ((1 + 3 * 0.5) / 4), rel=1e-3)


def test_an_oracle_claims_no_speed_and_runs_all_products(tmp_path):
    """Check 11."""
    target = SimpleNamespace(
        torch_device=torch.device("cpu"), kernel_name="cpu_numba", torch_dtype=torch.float32, skips=True, engine="auto"
    )
    settings = SimpleNamespace(samples=3, warmup=1, context=8, prompt=8, by_kernel=False, energy=False)
    ids = torch.randint(0, 320, (64,), generator=torch.Generator().manual_seed(1))
    dense = tiny_model()
    for router, skips in (("oracle", False), ("static", True)):
        model, _ = polar(tiny_model(), tmp_path, density=0.5, router=router)
        timing = latency.latency(dense, model, ids, settings, target)
        assert ("speedup" in timing.latency["decode"]) == skips
        whole = sum(c.dense_macs for c in macs.dense_sites(dense).values()) + macs.outside_blocks(dense, 8).macs
        overhead = sum(m.weight.shape[1] for m in outputs(model).values()) if router == "oracle" else 0
        assert few_rows.skips(model, 4) == skips and not few_rows.skips(model, 4, width=4)  # a verify step is masked
        if skips:
            assert timing.step_macs < whole
        else:
            assert timing.step_macs == whole + overhead


def test_a_tokens_heads_do_not_depend_on_other_sequences(tmp_path):
    """Check 12: neither in windows nor in decode; the union of neurons does."""
    shape = {"num_attention_heads": 8, "num_key_value_heads": 8}
    for router in ("oracle", "trained"):
        model, _ = polar(tiny_model(**shape), tmp_path, density=0.5, router=router)
        together, alone = projected(model)[1], projected(model, IDS[2:3])[1]
        torch.testing.assert_close(together[2:3], alone, rtol=1e-4, atol=1e-4)
    model, _ = polar(relu_model(), tmp_path, density=1.0, neurons="exact", router="oracle")
    groups = unions.Groups([4])
    with unions.counting(model, groups) as counters:
        groups.of_rows(4)
        logits(model, IDS[:, :1])
    figures = unions.summarise(model, counters, few_rows.weights_of(relu_model()))
    assert figures["4"]["kinds"]["neurons"] < figures["1"]["kinds"]["neurons"]


def test_heads_have_their_own_line_and_no_weights(tmp_path):
    model, _ = polar(tiny_model(), tmp_path, density=0.5, router="oracle")
    with sparsity.counting(model) as counters:
        logits(model)
    measured = sparsity.summarise(model, counters)
    assert measured["1.heads"].sparsity == 0.5 and measured["1.heads"].weight == 0 and list(measured) == ["1.heads"]
    costs = macs.dense_sites(tiny_model()) | macs.site_costs(model, measured)
    plain, less = macs.outside_blocks(tiny_model(), 20), macs.outside_blocks(model, 20, measured)
    assert less.cache_bytes == plain.cache_bytes * 0.75 and less.attention_macs == plain.attention_macs * 0.75
    multiplied, traffic = macs.account(macs.dense_sites(tiny_model()), costs, less, 20, plain)
    assert multiplied["dense"] - multiplied["sparse"] + multiplied["overhead"] == plain.attention_macs / 4 + 64 * 64 / 2
    assert traffic["dense"] - traffic["sparse"] == plain.cache_bytes / 4 + 64 * 64 * 4 / 2


def test_budgets_by_energy_keep_as_many_and_drop_less():
    flat, steep = torch.full((8,), 1 / 8), torch.tensor([0.9, 0.05, 0.02, 0.01, 0.01, 0.005, 0.003, 0.002])
    assert budgets.by_energy([flat, steep], 8) == [7, 1] or sum(budgets.by_energy([flat, steep], 8)) == 8
    kept = budgets.by_energy([flat, steep], 8)
    lost = sum(float(c[k:].sum()) for c, k in zip((flat, steep), kept, strict=True))
    assert lost < float(flat[4:].sum() + steep[4:].sum()) and min(kept) >= 1


def test_settings_are_checked():
    with pytest.raises(config.ConfigError, match="density"):
        config.build_settings(compose_all(["method=polar", "method.density=0"])[0])
    assert math.isclose(built("method", "method=polar").density, 0.5)
    assert kernels.load("masked_dense").selective_attention and find_blocks(tiny_model())
