"""Faithfulness checks of WiSparse (docs/methods/wisparse.md, Faithfulness checks; the number of each in its docstring)."""

import hashlib
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparsebench.calibration.allocation import table_of
from sparsebench.measure import quality, sparsity
from sparsebench.methods.wina import column_norms
from sparsebench.methods.wisparse import WiSparse, budgets, exponent
from sparsebench.models.language import Loaded
from sparsebench.modules.base import measured_modules
from sparsebench.modules.input_sparse import InputSparseLinear
from sparsebench.sites import find_blocks, weight_of
from tests.helpers import Rows, built, logits, tiny_model, work

SEARCH = {"population": 6, "generations": 3, "mutation": 0.1, "tokens": 128, "seed": 0}
QUICK = {"prompt": "all", "calibration_tokens": 256, "ladder": False, "search": SEARCH,
         "greedy": {"step": 0.5, "stop": 0.8, "error_tokens": 0.25}}  # fmt: skip


def method(**changes) -> WiSparse:
    return built("method", "method=wisparse", **{**QUICK, **changes})


def loud_model(block, stream=1.0):
    """A tiny model, o and down of one block ten times as large; stream: factor of the embedding, so of what blocks add to."""
    model = tiny_model()
    model.get_input_embeddings().weight.mul_(stream)
    for role in ("o", "down"):
        model.get_submodule(find_blocks(model)[block].sites[role].path).weight.mul_(10)
    return model


KNOWN = {}  # states by the settings they were fitted with: tests read them, none changes one


def fitted(rule, data, tmp_path):
    if repr(rule) not in KNOWN:
        KNOWN[repr(rule)] = rule.fit(Loaded(tiny_model(), None, {}), data, work(tmp_path))
    return KNOWN[repr(rule)]


def applied(rule, data, tmp_path):
    return rule.apply(tiny_model(), fitted(rule, data, tmp_path), work(tmp_path))


def rules(model):
    """(threshold, scale) by site."""
    return {site: (float(m.threshold), m.scale) for site, m in measured_modules(model)}


def same_rules(one, two):
    assert one.keys() == two.keys()
    for site, (threshold, scale) in one.items():
        assert threshold == two[site][0]
        assert (scale is None) == (two[site][1] is None) and (scale is None or torch.equal(scale, two[site][1]))


@pytest.mark.parametrize(("alpha", "other"), [(0.0, "teal"), (1.0, "wina_plain")])
def test_the_ends_of_the_exponent_are_teal_and_wina(alpha, other, data, tmp_path):
    """Check 1: thresholds, scales and so masks are identical."""
    ours = applied(method(alpha=[alpha], allocation="uniform"), data, tmp_path)
    theirs = {"selection": "threshold"} if other == "wina_plain" else {}
    twin = built("method", f"method={other}", prompt="all", calibration_tokens=256, **theirs)
    same_rules(rules(ours), rules(applied(twin, data, tmp_path)))
    assert torch.equal(logits(ours, data.test.rows[:4]), logits(applied(twin, data, tmp_path), data.test.rows[:4]))


def masks(x, norms, alpha, p=0.5):
    score = x.abs() * norms**alpha
    histogram = exponent.AbsHistogram()
    histogram.add(score)
    return score > histogram.quantile(p)


def test_only_relative_norms_matter_and_rescaled_columns_leave_a_of_one_alone():
    """Check 2."""
    torch.manual_seed(0)
    weight, x = torch.randn(20, 48), torch.randn(64, 48)
    norms, factor = column_norms(weight), 2.0 ** torch.randint(-2, 3, (48,))
    for alpha in (0.5, 1.0, 1.5):
        assert torch.equal(masks(x, norms, alpha), masks(x, norms * 16, alpha))
    rescaled = column_norms(weight * factor)
    assert torch.equal(masks(x, norms, 1.0), masks(x / factor, rescaled, 1.0))
    assert not torch.equal(masks(x, norms, 0.0), masks(x / factor, rescaled, 0.0))


