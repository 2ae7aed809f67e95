"""Faithfulness checks of R-Sparse (docs/methods/rsparse.md, Faithfulness checks; the number of each check stands in its docstring)."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from sparsebench import config, engines
from sparsebench.config.compose import compose_all
from sparsebench.kernels import cpu_numba, masked_dense
from sparsebench.measure import latency, quality, sparsity
from sparsebench.methods.rsparse import evolution, low_rank
from sparsebench.methods.rsparse.low_rank import cached, factors, fingerprint, largest_rank
from sparsebench.methods.rsparse.method import RSparse, split
from sparsebench.methods.wina import column_norms
from sparsebench.models.language import Loaded
from sparsebench.modules import base
from sparsebench.modules.input_sparse import InputSparseLinear
from sparsebench.sites import find_blocks
from tests.helpers import built, logits, tiny_model, work

SEARCH = {"population": 4, "generations": 2, "group": 7, "mutation": 0.5, "crossover": 0.5, "tokens": 128, "seed": 1}


def method(**changes) -> RSparse:
    return built("method", "method=rsparse", "method.prompt=all", **changes)


def fitted(rule, data, tmp_path, kind="llama"):
    return rule.fit(Loaded(tiny_model(kind), None, {}), data, work(tmp_path))


def applied(rule, data, tmp_path, kind="llama"):
    return rule.apply(tiny_model(kind), fitted(rule, data, tmp_path, kind), work(tmp_path))


def sparse_maps(model):
    return {m.site: m for m in model.modules() if isinstance(m, InputSparseLinear)}


@pytest.mark.parametrize("share", [0.25, 0.5, 0.65])
def test_rho_one_is_teal_exactly(share, data, tmp_path):
    """Check 1: the same logits to the bit, no rank left over, no column norms in the score."""
    rule, teal = method(rho=1.0, sparsity=share), built("method", "method=teal", sparsity=share, prompt="all")
    actual = applied(rule, data, tmp_path)
    expected = teal.apply(tiny_model(), teal.fit(Loaded(tiny_model(), None, {}), data, work(tmp_path)), work(tmp_path))
    assert torch.equal(logits(actual, data.test.rows[:4]), logits(expected, data.test.rows[:4]))
    assert all(m.low_rank is None and m.scale is None for m in sparse_maps(actual).values())


def test_rho_zero_is_a_truncated_svd(data, tmp_path):
    """Check 2: x W_r^T but for the inputs above every calibration score (fewer than one channel a token)."""
    actual = applied(method(rho=0.0, sparsity=0.5), data, tmp_path)
    dense = {s.name: tiny_model().get_submodule(s.path) for b in find_blocks(tiny_model()) for s in b.sites.values()}
    for site, sparse in sparse_maps(actual).items():
        m, n = dense[site].weight.shape
        rank = split(m, n, 0.5, 0.0).rank
        u, s, v = torch.linalg.svd(dense[site].weight.double(), full_matrices=False)
        reduced = (u[:, :rank] * s[:rank]) @ v[:rank]
        x = torch.randn(1, 5, n) * 0.1 * float(sparse.threshold)
        x[sparse.keep(x)] = 0
        torch.testing.assert_close(sparse(x), (x.double() @ reduced.T).float(), rtol=1e-3, atol=1e-4)
    _, counters = quality.language_quality(actual, data.test, 16, 4)
    measured = sparsity.summarise(actual, counters)
    assert all(measured[site].sparsity > 1 - 1 / sparse.weight.shape[1] for site, sparse in sparse_maps(actual).items())


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (20, 20)])
@pytest.mark.parametrize("threshold", [-1.0, 0.4, 1e9])
def test_full_rank_is_dense_for_any_mask(shape, threshold):
    """Check 3."""
    linear = torch.nn.Linear(shape[1], shape[0])
    low_rank = tuple(f.float() for f in factors(linear.weight, min(shape)))
    x = torch.randn(2, 6, shape[1])
    sparse = InputSparseLinear(linear, "0.q", threshold, low_rank=low_rank)
    torch.testing.assert_close(sparse(x), linear(x), rtol=1e-4, atol=1e-5)


def test_no_sparsity_and_rho_one_is_dense(data, tmp_path):
    """Check 4."""
    actual = applied(method(sparsity=0.0, rho=1.0), data, tmp_path)
    assert torch.equal(logits(actual, data.test.rows[:3]), logits(tiny_model(), data.test.rows[:3]))


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_column_norms_equal_those_of_the_factors(shape):
    """Check 5: ||(V S)_i|| = ||W_:,i||; U (rows of B, or of B over S) is orthonormal."""
    weight = torch.randn(shape)
    a, b = factors(weight, min(shape))
    values = b.norm(dim=1)  # 1 where A carries S, S where B does
    assert torch.allclose((a * values).norm(dim=1).float(), column_norms(weight), rtol=1e-5)
    directions = b / values[:, None]
    assert torch.allclose(directions @ directions.T, torch.eye(len(b), dtype=b.dtype), atol=1e-8)


SHAPES = {  # name: (m, n) of q, k, v, o, gate, up, down
    "llama2-7b": [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)],
    "llama3-8b": [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)] + [(14336, 4096)] * 2 + [(4096, 14336)],
    "tiny": [(64, 64), (32, 64), (32, 64), (64, 64), (160, 64), (160, 64), (64, 160)],
}


@pytest.mark.parametrize("name", SHAPES)
def test_budget_holds_for_every_matrix_with_its_true_shape(name):
    """Check 6: C m + r (m + n) <= (1 - s) m n, and hardly anything of it is left unused."""
    for m, n in SHAPES[name]:
        for share in (0.25, 0.5, 0.65, 0.9):
            for rho in (0.0, 0.3, 0.7, 0.95, 0.999, 1.0):
                part = split(m, n, share, rho)
                taken, allowed = part.channels * m + part.rank * (m + n), (1 - share) * m * n
                assert taken <= allowed + 1e-6
                assert allowed - taken < m + (m + n)
                assert part.rank >= 0 and (rho < 1 or part.rank == 0)


def test_budget_over_all_layers_is_reported(data, tmp_path):
    """Check 6, second half."""
    actual = fitted(method(rho=0.7), data, tmp_path).info["extra"]["budget"]
    total = sum(m * n for m, n in SHAPES["tiny"]) * 2
    assert actual["allowed"] == 0.5 * total and actual["taken"] <= actual["allowed"] < actual["taken"] / 0.93
    assert actual["rho_mean"] == pytest.approx(0.7)


@pytest.mark.parametrize("score", ["abs", "abs_colnorm"])
def test_mask_sparsity_is_that_of_the_rule(score, data, tmp_path):
    """Check 7: 1 - (1 - s) rho on calibration inputs, seen densely, within a point; held out is near and is measured."""
    rule = method(score=score, rho=0.8, sparsity=0.4, prompt="all")
    state = fitted(rule, data, tmp_path)
    sparse = sparse_maps(rule.apply(tiny_model(), state, work(tmp_path)))
    assert all((m.scale is not None) == (score == "abs_colnorm") for m in sparse.values())
    dense, shares = tiny_model(), {}
    for site in (s for b in find_blocks(dense) for s in b.sites.values()):
        dense.get_submodule(site.path).register_forward_pre_hook(
            lambda _, args, name=site.name: shares.setdefault(name, []).append(
                sparse[name].keep(args[0]).float().mean()
            )
        )
    logits(dense, data.fit.rows)
    for name, actual in shares.items():
        assert 1 - float(torch.stack(actual).mean()) == pytest.approx(0.52, abs=0.01), name
    model = rule.apply(tiny_model(), state, work(tmp_path))
    _, counters = quality.language_quality(model, data.test, None, 4)
    held_out = [s.sparsity for s in sparsity.summarise(model, counters).values()]
    assert sum(held_out) / len(held_out) == pytest.approx(0.52, abs=0.05) and 0.52 not in held_out


@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
def test_remainder_never_hurts_a_token(shape):
    """Check 8: with one mask the error with a low rank is at most that of dropping, for every token, and falls with r."""
    torch.manual_seed(2)
    linear, x = torch.nn.Linear(shape[1], shape[0], bias=False), torch.randn(200, shape[1])
    errors = []
    for rank in (0, 1, 4, 12, 24):
        low_rank = tuple(f.float() for f in factors(linear.weight, rank)) if rank else None
        y = InputSparseLinear(linear, "0.q", 0.7, low_rank=low_rank)(x[None])[0]
        errors.append((y - linear(x)).norm(dim=-1))
    for worse, better in itertools.pairwise(errors):
        assert torch.all(better <= worse + 1e-5)
    assert errors[-1].max() < 1e-4 < errors[0].min()


def sphere(x):
    """A fitness whose minimum is inside the cube."""
    return float((x - torch.linspace(0.2, 0.9, len(x), dtype=x.dtype)).square().sum())


def test_search_improves_never_worsens_and_repeats(tmp_path):
    """Check 9: best fitness does not increase; the same seed gives the same answer, another seed another."""
    settings = evolution.Evolution(**{**SEARCH, "population": 10, "generations": 6, "group": 3})
    actual, history = evolution.evolve(sphere, 10, settings, tmp_path / "a")
    best = [row["best"] for row in history]
    assert best == sorted(best, reverse=True) and best[-1] < 0.8 * best[0]
    assert best[-1] == sphere(actual) and best[-1] <= sphere(torch.ones(10, dtype=torch.float64))
    assert actual.min() >= 0 and actual.max() <= 1
    again, same = evolution.evolve(sphere, 10, settings, tmp_path / "b")
    assert torch.equal(actual, again) and same == history
    other, _ = evolution.evolve(sphere, 10, dataclasses.replace(settings, seed=7), tmp_path / "c")
    assert not torch.equal(actual, other)


@pytest.mark.parametrize("calls", [3, 11, 17, 30])
def test_killed_search_goes_on_to_the_same_end(calls, tmp_path):
    settings = evolution.Evolution(**{**SEARCH, "population": 5, "generations": 3, "group": 4})
    expected, history = evolution.evolve(sphere, 9, settings, tmp_path / "whole")
    left = calls

    def dies(x):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return sphere(x)

    with pytest.raises(KeyboardInterrupt):
        evolution.evolve(dies, 9, settings, tmp_path / "part")
    actual, again = evolution.evolve(sphere, 9, settings, tmp_path / "part")
    assert torch.equal(actual, expected) and again == history


def test_child_differs_from_its_parent_in_one_group_only():
    settings = evolution.Evolution(**SEARCH)
    members = torch.rand(6, 10, dtype=torch.float64)
    children = evolution.offspring(members, torch.tensor([3, 4, 5]), settings, torch.Generator().manual_seed(0))
    changed = (children != members).any(0)
    assert changed[3:6].any() and not changed[:3].any() and not changed[6:].any()


def test_searched_rho_is_no_worse_than_thresholding_and_reloads(data, tmp_path):
    """Check 9 on a model: the all-ones member guarantees it; rho.json serves a later run; the model is put back."""
    rule = method(rho_from="search", search=SEARCH, calibration_tokens=256, sparsity=0.65)
    model = tiny_model()
    state = rule.fit(Loaded(model, None, {}), data, work(tmp_path))
    assert torch.equal(logits(model, data.test.rows[:2]), logits(tiny_model(), data.test.rows[:2]))
    actual = state.info["extra"]["search"]
    assert actual["best"] <= actual["rho=1"] and actual["best"] == actual["history"][-1]["best"]
    rows = data.fit.rows[8:12]
    sparse = rule.apply(tiny_model(), state, work(tmp_path))
    assert quality.perplexity(sparse, rows, 4)["perplexity"] == pytest.approx(actual["best"], rel=1e-5)
    file = tmp_path / "rho.json"
    assert len(json.loads(file.read_text())) == 14
    again = method(rho_from="file", rho_file=str(file), calibration_tokens=256, sparsity=0.65)
    reloaded = again.apply(tiny_model(), fitted(again, data, tmp_path), work(tmp_path))
    assert torch.equal(logits(reloaded, data.test.rows[:2]), logits(sparse, data.test.rows[:2]))


def test_bad_rho_files_are_refused(tmp_path, data):
    problems = []
    node = compose_all(["method=rsparse"])[0]["method"]
    config.build({**node, "rho_from": "file"}, "method", problems)
    config.build({**node, "rho_file": "nowhere.json"}, "method", problems)
    config.build({**node, "rho_from": "file", "rho_file": "nowhere.json"}, "method", problems)
    assert problems == [
        "method.rho_file must be a file for rho_from=file and null otherwise, got None",
        "method.rho_file must be a file for rho_from=file and null otherwise, got 'nowhere.json'",
        "method.rho_file must be an existing file, got 'nowhere.json'",
    ]
    for content in ("{}", "[1]", '{"0.q": 2}', "no"):
        file = tmp_path / "rho.json"
        file.write_text(content)
        with pytest.raises(ValueError, match=r"rho\.json"):
            evolution.load(file, ["0.q"])


@pytest.mark.parametrize("policy", ["none", "last10", "half", "p99", "all"])
def test_every_prompt_policy_can_generate(policy, data, tmp_path):
    """Check 10: prompt and one-token steps, where the released code can not generate."""
    model = applied(method(prompt=policy, rho=0.8), data, tmp_path)
    actual = model.generate(data.test.rows[:1, :12], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert actual.shape[1] > 12


def test_bias_is_added_once(data, tmp_path):
    """Check 11: q, k, v of Qwen have one; with nothing kept and no rank the output is the bias itself."""
    linear, x = torch.nn.Linear(10, 6), torch.randn(1, 10)
    low_rank = tuple(f.float() for f in factors(linear.weight, 6))
    torch.testing.assert_close(
        InputSparseLinear(linear, "0.q", 1e9, low_rank=low_rank)(x), linear(x), rtol=1e-4, atol=1e-5
    )
    fast = cpu_numba.input_sparse_linear(
        x, linear.weight.data.t().contiguous().t(), linear.bias.data, threshold=torch.tensor(1e9), low_rank=low_rank
    )
    torch.testing.assert_close(fast, linear(x), rtol=1e-4, atol=1e-5)
    model = applied(method(rho=0.8), data, tmp_path, "qwen2")
    assert sparse_maps(model)["0.q"].bias is not None


def test_svd_is_cached_by_content_and_dtype(tmp_path, monkeypatch):
    """Check 12."""
    weight = torch.randn(12, 20)
    first = cached(weight, tmp_path)
    assert first[0].shape == (20, largest_rank(12, 20)) and largest_rank(12, 20) == 7
    monkeypatch.setattr(low_rank, "factors", None)  # calling it again would fail
    again = cached(weight.clone(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    keys = {fingerprint(w) for w in (weight, weight + 1e-6, weight.bfloat16(), weight.view(20, 12))}
    assert len(keys) == 4


def test_ranks_are_stored_in_whole_rows_and_charged_as_they_are():
    """Kernels read 8 ranks at once; the 5 zeros that fill 3 up change nothing and cost nothing in the count."""
    linear, x = torch.nn.Linear(24, 20, bias=False), torch.randn(2, 24)
    low_rank = tuple(f.float() for f in factors(linear.weight, 3))
    sparse = InputSparseLinear(linear, "0.q", 1e9, low_rank=low_rank)
    assert [f.shape for f in sparse.low_rank] == [(24, 8), (8, 20)] and sparse.rank == 3
    torch.testing.assert_close(sparse(x), (x @ low_rank[0]) @ low_rank[1])
    share = base.SiteSparsity(1.0, 1.0, 480, 2, 0)
    assert sparse.costs({"0.q": share})["0.q"].overhead_macs == 3 * (24 + 20)
    sparse.low_rank = None
    assert sparse.rank == 0 and not sparse(x).any()


@pytest.mark.parametrize("score", ["abs", "abs_colnorm"])
def test_fast_kernel_serves_the_hybrid_map(score, data, tmp_path):
    """Kept channels are gathered, the remainder included: numba against masked-dense at every map."""
    rule = method(score=score, rho=0.8)
    for sparse in sparse_maps(applied(rule, data, tmp_path)).values():
        x = torch.randn(1, 1, sparse.weight.shape[1]) * float(sparse.threshold + 0.1)
        rules = {"threshold": sparse.threshold, "scale": sparse.scale, "low_rank": sparse.low_rank}
        expected = masked_dense.input_sparse_linear(x, sparse.weight, sparse.bias, **rules)
        actual = cpu_numba.input_sparse_linear(x, sparse.weight, sparse.bias, **rules)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["fused", "eager"])
def test_latency_of_a_hybrid_model_runs_the_skipping_kernel(engine, data, tmp_path):
    """The remainder is part of the fused step and of the map-by-map kernel; both are compared with masked-dense first."""
    worker = work(tmp_path)
    worker.hardware.kernel_name, worker.hardware.engine = "cpu_numba", engine
    rule = method(rho=0.8)
    model = rule.apply(tiny_model(), fitted(rule, data, tmp_path), worker)
    assert any(m.low_rank is not None for m in sparse_maps(model).values())
    assert engines.choose(model, worker.hardware) == engine
    settings = SimpleNamespace(warmup=3, samples=30, context=16, prompt=16, by_kernel=False, energy=False)
    actual = latency.latency(tiny_model(), model, data.test.rows[:4].flatten(), settings, worker.hardware).latency
    assert actual["kernel"] == "cpu_numba" and actual["decode"]["sparse_engine"] == engine
    assert actual["decode"]["speedup"] > 0 and 0 < actual["parity_relative_error"] < 1e-4
