"""Sparsity inside experts: each faithfulness check of docs/methods/experts.md that concerns modules and costs."""

import pytest
import torch

from sparsebench.calibration import expert_pairs, histograms
from sparsebench.measure import macs, quality, routing, sparsity
from sparsebench.measure.memory import weight_bytes
from sparsebench.modules import fused_experts
from sparsebench.modules.fused_experts import Gating, pairs_of, tensors_of
from sparsebench.modules.sparse_experts import INSIDE, swap_experts, swap_gated_experts
from sparsebench.modules.storage import sharing_copy
from sparsebench.sites import expert_modules, find_blocks
from tests.families import ROWS, family
from tests.helpers import Rows, logits

KINDS = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")
ALL, SOME = {"threshold": -1.0}, {"threshold": 0.1}


def tiny(kind="mixtral", **changes):
    """E = 4, k = 2, D = 64, I = 32, by the model's own loop over experts."""
    sizes = {} if kind in ("qwen3_moe", "deepseek_v3") else {"intermediate_size": 32}
    model = family(kind, **{**sizes, **changes})
    model.set_experts_implementation("eager")
    return model


def sparse(model, into=None, mid=None, gate=None, **options):
    for block in find_blocks(model):
        if block.experts and gate is not None:
            swap_gated_experts(model, block, gate, **options)
        elif block.experts:
            swap_experts(model, block, into, mid, **options)
    return model


def counted(model, rows=ROWS[:4]):
    with sparsity.counting(model) as counters:
        logits(model, rows)
    return counters, sparsity.summarise(model, counters)


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_all_is_the_models_own_loop_bit_by_bit(kind):
    """Check 1: nothing dropped, at input, middle and gate; and a threshold of 0 drops exact zeros only.

    Three experts, whose sum tells the order in which they are added.
    """
    expected = logits(tiny(kind, num_experts_per_tok=3), ROWS[:4])
    assert torch.equal(logits(sparse(tiny(kind, num_experts_per_tok=3), ALL, ALL), ROWS[:4]), expected)
    assert torch.equal(logits(sparse(tiny(kind, num_experts_per_tok=3), gate=0.0), ROWS[:4]), expected)
    assert torch.equal(logits(sparse(tiny(kind, num_experts_per_tok=3), mid={"threshold": 0.0}), ROWS[:4]), expected)
    one = logits(tiny(kind, num_experts_per_tok=3), ROWS[:1, :1])
    assert torch.equal(logits(sparse(tiny(kind, num_experts_per_tok=3), ALL, ALL), ROWS[:1, :1]), one)


def test_gate_and_up_of_gpt_oss_lie_in_turns():
    """Check 2: read as halves they are another model, and the check of the gate says so."""
    model, swapped = tiny("gpt_oss"), sparse(tiny("gpt_oss"), ALL, ALL)
    own = expert_modules(model)[0][1]
    assert not own.is_concatenated and own.is_transposed and tensors_of(own).gate_up.shape == (4, 64, 64)
    for _, experts in expert_modules(swapped):
        experts.halves = True
    assert not torch.allclose(logits(swapped, ROWS[:4]), logits(model, ROWS[:4]), atol=1e-3)
    own.is_concatenated = True
    with pytest.raises(ValueError, match="GptOssExperts gates in a way that is not known"):
        Gating(own)


def test_only_routed_pairs_of_real_tokens_count():
    """Check 3: pairs = tokens times k, padding left out; an expert that is never run counts nowhere."""
    model = sparse(tiny(), SOME, SOME)
    mask = torch.ones(4, 16, dtype=torch.bool)
    mask[1, 10:] = mask[3, 2:] = False
    with sparsity.counting(model) as counters, torch.no_grad():
        sparsity.set_token_mask(model, mask)
        model(input_ids=ROWS[:4], attention_mask=mask.long(), use_cache=False)
    for counter in counters.values():
        assert counter.sparse_tokens == int(counter.pairs.sum()) == 2 * int(mask.sum())
        assert int(counter.kept.sum()) == int(counter.kept_by_expert.sum())


