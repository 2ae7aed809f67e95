"""Faithfulness checks of N:M activation sparsity (docs/methods/nm.md; the number of each check in its docstring)."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from sparsebench.calibration.sensitivity import planned, sensitivities
from sparsebench.config import ConfigError, build_settings
from sparsebench.config.compose import compose_all
from sparsebench.engines.reference import cache_argument
from sparsebench.measure import quality, sparsity
from sparsebench.methods.nm import NM, amber_factors, metadata_bits
from sparsebench.methods.wina import column_norms
from sparsebench.models import Loaded
from sparsebench.modules.activations import topk_mask
from sparsebench.modules.base import measured_modules
from sparsebench.modules.group_sparse import GroupSparseLinear, Selection, group_mask
from sparsebench.modules.input_sparse import replace
from sparsebench.sites import sites
from tests.helpers import CPU_KERNELS, built, logits, tiny_model, work

LADDER = ((2, 4), (4, 8), (8, 16), (16, 32))


def method(**changes) -> NM:
    return built("method", "method=nm", **{"calibration_tokens": 256, **changes})


def fitted(rule, data, folder, model=None):
    return rule.fit(Loaded(model or tiny_model(), None, {}), data, work(folder))


def applied(rule, data, folder):
    return rule.apply(tiny_model(), fitted(rule, data, folder), work(folder))


def layer(n, m, width=64, outputs=24, bias=True, *, phase="prefill", prompt="all", kernel="masked_dense", **rule):
    torch.manual_seed(1)
    linear = torch.nn.Linear(width, outputs, bias=bias).requires_grad_(False)
    return linear, GroupSparseLinear(linear, "0.q", Selection(n, m, **rule), phase=phase, prompt=prompt, kernel=kernel)


@pytest.mark.parametrize(("n", "m"), LADDER)
def test_exactly_n_of_each_group_ties_and_zeros_included(n, m):
    """Check 1: N per group and token, and what is kept is the input bit for bit."""
    torch.manual_seed(0)
    x = torch.randint(-2, 3, (3, 5, 64)).float() * 0.1  # ties and zeros everywhere
    x[0, 0], x[0, 1] = 0.0, 0.7
    _, sparse = layer(n, m)
    keep = sparse.keep(x)
    assert (keep.unflatten(-1, (-1, m)).sum(-1) == n).all()
    assert torch.equal(keep[0, 1].view(-1, m), (torch.arange(m) < n).expand(64 // m, m))  # of ties the lowest index
    least = x.abs().unflatten(-1, (-1, m)).masked_fill(~keep.unflatten(-1, (-1, m)), math.inf).amin(-1)
    assert (x.abs().unflatten(-1, (-1, m)).masked_fill(keep.unflatten(-1, (-1, m)), 0).amax(-1) <= least).all()
    read = sparse.selection.read(x)
    assert torch.equal(read[keep], x[keep]) and not read[~keep].any()


def test_all_kept_is_dense_and_one_group_is_top_k(data, tmp_path):
    """Check 2: N = M leaves the model alone; M = all inputs keeps each token's k largest."""
    model = applied(method(n=8, m=8), data, tmp_path)
    assert not list(measured_modules(model))
    x = torch.randn(4, 6, 64)
    assert group_mask(x, 4, 4).all() and group_mask(x, 16, 16).all()
    _, sparse = layer(20, 64)
    assert torch.equal(sparse.keep(x), topk_mask(x.abs(), 20))
    assert {(s.n, s.m) for _, s in measured_modules(applied(method(n=None, m=None), data, tmp_path))} == {
        (32, 64), (80, 160),
    }  # fmt: skip


def test_scores():
    """Check 3: equal factors are no factor; column norms do not see a rescaling that leaves the product alone."""
    torch.manual_seed(0)
    x, weight = torch.randn(50, 64), torch.randn(24, 64) * torch.rand(64).add(0.1)
    for factor in (torch.full((64,), 3.0), torch.ones(64)):
        assert torch.equal(Selection(2, 4, factor).keep(x), Selection(2, 4).keep(x))
    by = 2.0 ** torch.randint(-3, 4, (64,))  # exact
    plain, moved = Selection(2, 4, column_norms(weight)), Selection(2, 4, column_norms(weight * by))
    assert torch.equal(plain.keep(x), moved.keep(x / by)) and not torch.equal(Selection(2, 4).keep(x), plain.keep(x))
    assert not torch.equal(Selection(2, 4).keep(x), Selection(2, 4).keep(x / by))