SIZES = torch.tensor([3.0, 1.0, 2.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("budget", [0.0, 0.3, 0.5, 0.94])
def test_the_budget_is_exact_after_every_change(budget):
    """Check 3: projection, first population, mutation and crossover, for blocks of any size."""
    settings, generator = (
        budgets.BlockSearch(**{**SEARCH, "population": 12, "mutation": 0.4}),
        torch.Generator().manual_seed(1),
    )
    members = budgets.first_population(torch.rand(4), SIZES, budget, 0.95, settings, generator)
    for _ in range(4):
        members = torch.cat([members, budgets.children(members, SIZES, budget, 0.95, settings, generator)])
    means = (members * SIZES).sum(1) / SIZES.sum()
    assert (means - budget).abs().max() < 1e-6 and members.min() >= 0 and members.max() <= 0.95
    assert budget in (0.0,) or len(members.unique(dim=0)) > 20


def test_sizes_are_those_of_the_tensors(data, tmp_path):
    """Check 3, grouped queries: the shares inside a block, weighted by what its maps hold, are its budget."""
    rule = method(sparsity=0.4, alpha=[0.5])
    state = fitted(rule, data, tmp_path)
    model = tiny_model()
    for block in find_blocks(model):
        sizes = {r: weight_of(model.get_submodule(s.path)).numel() for r, s in block.sites.items()}
        assert sizes["k"] == sizes["q"] / 2
        shares = rule.inside(state, block, rule.budget(state, block))
        weighted = sum(sizes[r] * shares[r] for r in sizes) / sum(sizes.values())
        assert weighted == pytest.approx(rule.budget(state, block), abs=1e-6)
    assert float(state.tensors["blocks"].mean()) == pytest.approx(0.4, abs=1e-6)


def test_the_exponent_is_never_worse_than_one_or_zero(data, tmp_path):
    """Check 4, by products of the true inputs; and the grid is really used."""
    model, grid = tiny_model(), [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    blocks, sequences = find_blocks(model), data.fit.sequences(8)
    norms = method().norms(model, blocks)
    errors = exponent.errors_by_exponent(model, blocks, sequences, norms, grid, 0.5, 4)
    chosen = exponent.choose(errors, grid, [(name,) for name in norms])
    for name, alpha in chosen.items():
        assert errors[name][grid.index(alpha)] <= min(errors[name][0], errors[name][grid.index(1.0)])
    assert len(set(chosen.values())) > 1
    site, seen = blocks[1].sites["down"], []
    model.get_submodule(site.path).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    logits(model, sequences)
    x, weight = torch.cat(seen), weight_of(model.get_submodule(site.path))
    lost = torch.where(masks(x, norms[site.name], chosen[site.name]), 0, x) @ weight.T
    assert errors[site.name][grid.index(chosen[site.name])] == pytest.approx(float(lost.square().sum()), rel=1e-3)


def test_greedy_inside_beats_uniform_inside(data, tmp_path):
    """Check 5: at matched effective sparsity, for most rows."""
    state = fitted(method(allocation="greedy", alpha=[0.5]), data, tmp_path)
    model, outputs = tiny_model(), {}
    for layer, module in enumerate(model.model.layers):
        module.register_forward_hook(
            lambda _, a, y, n=layer: outputs.__setitem__(n, y[0] if isinstance(y, tuple) else y)
        )
    logits(model, data.fit.sequences(8))
    for layer in range(2):
        table = table_of(state, layer)
        assert table.norm == pytest.approx(float(outputs[layer][:, -8:].norm()), rel=1e-4)  # a quarter of 32 tokens
        assert (table.greedy_error <= table.uniform_error).double().mean() > 0.7 and table.runs > 0


def test_evolution_never_gets_worse_and_repeats(data, tmp_path):
    """Check 6: best fitness never rises, ends at or below uniform's on the search text; one seed, one result."""
    rule = method(alpha=[0.5], allocation="blocks")
    states = [rule.fit(Loaded(tiny_model(), None, {}), data, work(tmp_path / name)) for name in "ab"]
    assert torch.equal(states[0].tensors["blocks"], states[1].tensors["blocks"])
    search = states[0].info["extra"]["search"]
    best = [row["best"] for row in search["history"]]
    assert all(b <= a for a, b in itertools.pairwise(best)) and len(best) == SEARCH["generations"] + 1
    assert search["nll"] == best[-1] <= search["nll_uniform"]
    assert states[0].info["extra"]["search_cost"]["blocks"]["forward_passes"] == 6 * 4 + 3


def test_additive_is_brute_force_on_a_toy():
    """Check 7: 3 blocks, 5 levels, errors that are not convex."""
    generator, sizes = np.random.default_rng(4), torch.ones(3, dtype=torch.float64)
    for _ in range(20):
        errors = np.concatenate([np.zeros((3, 1)), generator.random((3, 4)).cumsum(1)], 1)
        budget = 6 * budgets.LEVELS / 3
        feasible = [c for c in itertools.product(range(5), repeat=3) if sum(c) == 6]
        best = min(sum(errors[i, level] for i, level in enumerate(c)) for c in feasible)
        levels = (budgets.additive(errors, sizes, budget, 4 * budgets.LEVELS) / budgets.LEVELS).round().int().tolist()
        assert sum(levels) == 6 and sum(errors[i, level] for i, level in enumerate(levels)) == pytest.approx(best)


def own_text(model, count):
    """Windows [count, 32] that a model continues greedily from one token each: text that it loses something on."""
    rows = torch.arange(1, count + 1)[:, None]
    while rows.shape[1] < 32:
        rows = torch.cat([rows, logits(model, rows)[:, -1:].argmax(-1)], 1)
    return Rows(rows)


@pytest.mark.parametrize("over_blocks", ["additive", "evolution"])
def test_a_sensitive_block_gets_less(over_blocks, tmp_path):
    """Check 8: o and down of one of two blocks times ten."""
    rule = method(alpha=[0.0], allocation="blocks", over_blocks=over_blocks)
    for block in (0, 1):
        model = loud_model(
            block, 100.0 if over_blocks == "additive" else 1.0
        )  # errors are relative to a block's output
        state = rule.fit(Loaded(model, None, {}), SimpleNamespace(fit=own_text(model, 14)), work(tmp_path / f"{block}"))
        shares = state.tensors["blocks"].tolist()
        assert shares[block] < shares[1 - block] - 0.05, shares


def kept(module, x):
    """Which inputs stay at a map; all where it was left dense."""
    return module.keep(x) if isinstance(module, InputSparseLinear) else torch.ones_like(x, dtype=torch.bool)


@pytest.mark.parametrize("allocation", ["uniform", pytest.param("mixed", marks=pytest.mark.slow)])
def test_maps_of_one_tensor_share_a_mask(allocation, data, tmp_path):
    """Check 9: share=group."""
    grid = [0.0, 0.5, 1.0]
    model = applied(method(alpha=grid, share="group", allocation=allocation, over_blocks="additive"), data, tmp_path)
    apart = applied(method(alpha=grid, allocation=allocation, over_blocks="additive"), data, tmp_path / "apart")
    x, differ = torch.randn(2, 5, 64), 0
    for layer, other in zip(model.model.layers, apart.model.layers, strict=True):
        for one, two in (("self_attn.q", "self_attn.k"), ("self_attn.q", "self_attn.v"), ("mlp.gate", "mlp.up")):
            ours, theirs = ([kept(m.get_submodule(f"{n}_proj"), x) for n in (one, two)] for m in (layer, other))
            assert torch.equal(*ours)
            differ += not torch.equal(*theirs)
    assert differ


def test_nothing_dropped_is_dense_and_shares_are_near_what_is_set(data, tmp_path):
    """Check 10: P = 0 bit by bit; at P each site drops on the fitting text what its threshold was read for."""
    rows = data.test.rows[:4]
    assert torch.equal(
        logits(applied(method(sparsity=0.0, alpha=[0.5]), data, tmp_path / "0"), rows), logits(tiny_model(), rows)
    )
    rule = method(alpha=[0.5])
    state = fitted(rule, data, tmp_path)
    dense = tiny_model()
    for block in find_blocks(dense):
        shares = rule.inside(state, block, rule.budget(state, block))
        for role, site in block.sites.items():
            seen = []
            hook = dense.get_submodule(site.path).register_forward_pre_hook(lambda _, a, s=seen: s.append(a[0]))
            logits(dense, data.fit.sequences(8))
            hook.remove()
            score = torch.cat(seen).abs() * state.tensors[f"scale.{site.name}"]
            dropped = (score <= rule.threshold(state, site, shares[role])).float().mean()
            assert float(dropped) == pytest.approx(shares[role], abs=0.01)


def test_texts_are_disjoint(data, tmp_path, monkeypatch):
    """Check 11: calibration, block search and the ladder's dev text have no window in common with each other or with test."""
    rule = method(alpha=[0.0, 1.0], ladder=True)
    seen = {"search": [], "dev": []}
    whole = quality.perplexity
    monkeypatch.setattr(data.test, "sequences", lambda *_: pytest.fail("test text in a fit"))
    stage = {"now": "search"}
    climbed = WiSparse.climbed
    monkeypatch.setattr(WiSparse, "climbed", lambda self, *a: stage.update(now="dev") or climbed(self, *a))
    monkeypatch.setattr(quality, "perplexity", lambda m, rows, b: seen[stage["now"]].append(rows) or whole(m, rows, b))
    state = rule.fit(Loaded(tiny_model(), None, {}), data, work(tmp_path))

    def hashes(rows):
        return {hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in rows}

    texts = [hashes(data.fit.sequences(8)), hashes(seen["search"][0]), hashes(seen["dev"][0]), hashes(data.test.rows)]
    assert all(texts) and all(a.isdisjoint(b) for a, b in itertools.combinations(texts, 2))
    ladder = state.info["extra"]["ladder_on_dev"]
    assert list(ladder)[1:] == [
        "uniform, a = 0",
        "uniform, a = 1",
        "uniform, a of the grid",
        "+ inside blocks",
        "+ over blocks",
    ]
    model = rule.apply(tiny_model(), state, work(tmp_path))
    assert whole(model, seen["dev"][0], 4)["nll"] == pytest.approx(ladder["+ over blocks"], rel=1e-5)


def test_measured_sparsity_is_the_budget_model_wide(data, tmp_path):
    rule = method(sparsity=0.3, alpha=[0.5], allocation="blocks", over_blocks="additive", share="group")
    model = applied(rule, data, tmp_path)
    _, counters = quality.language_quality(model, data.test, None, 4)
    actual = sparsity.summarise(model, counters)
    weights = {site: share.weight for site, share in actual.items()}
    assert sparsity.model_wide({s: a.sparsity for s, a in actual.items()}, weights) == pytest.approx(0.3, abs=0.05)