def test_an_expert_that_is_never_run_does_not_move_the_share():
    """Check 3: pooled over pairs; the mean over experts would be another number."""
    model = sparse(tiny(num_hidden_layers=1), None, SOME)
    hidden = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    experts = expert_modules(model)[0][1]
    chosen = torch.tensor([[0, 1]] * 39 + [[0, 2]])
    with sparsity.counting(model) as counters:
        experts(hidden, chosen, torch.ones(40, 2))
        measured = sparsity.summarise(model, counters)
    counter = counters["0.experts.down"]
    assert counter.pairs.tolist() == [40, 39, 1, 0] and counter.sparse_tokens == 80
    share = 1 - counter.kept_by_expert.double() / (counter.pairs * 32)
    pooled = float((share[:3] * counter.pairs[:3]).sum() / 80)
    assert measured["0.experts.down"].sparsity == pytest.approx(pooled)
    assert measured["0.experts.down"].sparsity != pytest.approx(float(share[:3].mean()), abs=1e-4)
    told = routing.by_expert(counters)["0.experts.down"]
    assert told["never_run"] == 1 and told["sparsity"][0] == pytest.approx(float(share[:3].min()))


def test_experts_of_a_token_share_the_mask_of_their_input():
    """Check 4: and the router reads the dense input, so the first layer of experts routes as before."""
    model, seen, scores = sparse(tiny(), {"threshold": 0.5}), [], []
    experts = expert_modules(model)[0][1]
    experts.gate_up.register_forward_pre_hook(lambda m, args: seen.append((m.keep(*args[:2]), args[1])))
    dense = tiny()
    for each in (dense, model):
        each.model.layers[0].mlp.gate.register_forward_hook(lambda _, args, out: scores.append(out[0]))
        logits(each, ROWS[:4])
    assert torch.equal(*scores)
    keep, pairs = seen[0]
    for token in range(64):
        first, second = keep[pairs.tokens == token]
        assert torch.equal(first, second) and 0 < int(first.sum()) < 64


@pytest.mark.parametrize("rule", ["input", "mid", "gate"])
def test_products_agree_with_a_count_by_hand(rule):
    """Check 5: MACs of router, shared expert and the k experts of a token, against every product counted one by one."""
    model = tiny("deepseek_v3", num_hidden_layers=2)
    dense = macs.dense_sites(model)
    d, i, k, e = 64, 32, 2, 4
    shared = model.model.layers[1].mlp.shared_experts.gate_proj.weight.shape[0]
    inside = sum(
        c.dense_macs for n, c in dense.items() if n.startswith("1.") and ("exp" in n or "sha" in n or "rou" in n)
    )
    assert inside == e * d + 3 * d * shared + k * 3 * d * i
    given = {"input": {"into": SOME}, "mid": {"mid": SOME}, "gate": {"gate": 0.05}}[rule]
    model = sparse(model, **given)
    products = []

    def count(own, args):
        hidden, index, _ = args
        for t, x in enumerate(hidden):
            for expert in index[t].tolist():
                w, last = (own.gate_up.weight, own.down.weight) if rule != "gate" else (own.gate_up, own.down)
                g, u = (w[expert] @ x).chunk(2)
                left = x.abs() > 0.1 if rule == "input" else torch.ones(d, dtype=torch.bool)
                a = own.gating.activated(g)
                on = a.abs() >= 0.05 if rule == "gate" else (a * u).abs() > (0.1 if rule == "mid" else -1)
                rows = int(on.sum()) if rule == "gate" else i
                products.append(i * int(left.sum()) + rows * int(left.sum()) + last.shape[1] * int(on.sum()))

    with sparsity.counting(model) as counters:
        expert_modules(model)[0][1].register_forward_pre_hook(count)
        logits(model, ROWS[:2])
        measured = sparsity.summarise(model, counters)
    costs = dense | macs.site_costs(model, measured)
    actual = sum(c.sparse_macs for n, c in costs.items() if ".experts." in n)
    assert actual == pytest.approx(sum(products) / 32)
    assert actual < k * 3 * d * i


def test_the_gate_skips_the_same_neurons_in_up_and_down():
    """Check 6: the output is that of masking act(g), and up and down save the same share."""
    for kind in ("olmoe", "gpt_oss"):
        model, threshold = tiny(kind, num_hidden_layers=1), 0.05
        own = expert_modules(model)[0][1]
        gating, tensors = Gating(own), tensors_of(own)
        hidden = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
        pairs = pairs_of(hidden, torch.tensor([[0, 2]] * 8), torch.full((8, 2), 0.5), 4)
        z = fused_experts.products(hidden[pairs.tokens], pairs.experts, tensors.gate_up, tensors.gate_up_bias)
        gate, up = fused_experts.parts(z, tensors.halves)
        a = gating.activated(gate)
        mid = gating.combined(torch.where(a.abs() >= threshold, a, 0), up)
        y = fused_experts.products(mid, pairs.experts, tensors.down, tensors.down_bias)
        model = sparse(model, gate=threshold)
        with sparsity.counting(model) as counters:
            out = expert_modules(model)[0][1](hidden, torch.tensor([[0, 2]] * 8), torch.full((8, 2), 0.5))
            measured = sparsity.summarise(model, counters)
        assert torch.equal(out, fused_experts.summed(y, pairs, hidden))
        share = float((a.abs() < threshold).double().mean())
        assert measured["0.experts.up"].sparsity == measured["0.experts.down"].sparsity == pytest.approx(share)
        assert 0 < share < 1 and "0.experts.gate" not in measured


