"""Faithfulness checks of top-p (docs/methods/topp.md, Faithfulness checks; the number of each check in its docstring)."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from sparsebench import kernels
from sparsebench.measure import macs, quality, sparsity
from sparsebench.methods.topp import TARGETS, TopP
from sparsebench.models.language import Loaded
from sparsebench.modules.base import measured_modules
from sparsebench.modules.cut import Cut, CutFFN, CutLinear, Shared
from tests.helpers import built, logits, tiny_model, work

ROWS = torch.randint(1, 320, (4, 24), generator=torch.Generator().manual_seed(2))


def method(**changes) -> TopP:
    return built("method", "method=topp", **changes)


def applied(rule, tmp_path, model=None, data=None, kernel=None):
    context = work(tmp_path)
    if kernel:
        context.hardware.kernel_name = kernel
    state = rule.fit(Loaded(tiny_model(), None, {}), data, context)
    return rule.apply(model or tiny_model(), state, context)


def by_loop(v: list[float], p: float) -> list[bool]:
    """The mask, entry by entry: the largest first until their sum holds a share p; equal ones stay together."""
    order, total, mass = sorted(range(len(v)), key=lambda i: -abs(v[i])), sum(map(abs, v)), 0.0
    for i in order:
        mass += abs(v[i])
        if mass >= p * total:
            return [abs(e) >= abs(v[i]) for e in v]
    return [True] * len(v)


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9, 0.99])
def test_the_mask_is_minimal(p):
    """Check 1: it holds p of the L1 mass, and without its smallest entry it would not."""
    v = torch.randn(200, 64, dtype=torch.float64)
    keep = Cut("topp", p)(v)
    mass = torch.where(keep, v.abs(), 0)
    assert (mass.sum(-1) >= p * v.abs().sum(-1)).all()
    smallest = torch.where(keep, v.abs(), math.inf).amin(-1)
    assert (mass.sum(-1) - smallest < p * v.abs().sum(-1)).all()
    assert keep[0].tolist() == by_loop(v[0].tolist(), p)


@pytest.mark.parametrize("target", TARGETS)
def test_everything_kept_is_dense_and_nothing_asked_is_the_largest(target, tmp_path):
    """Check 2: p = 1 is bit-equal to dense; p = 0 keeps exactly the entries equal to the maximum."""
    dense = logits(tiny_model(), ROWS)
    assert torch.equal(logits(applied(method(target=target, p=1.0), tmp_path), ROWS), dense)
    assert not torch.equal(logits(applied(method(target=target, p=0.0), tmp_path), ROWS), dense)
    v = torch.tensor([[0.5, -2.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert Cut("topp", 0.0)(v).tolist() == [[False, True, False, True], [False] * 4]
    assert Cut("topp", 1.0)(v).tolist() == [[True, True, False, True], [False] * 4]  # zeros add nothing
    tiny = torch.tensor([[1.0, 1e-30]])
    assert Cut("topp", 1.0)(tiny).all()  # also where the sum does not show it


def test_scale_and_order_do_not_matter():
    """Check 3."""
    v, order = torch.randn(50, 40), torch.randperm(40)
    for rule in ("topp", "topk", "maxp"):
        cut = Cut(rule, 0.6)
        assert torch.equal(cut(v), cut(v * 8)) and torch.equal(cut(v), cut(-v / 4))
        assert torch.equal(cut(v)[:, order], cut(v[:, order]))


SHARES = [0.99, 0.97, 0.95, 0.90, 0.80, 0.70, 0.50]
GAUSSIAN = [0.113, 0.195, 0.251, 0.354, 0.496, 0.602, 0.761]
LAPLACE = [0.138, 0.235, 0.299, 0.413, 0.562, 0.666, 0.813]


def test_sparsity_of_known_shapes():
    """Check 4: never rising with p for any token; the shares of Gaussian and Laplace draws of 8,192 entries."""
    torch.manual_seed(0)
    laplace = torch.distributions.Laplace(0.0, 1.0).sample((16, 8192))
    for draws, expected in ((torch.randn(16, 8192), GAUSSIAN), (laplace, LAPLACE)):
        dropped = [(~Cut("topp", p)(draws)).float().mean(-1) for p in SHARES]
        for share, published in zip(dropped, expected, strict=True):
            assert float(share.mean()) == pytest.approx(published, abs=0.005)
        assert all((b >= a).all() for a, b in itertools.pairwise(dropped))


def test_equal_entries_stay_together():
    """Check 5."""
    assert Cut("topp", 0.3)(torch.tensor([1.0, 1.0, 1.0, 0.5])).tolist() == [True, True, True, False]


def test_masses_may_be_powers():
    """power=2: energy; 3^2 of 3^2 + 2^2 + 2^2 is 0.53."""
    v = torch.tensor([3.0, 2.0, 2.0])
    assert Cut("topp", 0.5, power=2.0)(v).tolist() == [True, False, False]
    assert Cut("topp", 0.5)(v).all()


def seen_by(model, paths):
    inputs = {}
    for path in paths:
        module = model.get_submodule(path)
        module.register_forward_hook(lambda m, args, y, p=path: inputs.__setitem__(p, (args[0], y)))
    logits(model, ROWS)
    return inputs


def test_gate_and_up_share_a_mask_and_the_middle_leaves_them_alone(tmp_path):
    """Check 6."""
    model = applied(method(target="input", p=0.7), tmp_path)
    mlp = model.model.layers[0].mlp
    assert mlp.gate_proj.selection is mlp.up_proj.selection
    calls = []
    cut = mlp.up_proj.selection.cut
    mlp.up_proj.selection.cut = lambda x: calls.append(x) or cut(x)
    x = torch.randn(2, 5, 64)
    assert torch.equal(mlp.gate_proj.keep(x), mlp.up_proj.keep(x)) and len(calls) == 1  # computed once
    assert not torch.equal(mlp.gate_proj.keep(x), mlp.gate_proj.keep(x * torch.rand(64)))
    dense, sparse = tiny_model(), applied(method(target="intermediate", p=0.7), tmp_path)
    names = [f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")]
    one, two = seen_by(dense, names), seen_by(sparse, names)
    assert all(torch.equal(one[n][1], two[n][1]) for n in names[:2]) and not torch.equal(
        one[names[2]][1], two[names[2]][1]
    )


def test_a_tensor_changed_in_place_gets_a_new_mask():
    shared, x = Shared(Cut("topp", 0.5), 2), torch.randn(3, 16)
    first = shared(x)
    x.mul_(torch.rand(16))
    assert torch.equal(shared(x), Cut("topp", 0.5)(x)) and not torch.equal(first, Cut("topp", 0.5)(x))


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_what_is_lost_is_bounded(p):
    """Check 7: ||sum of dropped W_d[:, j] i_j|| <= (1 - p) ||i||_1 max ||W_d[:, j]||; reached by one column's worth."""
    torch.manual_seed(1)
    weight, i = torch.randn(24, 96, dtype=torch.float64), torch.randn(300, 96, dtype=torch.float64)
    lost = (torch.where(Cut("topp", p)(i), 0, i) @ weight.T).norm(dim=-1)
    bound = (1 - p) * i.abs().sum(-1) * weight.norm(dim=0).max()
    assert (lost <= bound).all() and (lost > 0).all()
    column = torch.randn(24, 1, dtype=torch.float64)
    pair = torch.tensor(
        [[3.0, 1.0]], dtype=torch.float64
    )  # at p = 3/4 the second falls, and nothing of the bound is left
    drop = torch.where(Cut("topp", 0.75)(pair), 0, pair) @ column.expand(24, 2).T
    assert float(drop.norm()) == pytest.approx(float(0.25 * 4 * column.norm()), rel=1e-12)