def test_ambers_factors():
    """Columns of one norm give 1; a single outlier is clipped, so that it does not decide a channel."""
    torch.manual_seed(0)
    weight = torch.randn(400, 32)
    factors = amber_factors(weight)
    assert float(factors.min()) == pytest.approx(1) and float(factors.max()) < 1.4
    spoilt = weight.clone()
    spoilt[3, 7] = 500.0
    assert float(column_norms(spoilt)[7] / column_norms(spoilt).min()) > 20 and float(amber_factors(spoilt)[7]) < 1.4
    ordered = weight.flatten().sort().values  # the same by hand: nearest rank, per matrix
    low, high = ordered[round(0.005 * 12800) - 1], ordered[round(0.995 * 12800) - 1]
    clipped = weight.clamp(low, high)
    norms = ((clipped - clipped.mean()) / clipped.std()).norm(dim=0)
    torch.testing.assert_close(factors, norms / norms.min())


def dropped_energy(x, n, m):
    return float(torch.where(group_mask(x.abs(), n, m), 0, x).square().sum() / x.square().sum())


@pytest.mark.parametrize(
    ("draw", "shares"),
    [
        (torch.distributions.Normal(0.0, 1.0), (0.1325, 0.1033, 0.0877, 0.0796, 0.0710)),
        (torch.distributions.Laplace(0.0, 1.0), (0.0798, 0.0561, 0.0445, 0.0388, 0.0332)),
    ],
)
def test_wider_groups_drop_less_energy(draw, shares):
    """Check 4: the derived table, and its order."""
    torch.manual_seed(0)
    x = draw.sample((256, 4096))
    actual = [dropped_energy(x, n, m) for n, m in (*LADDER, (2048, 4096))]
    assert actual == pytest.approx(shares, abs=0.002) and actual == sorted(actual, reverse=True)
    bits = [metadata_bits(n, m) for n, m in LADDER]
    assert bits == pytest.approx((0.65, 0.77, 0.85, 0.91), abs=0.006)


@pytest.mark.parametrize(("narrow", "wide"), list(itertools.pairwise(LADDER)))
def test_a_narrow_mask_is_a_valid_wide_one(narrow, wide):
    """Check 5: so the best wide mask loses no more."""
    x = torch.randn(100, 64)
    mask = group_mask(x.abs(), *narrow)
    assert (mask.unflatten(-1, (-1, wide[1])).sum(-1) == wide[0]).all()
    errors = [(Selection(*pattern).read(x) - x).norm(dim=-1) for pattern in (narrow, wide)]
    assert (errors[1] <= errors[0] + 1e-6).all() and (errors[1] < errors[0]).any()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_decode_after_a_sparse_prompt_is_dense_bit_for_bit(kind, data, tmp_path):
    """Check 6: given the same cache; the cache itself is another than the dense model's. OPT flattens its tokens."""
    rule, rows = method(), data.test.sequences(2)[:, :20] % 320
    state = rule.fit(Loaded(tiny_model(kind), None, {}), data, work(tmp_path))
    sparse, dense = rule.apply(tiny_model(kind), state, work(tmp_path)), tiny_model(kind)
    caches = []
    with torch.no_grad():
        for model in (sparse, dense):
            caches.append(model(input_ids=rows, use_cache=True).past_key_values)
        other = copy.deepcopy(caches[0])
        following = rows[:, :1]
        steps = [
            m(input_ids=following, use_cache=True, **{cache_argument(m): c}).logits
            for m, c in ((sparse, caches[0]), (dense, other))
        ]
    assert torch.equal(*steps)
    assert not torch.equal(other.layers[1].keys[:, :, :20], caches[1].layers[1].keys)
    assert {s.kernel(1) for _, s in measured_modules(sparse)} == {"masked_dense"}


@pytest.mark.parametrize("center", [None, torch.linspace(-1, 2, 64)])
def test_shift(center):
    """Check 7: with everything kept it is the map itself; what it adds back is eta W 1, or W eta."""
    linear, sparse = layer(2, 4, correction="shift", center=center)
    x = torch.randn(3, 5, 64) + 1
    y, eta = sparse(x), x.mean(-1, keepdim=True) if center is None else center
    masked = torch.where(group_mask((x - eta).abs(), 2, 4), x - eta, 0)
    apart = eta * linear.weight.sum(1) if center is None else F.linear(eta, linear.weight)
    torch.testing.assert_close(y, F.linear(masked, linear.weight, linear.bias) + apart, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y, F.linear(sparse.selection.read(x), linear.weight, linear.bias), rtol=1e-5, atol=1e-5)
    sparse.threshold.fill_(-1)
    torch.testing.assert_close(sparse(x), linear(x), rtol=1e-5, atol=1e-5)
    assert (y - linear(x)).abs().max() > 0.05


