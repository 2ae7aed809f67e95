"""Faithfulness checks of DuoGPT and its controls (docs/methods/duogpt.md, Faithfulness checks; their numbers in docstrings)."""

import pytest
import torch

from sparsebench import config
from sparsebench.config.compose import compose_all
from sparsebench.measure import macs, quality, sparsity
from sparsebench.methods.duogpt import pruning
from sparsebench.methods.duogpt.method import DuoGPT, groups
from sparsebench.methods.duogpt.pruning import Rule, Statistics, correction, inverse_factor
from sparsebench.models.language import Loaded
from sparsebench.modules.input_sparse import InputSparseLinear
from sparsebench.sites import find_blocks, weight_of
from sparsebench.tasks import language_modeling
from tests.helpers import accounted, built, logits, tiny_model, work


def method(name="duogpt", **changes) -> DuoGPT:
    return built("method", f"method={name}", "method.prompt=all", **{"calibration_tokens": 512, **changes})


def fitted(rule, data, tmp_path):
    return rule.fit(Loaded(tiny_model(), None, {}), data, work(tmp_path))


def layer(rows=24, k=32, tokens=400, drift=0.3, share=0.5, seed=0):
    """(W, X~ [tokens, k], X^ [tokens, k]) in float64: correlated inputs of unequal scale, X^ drifted and masked."""
    torch.manual_seed(seed)
    mix = torch.randn(k, k, dtype=torch.float64) / k**0.5 + torch.eye(k, dtype=torch.float64)
    dense = (torch.randn(tokens, k, dtype=torch.float64) @ mix) * (torch.rand(k, dtype=torch.float64) + 0.3)
    drifted = dense + drift * torch.randn(tokens, k, dtype=torch.float64) * dense.std(0)
    kept = k - int(k * share)
    mask = torch.zeros_like(drifted).scatter_(1, drifted.abs().topk(kept, 1).indices, 1.0)
    return torch.randn(rows, k, dtype=torch.float64), dense, drifted * mask


def statistics(dense, sparse, dtype=torch.float64) -> Statistics:
    actual = Statistics.empty(dense.shape[1], dtype=dtype)
    for i in range(0, len(dense), 96):  # streamed
        actual.add(sparse[i : i + 96], dense[i : i + 96])
    return actual


def sparsegpt(weight, x, share, damping, block):
    """SparseGPT written down again from its paper: column by column with the whole inverse, no factor, no laziness."""
    W, k = weight.clone(), weight.shape[1]
    H = x.T @ x / len(x)
    H = H + damping * H.diagonal().mean() * torch.eye(k, dtype=H.dtype)
    for start in range(0, k, block):
        stop = min(start + block, k)
        inverses = [torch.linalg.inv(H[p:, p:]) for p in range(start, stop)]
        score = torch.stack([W[:, p] ** 2 / inverses[p - start][0, 0] for p in range(start, stop)], 1)
        drop = torch.zeros(score.numel(), dtype=torch.bool)
        drop[score.flatten().argsort()[: int(share * score.numel())]] = True
        drop = drop.view(score.shape)
        for p in range(start, stop):
            inverse = inverses[p - start]
            error = torch.where(drop[:, p - start], W[:, p], 0) / inverse[0, 0]
            W[:, p:] -= error[:, None] * inverse[0][None]
            W[drop[:, p - start], p] = 0
    return W


@pytest.mark.parametrize("block", [8, 32])
def test_alpha_zero_is_sparsegpt_on_the_sparse_inputs(block):
    """Check 2, against an independent SparseGPT, and check 12: H is of the masked inputs."""
    W, dense, sparse = layer()
    actual = pruning.prune(W, statistics(dense, sparse), Rule(0.5, alpha=0.0, damping=0.05, block=block))
    torch.testing.assert_close(actual, sparsegpt(W, sparse, 0.5, 0.05, block), rtol=1e-8, atol=1e-10)
    other = sparsegpt(W, dense, 0.5, 0.05, block)
    assert (actual - other).abs().max() > 1e-3