def test_topk_and_topp_agree_at_equal_counts():
    """Check 8."""
    v = torch.randn(30, 50)
    for row in v:
        keep = Cut("topp", 0.8)(row)
        assert torch.equal(Cut("topk", float(keep.sum()) / 50)(row), keep)
    assert Cut("topk", 0.0)(v).sum(-1).eq(1).all() and Cut("maxp", 0.0)(v).all()


D, FF = 64, 160


def counted_products(model, target, p):
    """Products of the FFN by a loop over tokens and entries: what a kernel that knows the mask has to multiply."""
    names = [f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")]
    seen = seen_by(model, names)
    x, gate, up = (
        seen[names[0]][0].reshape(-1, D),
        F.silu(seen[names[0]][1]).reshape(-1, FF),
        seen[names[1]][1].reshape(-1, FF),
    )
    products = 0
    for a, g, u in zip(x.tolist(), gate.tolist(), up.tolist(), strict=True):
        middle = [b * c for b, c in zip(g, u, strict=True)]
        kept_x = by_loop(a, p) if target in ("input", "all_inputs") else [True] * D
        if target == "all_inputs":  # the middle is of the sparse input
            continue
        tensor = {"gate": g, "up": u, "intermediate": middle, "input": None}[target]
        kept = by_loop(tensor, p) if tensor else [True] * FF
        for i in range(FF):
            products += sum(kept_x) * (2 if target in ("input", "intermediate") else 1 + kept[i])  # gate and up
            products += D if kept[i] else 0  # down
    return products / len(x)


@pytest.mark.parametrize("target", ["input", "up", "gate", "intermediate"])
def test_macs_equal_a_loop_over_products(target, tmp_path):
    """Check 9: 2DF(1-s) + DF, DF + 2DF(1-s), DF + 2DF(1-s), 2DF + DF(1-s), from the mask alone; the selection apart."""
    expected = counted_products(tiny_model(layers=1), target, 0.8)
    sites, measured = costs_of(target, tmp_path)
    ffn = [sites[f"0.{role}"] for role in ("gate", "up", "down")]
    assert sum(c.sparse_macs for c in ffn) == pytest.approx(expected, rel=1e-9)
    skipped = {role for role in ("gate", "up", "down") if sites[f"0.{role}"].sparse_macs < D * FF}
    others = {"input": {"gate", "up"}, "up": {"gate", "down"}, "gate": {"up", "down"}, "intermediate": {"down"}}
    assert skipped == others[target]
    s = next(iter(measured.values())).sparsity
    formula = {"input": 2 * (1 - s) + 1, "up": 3 - 2 * s, "gate": 3 - 2 * s, "intermediate": 3 - s}[target]
    assert expected == pytest.approx(D * FF * formula, rel=1e-9)
    assert sum(c.overhead_macs for c in ffn) == {"input": D}.get(target, FF)


def test_macs_of_both_inputs(tmp_path):
    """Check 9, all_inputs: 2DF(1-s_x) + DF(1-s_i); the mask of x is paid once."""
    sites, measured = costs_of("all_inputs", tmp_path)
    ffn = [sites[f"0.{role}"] for role in ("gate", "up", "down")]
    expected = D * FF * (2 * (1 - measured["0.gate"].sparsity) + 1 - measured["0.down"].sparsity)
    assert sum(c.sparse_macs for c in ffn) == pytest.approx(expected, rel=1e-9)
    assert measured["0.gate"].sparsity == measured["0.up"].sparsity != measured["0.down"].sparsity
    assert sum(c.overhead_macs for c in ffn) == D + FF


def costs_of(target, tmp_path):
    """(costs by site over dense ones, what was counted) of one block."""
    dense = macs.dense_sites(tiny_model(layers=1))
    model = applied(method(target=target, p=0.8), tmp_path, tiny_model(layers=1))
    with torch.no_grad(), sparsity.counting(model) as counters:
        model(input_ids=ROWS, use_cache=False)
    measured = sparsity.summarise(model, counters)
    return dense | macs.site_costs(model, measured), measured


def test_tokens_are_masked_alone_and_padding_counts_nowhere(tmp_path):
    """Check 11."""
    v = torch.randn(6, 40)
    before = Cut("topp", 0.7)(v)
    v[2] = torch.randn(40)
    after = Cut("topp", 0.7)(v)
    assert torch.equal(before[[0, 1, 3, 4, 5]], after[[0, 1, 3, 4, 5]]) and not torch.equal(before[2], after[2])
    model = applied(method(target="all_inputs", p=0.8), tmp_path)

    def shares(rows, mask):
        with torch.no_grad(), sparsity.counting(model) as counters:
            sparsity.set_token_mask(model, mask)
            model(input_ids=rows, attention_mask=mask.long(), use_cache=False)
        return {n: (s.sparsity, s.sparse_tokens) for n, s in sparsity.summarise(model, counters).items()}

    padded, mask = torch.cat([ROWS, ROWS.flip(1)], 1), torch.ones(4, 48, dtype=torch.bool)
    mask[:, 24:] = False
    assert shares(padded, mask) == shares(ROWS, torch.ones(4, 24, dtype=torch.bool))


def test_frozen_agrees_where_tokens_are_alike(data, tmp_path):
    """Check 12: tokens of equal norm and independent entries; and `fit` keeps the mean cut of its tensors."""
    torch.manual_seed(3)
    v = F.normalize(torch.randn(64, 4096), dim=-1)
    for p in (0.9, 0.6):
        cut = Cut("topp", p)
        frozen = v.abs() >= float(cut.least(v.abs()).mean())
        assert float(frozen.float().mean()) == pytest.approx(float(cut(v).float().mean()), abs=0.01)
    for target, name in (("all_inputs", "mlp_in"), ("gate", "gate"), ("up", "up")):
        rule = method(target=target, p=0.8, cut="frozen", calibration_tokens=128)
        state = rule.fit(Loaded(tiny_model(), None, {}), data, work(tmp_path))
        tensors = []
        mlp = (dense := tiny_model()).model.layers[0].mlp
        see = {
            "mlp_in": lambda x: x,
            "gate": lambda x, m=mlp: F.silu(x @ m.gate_proj.weight.T),
            "up": lambda x, m=mlp: x @ m.up_proj.weight.T,
        }
        mlp.register_forward_pre_hook(lambda _, args: tensors.append(see[name](args[0])))  # noqa: B023
        logits(dense, data.fit.rows[: 128 // data.fit.rows.shape[1]])
        expected = Cut("topp", 0.8).least(torch.cat(tensors).abs()).double().mean()
        torch.testing.assert_close(state.tensors[f"cut.0.{name}"], expected, rtol=1e-4, atol=0)
        sparse = rule.apply(tiny_model(), state, work(tmp_path))
        token = applied(method(target=target, p=0.8), tmp_path)
        both = [pooled(m, data) for m in (sparse, token)]
        assert abs(both[0] - both[1]) < 0.1 and both[0] > 0.2


def pooled(model, data):
    _, counters = quality.language_quality(model, data.test, 4, 4)
    return sum(s.sparsity for s in sparsity.summarise(model, counters).values()) / len(counters)


@pytest.mark.parametrize("target", TARGETS)
def test_one_token_is_served_by_the_kernel_and_weights_of_dropped_entries_are_not_read(target, tmp_path):
    """NaN in every weight that a token's mask skips does not reach its output; masked-dense is what it should be."""
    kernels.load("cpu_numba").prepare(1)
    x = torch.randn(1, 1, 64)
    model = applied(method(target=target, p=0.6), tmp_path, kernel="cpu_numba")
    mlp = model.model.layers[0].mlp
    sparse = [m for _, m in measured_modules(mlp)]
    assert sparse and all(m.kernel(1) == "cpu_numba" and m.kernel(2) == "masked_dense" for m in sparse)
    with torch.no_grad():
        for m in sparse:
            m.kernel_name = "masked_dense"
        expected = mlp(x)
        spoil(mlp, x)
        for m in sparse:
            m.kernel_name = "cpu_numba"
        if target == "up":  # all rows of the gate at once would be a product that is said to be skipped
            mlp.gate.register_forward_pre_hook(lambda *_: pytest.fail("the whole gate was computed"))
        actual = mlp(x)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        for m in sparse:  # with nothing dropped these weights are read
            m.threshold.fill_(-1)
        for weight in mlp.parameters():
            weight.copy_(torch.where(weight.isnan(), torch.randn_like(weight), weight))
        assert not torch.allclose(mlp(x), expected, rtol=1e-2)


def spoil(mlp, x):
    """Put NaN where the mask of this token says that nothing is read."""
    if isinstance(mlp, CutFFN):
        values = mlp.activation(mlp.gate(x)) if mlp.by == "gate" else mlp.up(x)
        gone = ~mlp.keep(values).flatten()
        (mlp.up if mlp.by == "gate" else mlp.gate).weight.data[gone] = math.nan
        mlp.down.data[:, gone] = math.nan
        return
    middle = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    for linear, tensor in ((mlp.gate_proj, x), (mlp.up_proj, x), (mlp.down_proj, middle)):
        if isinstance(linear, CutLinear):
            linear.weight.data[:, ~linear.keep(tensor).flatten()] = math.nan


def test_a_knob_only_where_no_fit_is_needed():
    assert method().knob == ("p", 1.0, 0.0) and method(rule="maxp").knob == ("p", 0.0, 1.0)
    assert method(cut="frozen", calibration_tokens=64).knob is None
    assert method().requested is None