def test_variance(data, tmp_path):
    """Check 8: the length of each token stays; calibrated, the energy over the calibration text does."""
    x = torch.randn(4, 7, 64)
    x[0, 0] = 0
    torch.testing.assert_close(Selection(2, 4, correction="variance").read(x).norm(dim=-1), x.norm(dim=-1))
    state = fitted(method(correction="variance", correction_from="calibration"), data, tmp_path)
    assert all(1 < float(state.tensors[f"gain.{s.name}"]) < 2 for s in sites(tiny_model()))
    seen = []
    model = tiny_model()
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    logits(model, data.fit.sequences(256 // data.fit.sequence_length))
    whole, kept = seen[0].square().sum(), Selection(2, 4).read(seen[0]).square().sum()
    assert float(state.tensors["gain.0.q"]) == pytest.approx(float((whole / kept).sqrt()), rel=1e-5)


@pytest.mark.parametrize("correction", ["shift", "variance"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_tokens_left_dense_are_not_corrected(correction, calibrated):
    """The prompt policy's dense tokens are the map's own, whatever the correction."""
    own = {"center": torch.linspace(-1, 2, 64)} if correction == "shift" else {"gain": 1.3}
    linear, sparse = layer(2, 4, correction=correction, prompt="half", **(own if calibrated else {}))
    x = torch.randn(2, 8, 64)
    y, dense = sparse(x), linear(x)
    torch.testing.assert_close(y[:, :4], dense[:, :4], rtol=1e-6, atol=1e-6)
    assert ((y[:, 4:] - dense[:, 4:]).abs().amax(-1) > 1e-3).all()


def plan(skip=(), coverage=1.0, e=None):
    model = tiny_model()
    every = list(sites(model))
    e = e or {site.name: float(i) for i, site in enumerate(every)}
    return every, [s.name for s in planned(model, every, e, list(skip), coverage)]


def test_the_plan_leaves_the_most_sensitive_maps_dense(data, tmp_path):
    """Check 10: skipped maps untouched, coverage the MAC share of the rest, coverage 1 skips none."""
    every, all_of_them = plan()
    assert all_of_them == [s.name for s in every]
    size = {s.name: tiny_model().get_submodule(s.path).weight.numel() for s in every}
    _, kept = plan(coverage=0.55)
    share = sum(size[name] for name in kept) / sum(size.values())
    assert kept == all_of_them[: len(kept)]  # e rises with the place, so the last ones go
    assert share >= 0.55 > share - size[kept[-1]] / sum(size.values())
    assert not {name for name in plan(skip=["o", "up"])[1] if name.endswith((".o", ".up"))}

    rule = method(coverage=0.55, skip=["v"])
    state = fitted(rule, data, tmp_path)
    model, dense = rule.apply(tiny_model(), state, work(tmp_path)), tiny_model()
    sparse = {name for name, _ in measured_modules(model)}
    table = {s.name: float(state.tensors[f"sensitivity.{s.name}"]) for s in every}
    assert max(table[n] for n in sparse) < min(table[s.name] for s in every if s.name not in sparse and s.role != "v")
    for site in every:
        x = torch.randn(2, 6, size[site.name] // len(dense.get_submodule(site.path).weight))
        left, right = (m.get_submodule(site.path)(x) for m in (model, dense))
        assert torch.equal(left, right) == (site.name not in sparse)


def test_sensitivity_is_the_relative_error_of_the_output(data):
    """||y_s - y|| / ||y||, mean over tokens, by hand; upstream is dense, so no map sees another's zeros."""
    model, rows = tiny_model(), data.fit.sequences(3)
    site = next(s for s in sites(model) if s.name == "1.down")
    seen = []
    model.get_submodule(site.path).register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    logits(model, rows)
    (x,), linear = seen, model.get_submodule(site.path)
    y, masked = linear(x), linear(Selection(2, 4).read(x))
    expected = float(((masked - y).norm(dim=-1) / y.norm(dim=-1)).mean())
    every = list(sites(model))
    table = sensitivities(model, every, lambda s: Selection(2, 4).read, rows, 2)
    assert table["1.down"] == pytest.approx(expected, rel=1e-5) and table.keys() == {s.name for s in every}


def tiles(x):
    """2:4 along rows and columns of every 4 x 4 tile at once, greedily by magnitude: torch's pruning by tiles."""
    keep = torch.zeros_like(x, dtype=torch.bool)
    for i, j in itertools.product(range(0, x.shape[0], 4), range(0, x.shape[1], 4)):
        tile, mine = x[i : i + 4, j : j + 4].abs(), keep[i : i + 4, j : j + 4]
        for place in tile.flatten().argsort(descending=True).tolist():
            row, column = divmod(place, 4)
            if mine[row].sum() < 2 and mine[:, column].sum() < 2:
                mine[row, column] = True
    return keep


def test_a_mask_is_of_its_token_alone():
    """Check 11: pruning by 4 x 4 tiles is another method, in which tokens decide on each other."""
    torch.manual_seed(0)
    x = torch.randn(8, 64)
    mask, tiled = Selection(2, 4).keep(x), tiles(x)
    assert not torch.equal(mask, tiled) and (tiled.unflatten(-1, (-1, 4)).sum(-1) <= 2).all()
    other = x.clone()
    other[1:4] = torch.randn(3, 64)
    assert torch.equal(Selection(2, 4).keep(other)[0], mask[0]) and not torch.equal(tiles(other)[0], tiled[0])


def test_few_nonzeros_lose_nothing():
    """Check 12: squared ReLU with at most N non-zeros in each group; kept zeros are counted apart."""
    torch.manual_seed(0)
    x = torch.relu(torch.randn(6, 9, 64)).square()
    x = torch.where(group_mask(torch.rand(6, 9, 64), 2, 4), x, 0)
    linear, sparse = layer(2, 4)
    assert torch.equal(sparse(x), linear(x))
    sparse.counter = sparse.new_counter()
    sparse(x)
    assert int(sparse.counter.kept.sum()) == x.numel() // 2 and sparse.counter.nonzeros == int((x != 0).sum())


def test_counts_are_exact_and_kept_zeros_are_said(data, tmp_path):
    model = applied(method(n=1, m=4, prompt="half"), data, tmp_path)
    _, counters = quality.language_quality(model, data.test, 6, 4)
    for seen in sparsity.summarise(model, counters).values():
        assert seen.sparsity_of_sparse_tokens == 0.75 and seen.sparse_tokens == seen.dense_tokens > 0
        assert seen.kept_inputs_nonzero == pytest.approx(0.25, abs=1e-3)
    _, sparse = layer(2, 4)
    sparse.counter = sparse.new_counter()
    sparse.counter.token_mask = torch.tensor([[True, True, False]])
    sparse(torch.ones(1, 3, 64))
    assert (sparse.counter.nonzeros, sparse.counter.sparse_tokens) == (64, 2)
    sparse(torch.ones(1, 3, 64).mul(0))
    assert sparse.counter.nonzeros == 64 and int(sparse.counter.kept.sum()) == 128


@pytest.mark.parametrize("kernel", CPU_KERNELS)
@pytest.mark.parametrize("correction", ["none", "shift", "variance"])
def test_decode_may_be_sparse_too(kernel, correction):
    """phase=all: one token by the kernel equals the same token in a prompt."""
    _, sparse = layer(2, 4, phase="all", kernel=kernel, correction=correction)
    x = torch.randn(1, 5, 64)
    assert sparse.kernel(1) == kernel and sparse.kernel(5) == "masked_dense"
    torch.testing.assert_close(sparse(x[:, 2:3]), sparse(x)[:, 2:3], rtol=1e-4, atol=1e-5)
    assert (sparse(x[:, 2:3]) - layer(2, 4)[0](x[:, 2:3])).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["method.n=5"], "method.n must be at most m=4, got 5"),
        (["method.n=null", "method.m=7"], "method.m must be even with n=null (half of a group), got 7"),
        (["method.skip=[head]"], "method.skip must be a list, each element one of q, k, v"),
    ],
)
def test_settings_that_cannot_be(given, line):
    with pytest.raises(ConfigError) as error:
        build_settings(compose_all(["method=nm", "hardware=cpu", *given])[0])
    assert line in str(error.value)


def test_groups_must_divide_the_inputs(data, tmp_path):
    with pytest.raises(ValueError, match=r"method.m must divide the 64 inputs of 0.q, got 24"):
        fitted(method(n=2, m=24), data, tmp_path)
    model = tiny_model()
    site = next(sites(model))
    with pytest.raises(ValueError, match="must divide"):
        replace(model, site.path, GroupSparseLinear(model.get_submodule(site.path), "0.q", Selection(2, 24)))


def test_a_plan_has_no_single_sparsity():
    assert (method().requested, method(n=None, m=None).requested, method(n=1).requested) == (0.5, 0.5, 0.75)
    assert method(coverage=0.5).requested is method(skip=["o"]).requested is method(n=9, m=None).requested is None