def test_without_drift_the_correction_is_nothing_bit_for_bit():
    """Check 1: X~ = X^ gives G = a = 0, and any alpha equals SparseGPT with equal damping and order."""
    W, dense, _ = layer()
    same = statistics(dense, dense)
    assert not same.G.any() and not same.a.any()
    for order in ("natural", "diag"):
        results = [pruning.prune(W, same, Rule(0.5, alpha=alpha, order=order)) for alpha in (0.0, 0.125, 1.0)]
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_first_maps_of_the_model_equal_sparsegpt_without_activation_sparsity(data, tmp_path):
    """Check 1 through the method: q, k, v of block 0 see no drift at p_x = 0, the maps after them do."""
    results = [fitted(method(sparsity=0.0, alpha=alpha), data, tmp_path).tensors for alpha in (0.0, 1.0)]
    same = {name: torch.equal(results[0][name], results[1][name]) for name in results[0]}
    assert all(same[f"weight.0.{role}"] for role in "qkv") and not same["weight.0.o"] and not same["weight.1.down"]


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_pure_correction_brings_the_output_nearer(alpha):
    """Check 3: p_w = 0."""
    W, dense, sparse = layer()
    actual = pruning.prune(W, statistics(dense, sparse), Rule(0.0, alpha=alpha, damping=1e-6))
    before, after = ((dense @ W.T - sparse @ w.T).norm() for w in (W, actual))
    assert after < before


def closed_form_case():
    """One row of 12 weights whose column 0 alone drifts, so that the correction for r = w_0 dX_0 is all there is."""
    torch.manual_seed(4)
    sparse = torch.randn(60, 12, dtype=torch.float64)
    dense = sparse.clone()
    dense[:, 0] += torch.randn(60, dtype=torch.float64)
    w = torch.randn(1, 12, dtype=torch.float64)
    w[0, 0] = 1e-3  # by far the smallest score: this one is pruned
    actual = statistics(dense, sparse)
    return w, dense, sparse, actual


def constrained(w, dense, sparse):
    """min |delta X^ - r|^2 with delta_0 = -w_0 and r = w_0 dX_0, by least squares; (delta, loss per token)."""
    r = w[0, 0] * (dense - sparse)[:, 0]
    target = r + w[0, 0] * sparse[:, 0]
    rest = torch.linalg.lstsq(sparse[:, 1:], target[:, None]).solution[:, 0]
    residual = sparse[:, 1:] @ rest - target
    return torch.cat([-w[0, :1], rest]), float(residual.square().mean())


def test_update_is_the_constrained_least_squares_solution():
    """Check 4, fp64, k = 12, no damping."""
    w, dense, sparse, actual = closed_form_case()
    pruned = pruning.prune(w, actual, Rule(1 / 12 + 1e-6, alpha=1.0, damping=1e-300))
    delta, _ = constrained(w, dense, sparse)
    assert pruned[0, 0] == 0 and (pruned != 0).sum() == 11
    assert float((pruned[0] - w[0] - delta).abs().max()) < 1e-10


def test_score_is_the_loss_of_that_solution():
    """Check 4, second half: w^2 (1/U^2 + a - b + 2c) is the least squares loss."""
    w, dense, sparse, actual = closed_form_case()
    U = inverse_factor(actual.H, 1e-300)
    _, extra = correction(U, actual.G, actual.a, 1.0)
    score = float(w[0, 0] ** 2 * (1 / U[0, 0] ** 2 + extra[0]))
    assert score == pytest.approx(constrained(w, dense, sparse)[1], rel=1e-9)


def test_result_does_not_depend_on_the_block_size():
    """Check 5, fp64 with masks that don't depend on it either (2:4); the released code's lazy update does depend."""
    W, dense, sparse = layer(k=64)
    actual = statistics(dense, sparse)
    whole = pruning.prune(W, actual, Rule(0.5, pattern="2:4", alpha=1.0, block=64))
    for block in (4, 8, 32):
        lazy = pruning.prune(W, actual, Rule(0.5, pattern="2:4", alpha=1.0, block=block))
        assert float((lazy - whole).abs().max()) < 1e-12
    other = pruning.prune(W, actual, Rule(0.5, pattern="2:4", alpha=1.0, block=8, compat_lazy=True))
    assert float((other - whole).abs().max()) > 1e-4