def test_active_and_stored_parameters_are_two_denominators():
    """Check 7: an equal p at all maps of experts is p over active parameters, and less over stored ones of a whole model."""
    model = tiny()
    dense, stored = macs.dense_sites(model), macs.stored_experts(model)
    inside = [n for n in dense if ".experts." in n]
    site = sparsity.SiteSparsity(0.3, 0.3, 1, 1, 0)
    only = {n: dense[n] for n in inside}
    assert sparsity.model_wide(
        dict.fromkeys(inside, 0.3), {n: int(c.dense_macs) for n, c in only.items()}
    ) == pytest.approx(0.3)
    assert stored == dict.fromkeys(inside, 4 * 64 * 32) and only[inside[0]].dense_macs == 2 * 64 * 32
    rest = sum(c.dense_macs for n, c in dense.items() if n not in inside)
    share = sum(stored.values()) / (sum(stored.values()) + rest)
    whole = routing.model_wide_of_stored(dense, dict.fromkeys(inside, site), stored)
    assert whole == pytest.approx(0.3 * share)
    active = sum(c.dense_macs for c in only.values())
    assert share != pytest.approx(active / (active + rest), abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_every_implementation_of_transformers_runs_our_module(kind):
    """Check 9: the same sparse output by eager, batched and grouped products, and not the dense one."""
    actual = []
    for name in ("eager", "batched_mm", "grouped_mm"):
        model = tiny(kind)
        model.set_experts_implementation(name)
        dense = logits(model, ROWS[:4])
        actual.append(logits(sparse(model, SOME, SOME), ROWS[:4]))
        assert float((actual[-1] - dense).abs().max()) > 1e-3
    assert torch.allclose(actual[0], actual[1], atol=1e-5) and torch.allclose(actual[0], actual[2], atol=1e-5)


def test_nothing_flips_where_nothing_is_dropped_or_nothing_follows():
    """Check 10: the sets of experts are the dense model's at keep-all, and in a model of one layer; else some change."""
    dense = routing.routing(tiny(), ROWS, 4)
    assert routing.routing(sparse(tiny(), ALL, ALL), ROWS, 4).flipped(dense) == 0
    assert routing.routing(sparse(tiny(), {"threshold": 1.0}), ROWS, 4).flipped(dense) > 0
    one = {"num_hidden_layers": 1}
    alone = routing.routing(sparse(tiny(**one), {"threshold": 1.0}), ROWS, 4)
    assert alone.flipped(routing.routing(tiny(**one), ROWS, 4)) == 0


def test_experts_with_few_tokens_take_their_layers_threshold(monkeypatch):
    """Check 11: and they are listed."""
    model, blocks = tiny(), find_blocks(tiny())
    pairs = routing.routing(model, ROWS[:8], 4).tokens_per_expert()
    enough = int(pairs[0].sort().values[-2])
    monkeypatch.setattr(expert_pairs, "ENOUGH", enough)
    watch = expert_pairs.Watch(blocks, "cpu", ("mid",), "expert")
    state = histograms.watched(model, ROWS[:8], {}, {}, 4, watch)
    assert state.info["expert_pairs"]["0"] == pairs[0].tolist()
    limits = expert_pairs.threshold(state, blocks[0], "mid", 0.5, "expert")
    of_layer = expert_pairs.threshold(state, blocks[0], "mid", 0.5)
    own = [float(limits[e]) != pytest.approx(of_layer, rel=1e-4) for e in range(4)]
    assert own == [n >= enough for n in pairs[0].tolist()]
    listed = [name for name in state.info["extra"]["experts_with_their_layers_threshold"] if name.startswith("0.")]
    assert listed == [f"0.{e}" for e in range(4) if pairs[0][e] < enough]


@pytest.mark.parametrize("mode", ["mid", "gate"])
def test_the_bias_of_down_is_added_once_for_every_routed_expert(mode):
    """Check 12: also where all neurons of the expert are dropped."""
    model = tiny("gpt_oss", num_hidden_layers=1)
    own = expert_modules(model)[0][1]
    own.down_proj_bias.copy_(torch.randn(4, 64, generator=torch.Generator().manual_seed(3)))
    bias = own.down_proj_bias.clone()
    model = sparse(model, **({"mid": {"threshold": 1e9}} if mode == "mid" else {"gate": 1e9}))
    index, weights = torch.tensor([[0, 1], [3, 2], [1, 3]]), torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])
    for rows in (slice(0, 3), slice(0, 1)):
        actual = expert_modules(model)[0][1](torch.randn(3, 64)[rows], index[rows], weights[rows])
        expected = (bias[index[rows]] * weights[rows].unsqueeze(-1)).sum(1)
        assert torch.allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize("mode", ["input", "mid", "gate", "scaled", "top_k", "each"])