@pytest.mark.parametrize("order", ["natural", "diag"])
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_zeros_per_block_are_exact(order, share):
    """Check 6: floor(p_w n columns) in every block of columns, the last one pro rata."""
    W, dense, sparse = layer(rows=7, k=40)
    stats = statistics(dense, sparse)
    actual = pruning.prune(W, stats, Rule(share, order=order, block=16, alpha=0.125))
    columns = stats.H.diagonal().argsort(descending=True, stable=True) if order == "diag" else torch.arange(40)
    for part in columns.split(16):
        assert int((actual[:, part] == 0).sum()) == int(share * 7 * len(part) + 1e-9)


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_groups_are_exact(pattern, n, m):
    """Check 6: n zeros of every m neighbours, in the second-order and in the magnitude pattern."""
    W, dense, sparse = layer()
    rule = Rule(0.5, pattern=pattern, alpha=0.125)
    for actual in (pruning.prune(W, statistics(dense, sparse), rule), pruning.magnitude(W, rule)):
        assert torch.all((actual.view(24, -1, m) == 0).sum(-1) == n)


def test_magnitude_keeps_the_largest():
    weight = torch.randn(9, 16)
    actual = pruning.magnitude(weight, Rule(0.5))
    assert int((actual == 0).sum()) == 72 and weight[actual == 0].abs().max() <= actual[actual != 0].abs().min()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.65])
def test_kept_inputs_per_token(share):
    """Check 7: D - int(D p_x) without ties, and p_x = 0 is the identity."""
    x = torch.randn(3, 5, 64)
    actual = method(sparsity=share).pruned_input(x)
    assert torch.all((actual != 0).sum(-1) == 64 - int(64 * share))
    assert torch.equal(actual, x) == (share == 0)
    limit = x.abs().sort(-1).values[..., int(64 * share)]
    assert torch.equal(actual != 0, x.abs() >= limit[..., None])  # tau = sorted |x| at int(D p_x), kept where >=


def test_statistics_are_streamed_symmetric_and_positive():
    """Check 8, and that pieces add up to the whole."""
    _, dense, sparse = layer()
    actual = statistics(dense, sparse)
    torch.testing.assert_close(actual.H, sparse.T @ sparse / len(sparse))
    torch.testing.assert_close(actual.G, (dense - sparse).T @ sparse / len(sparse))
    torch.testing.assert_close(actual.a, (dense - sparse).square().mean(0))
    assert torch.allclose(actual.H, actual.H.T) and torch.linalg.eigvalsh(actual.H).min() > -1e-10
    P, _ = correction(inverse_factor(actual.H, 0.05), actual.G, actual.a, 1.0)
    assert P.any() and not P.tril().any()


def test_correction_helps_at_equal_damping_for_most_layers():
    """Check 9: calibration error of DuoGPT (alpha = 1) against SparseGPT on the same statistics; exceptions printed."""
    better, gains = 0, []
    for seed in range(12):
        W, dense, sparse = layer(seed=seed)
        actual = statistics(dense, sparse)
        errors = [
            float((dense @ W.T - sparse @ pruning.prune(W, actual, Rule(0.5, alpha=a, block=8)).T).norm())
            for a in (0.0, 1.0)
        ]
        gains.append(1 - errors[1] / errors[0])
        better += errors[1] <= errors[0]
    print("relative gain by layer:", [f"{g:.1%}" for g in gains])
    assert better >= 9


def test_statistics_of_a_group_are_those_of_each_of_its_maps(data, tmp_path):
    """Check 10: q, k, v see one tensor, so do gate and up."""
    assert groups(find_blocks(tiny_model())[0]) == [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
    model, seen = tiny_model(), {}
    for site in find_blocks(model)[0].sites.values():
        model.get_submodule(site.path).register_forward_pre_hook(
            lambda _, args, role=site.role: seen.__setitem__(role, args[0])
        )
    logits(model, data.fit.rows[:2])
    for roles in groups(find_blocks(model)[0]):
        assert all(torch.equal(seen[role], seen[roles[0]]) for role in roles)


@pytest.mark.parametrize("order", ["natural", "diag"])
def test_ordering_alone_loses_nothing(order):
    """Check 11."""
    W, dense, sparse = layer()
    assert torch.equal(pruning.prune(W, statistics(dense, sparse), Rule(0.0, alpha=0.0, order=order)), W)


@pytest.mark.parametrize(("mode", "zeros"), [("sparse", 0.5), ("dense", 0.0)])
def test_statistics_are_collected_after_masking(mode, zeros, data, tmp_path, monkeypatch):
    """Check 12: the share of zeros in what is counted as X^, while X~ is never masked."""
    seen = []
    add = Statistics.add

    def watched(self, sparse, dense):
        seen.append((float((sparse == 0).float().mean()), float((dense == 0).float().mean())))
        add(self, sparse, dense)

    monkeypatch.setattr(Statistics, "add", watched)
    fitted(method(sparsity=0.5, statistics=mode), data, tmp_path)
    assert len(seen) == 2 * 4 * 4  # blocks, groups, batches
    assert all(x == pytest.approx(zeros) and y == 0 for x, y in seen)


def test_dense_stream_is_that_of_the_dense_model(data, tmp_path, monkeypatch):
    """Section 6: X~ comes from the dense model, not from unmasked inputs of the pruned one."""
    last, add = {}, Statistics.add

    def watched(self, sparse, dense):
        last[dense.shape[-1]] = dense  # the last of width 160 is the input of the last block's down
        add(self, sparse, dense)

    monkeypatch.setattr(Statistics, "add", watched)
    fitted(method(), data, tmp_path)
    model, seen = tiny_model(), []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model, data.fit.rows[12:16])
    torch.testing.assert_close(last[160], seen[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["duogpt", "sparsegpt", "magnitude"])
def test_both_sparsities_and_what_both_leave_are_reported(name, data, tmp_path):
    """Check 13: weight and activation sparsity apart, and MACs of kept inputs times nonzero weights, counted by hand."""
    rule = method(name, weight_sparsity=0.5, sparsity=0.25)
    dense = macs.dense_sites(tiny_model())
    model = rule.apply(tiny_model(), fitted(rule, data, tmp_path), work(tmp_path))
    products, tokens = 0, data.test.rows[:4].numel()

    def count(module, args, _):
        nonlocal products
        keep = module.keep(args[0]).flatten(0, 1).long()
        products += int((keep @ (module.weight != 0).long().T).sum())

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, InputSparseLinear)]
    _, counters = quality.language_quality(model, data.test, 4, 4)
    for hook in hooks:
        hook.remove()
    measured = sparsity.summarise(model, counters, rule.prunes)
    actual = language_modeling.describe_sparsity(rule.requested, measured, dense, sparsity.zero_weights(model))
    assert actual["weights"] == pytest.approx(0.5, abs=2e-3) and actual["model_wide"] == pytest.approx(0.25)
    counted, _ = accounted(dense, model, measured, context=1, skips=True)
    assert counted["parts"]["blocks_sparse"] - counted["overhead"] == pytest.approx(products / tokens)
    blocks = counted["parts"]["blocks_dense"]
    assert counted["executed"] - counted["parts"]["head"] - counted["parts"]["attention"] == pytest.approx(
        0.75 * blocks + counted["overhead"]
    )  # the kernel skips inputs only
    assert rule.prompt == "all"


def test_pruned_weights_reach_the_model_and_stay_reproducible(data, tmp_path):
    rule = method()
    state = fitted(rule, data, tmp_path)
    model = rule.apply(tiny_model(), state, work(tmp_path))
    for site in (s for b in find_blocks(model) for s in b.sites.values()):
        assert torch.equal(weight_of(model.get_submodule(site.path)), state.tensors[f"weight.{site.name}"])


def test_settings_that_do_not_fit_together_are_named():
    problems = []
    node = compose_all(["method=duogpt"])[0]["method"]
    config.build({**node, "pattern": "2:4", "weight_sparsity": 0.6, "block": 6}, "method", problems)
    assert problems == [
        "method.weight_sparsity must be 0.5 (or 0) with pattern=2:4, got 0.6",
        "method.order must be natural with pattern=2:4 (groups are of neighbours), got diag",
        "method.block must be a multiple of 4 with pattern=2:4, got 6",
    ]


def test_statistics_that_can_not_be_inverted_are_an_error():
    _, dense, _ = layer(tokens=8)
    with pytest.raises(ValueError, match=r"method\.damping=1e-30 is too small"):
        pruning.prune(torch.randn(4, 32, dtype=torch.float64), statistics(dense, dense), Rule(0.5, damping=1e-30))