def test_one_token_goes_through_the_kernel(kind, mode):
    """The kernel's outputs are those of masks, and it says when it serves a call."""
    generator = torch.Generator().manual_seed(4)
    scale = torch.rand(4, 64, generator=generator) + 0.5
    given = {
        "input": {"into": SOME}, "mid": {"mid": SOME}, "gate": {"gate": 0.05},
        "scaled": {"into": {"threshold": 0.3, "scale": scale}},
        "top_k": {"into": {"threshold": 0.0, "scale": scale, "top_k": 20}},
        "each": {"mid": {"threshold": torch.tensor([0.1, 0.2, 0.05, 0.3])}},
    }[mode]  # fmt: skip
    masked, fast = sparse(tiny(kind), **given), sparse(tiny(kind), kernel="cpu_numba", **given)
    names = {m.kernel(1) for _, m in sparsity.measured_modules(fast)}
    assert names == ({"masked_dense"} if (kind, mode) == ("gpt_oss", "gate") else {"cpu_numba"})
    assert {m.kernel(64) for _, m in sparsity.measured_modules(fast)} == {"masked_dense"}
    for rows in (ROWS[:1, :1], ROWS[:2, :8]):
        assert torch.allclose(logits(fast, rows), logits(masked, rows), atol=1e-4)
    assert not torch.allclose(logits(fast, ROWS[:1, :1]), logits(tiny(kind), ROWS[:1, :1]), atol=1e-3)


def test_a_rule_of_its_own_decides_at_every_pair():
    """What a cut that moves with the token needs: values of pairs in, what stays out."""

    def largest(x):
        return x.abs() >= x.abs().topk(8, dim=-1).values[..., -1:]

    model = sparse(tiny(), {"threshold": 0.0, "rule": largest}, {"threshold": 0.0, "rule": largest})
    measured = counted(model)[1]
    assert measured["0.experts.up"].sparsity == pytest.approx(1 - 8 / 64)
    assert measured["0.experts.down"].sparsity == pytest.approx(1 - 8 / 32)
    gates = sparse(tiny(), gate=0.0)
    for _, experts in expert_modules(gates):
        experts.rule = largest
    assert counted(gates)[1]["1.experts.up"].sparsity == pytest.approx(1 - 8 / 32)


def test_prompt_policies_leave_the_same_tokens_dense_as_elsewhere():
    model = sparse(tiny(), SOME, SOME, prompt="half")
    _, measured = counted(model)
    assert measured["0.experts.up"].dense_tokens == measured["0.experts.up"].sparse_tokens == 4 * 8 * 2
    dense, half = logits(tiny(), ROWS[:4]), logits(model, ROWS[:4])
    assert torch.allclose(half[:, :8], dense[:, :8], atol=1e-5) and not torch.allclose(
        half[:, 8:], dense[:, 8:], atol=1e-3
    )


def test_experts_that_cannot_be_read_say_what_was_found():
    model = tiny()
    own = expert_modules(model)[0][1]
    own.down_proj = torch.nn.Parameter(torch.zeros(4, 60, 32))
    with pytest.raises(
        ValueError, match=r"model.layers.0.mlp.experts must hold gated experts .* down_proj \[4, 60, 32\]"
    ):
        find_blocks(model)
    model = tiny()
    del expert_modules(model)[0][1].is_transposed
    with pytest.raises(ValueError, match="'is_transposed': None"):
        find_blocks(model)
    assert INSIDE[-1] == "off"


def test_copies_that_share_tensors_share_those_of_experts():
    model = sparse(tiny(), SOME, SOME, kernel="cpu_numba")
    twin = sharing_copy(model)
    assert weight_bytes(torch.nn.ModuleList([model, twin])) == weight_bytes(model)
    assert weight_bytes(model) == weight_bytes(tiny()) + 4 * 4  # four thresholds


def test_language_quality_counts_pairs():
    model = sparse(tiny(), SOME, SOME)
    _, counters = quality.language_quality(model, Rows(ROWS), 8, 4)
    assert counters["0.experts.down"].sparse_tokens == 2 * 8 * 16
