"""LTE's faithfulness checks (docs/methods/lte.md)."""

import copy

import pytest
import torch

from sparsebench.config.compose import compose_all
from sparsebench.experts import conversion
from sparsebench.experts.routers import harden, random_router
from sparsebench.measure import sparsity
from sparsebench.measure.quality import language_quality
from sparsebench.methods import lte
from sparsebench.methods.lte import RouterPenalty, efficiency, freeze_routers, separability
from sparsebench.models import Loaded
from sparsebench.training.loop import optimiser
from tests.helpers import QUICK_TRAINING, built, tiny_model, work


def method(steps=3, **changes):
    node = compose_all(["method=lte"])[0]["method"]
    for stage in ("train", "adapt"):
        node[stage] = {**node[stage], "steps": steps, **QUICK_TRAINING, "lr": 3e-3}
    return built("method", "method=lte", **{**node, **changes})


def soft_model(std=0.3):
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    for ffn in conversion.convert(model, 16, None):
        ffn.router = random_router(64, None, 10, generator, std=std)
        ffn.mode = "soft"
    return model.requires_grad_(True)


ROWS = torch.arange(48).view(4, 12)


def logits(model):
    return model(input_ids=ROWS, use_cache=False).logits


def set_logits(model, sign):
    """Every router logit to a large value of one sign, whatever the input: by a bias that routers don't have."""
    for ffn in conversion.ffns(model):
        ffn.router.forward = lambda x, e=ffn.num_experts: torch.full((*x.shape[:-1], e), sign * 1e4)
        ffn.router.rules = tuple  # no backend could know of it


@torch.no_grad()
def test_open_gates_are_the_dense_model():
    """Soft with G = 1, and hard with all logits above 0."""
    expected, model = logits(tiny_model()), soft_model()
    set_logits(model, 1)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    harden(model, "above", 0.5)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_closed_gates_give_the_output_bias_exactly():
    model = tiny_model("gpt2")
    actual = conversion.convert(model, 16, None)
    for ffn in actual:
        ffn.last_bias.data.normal_()
        ffn.router = random_router(64, None, ffn.num_experts, torch.Generator())
    set_logits(model, -1)
    harden(model, "above", 0.5)
    y = actual[0](torch.randn(2, 3, 64))
    assert torch.equal(y, actual[0].last_bias.expand(2, 3, -1))


@pytest.mark.parametrize("shape", [(1, 4), (7, 2), (3, 5, 6)])
def test_losses_at_constant_gates(shape):
    """L_eff: 1 at G = 1, 0.25 at 0.5; L_sep with epsilon 0: 4 at 0 and 1, 16 at 0.25; for any L, N, T."""
    for value, eff, sep in ((1.0, 1.0, 4.0), (0.0, 0.0, 4.0), (0.25, 0.0625, 16.0), (0.5, 0.25, None)):
        gates = torch.full(shape, value)
        assert float(efficiency(gates)) == pytest.approx(eff)
        if sep:
            assert float(separability(gates, 0.5, 0.0)) == pytest.approx(sep)
    assert float(separability(torch.full(shape, 0.5), 0.5, 1e-4)) == pytest.approx(1e4)  # bounded by epsilon


def test_losses_mean_over_layers_tokens_and_experts_without_padding():
    model = soft_model()
    penalty = RouterPenalty(model, conversion.ffns(model), 2.0, 0.5, 0.5, 1e-4)
    mask = torch.ones(4, 12, dtype=torch.int64)
    mask[2, 5:] = 0
    model(input_ids=ROWS, attention_mask=mask, use_cache=False)
    gates = torch.stack([f.soft_scores[mask.bool()] for f in conversion.ffns(model)]).double()
    eff, sep = gates.square().mean(), (1 / ((gates - 0.5) ** 2 + 1e-4)).mean()
    assert float(penalty.value().detach()) == pytest.approx(float((2 * eff + 0.5 * sep).detach()), rel=1e-4)
    shares = [value for key, value in penalty.stats().items() if key.startswith("selected/")]
    assert shares == pytest.approx((gates > 0.5).double().flatten(1).mean(1).tolist())
    penalty.remove()


def test_stage_one_reaches_everything():
    model = soft_model().train()
    penalty = RouterPenalty(model, conversion.ffns(model), 1.0, 0.5, 0.5, 1e-4)
    (logits(model).square().mean() + penalty.value()).backward()
    names = ("router.first", "mlp.first", "mlp.up", "mlp.last", "q_proj.weight")
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if n.endswith(names))


def test_stage_two_leaves_routers_alone():
    """requires_grad off, absent from the optimiser, no gradient, and the task's loss alone in the graph."""
    model = soft_model().train()
    harden(model, "above", 0.5)
    freeze_routers(model)
    routers = [f.router.first for f in conversion.ffns(model)]
    assert not any(r.requires_grad for r in routers)
    held = {id(p) for g in optimiser(model, method().adapt).param_groups for p in g["params"]}
    assert not held & {id(r) for r in routers} and held
    logits(model).square().mean().backward()
    assert all(r.grad is None for r in routers) and all(f.soft_scores is None for f in conversion.ffns(model))
    assert all(f.first.grad is not None for f in conversion.ffns(model))


def test_a_fit_trains_soft_gates_first_then_hard_ones_with_frozen_routers(data, tmp_path, monkeypatch):
    """What `train` is given in each stage: the mode of every FFN, and whether routers learn and do."""
    seen, right = {}, lte.train

    def watched(module, *arguments, label, **named):
        actual = conversion.ffns(module)
        before = [f.router.first.detach().clone() for f in actual]
        modes, learning = {f.mode for f in actual}, {f.router.first.requires_grad for f in actual}
        history = right(module, *arguments, label=label, **named)
        same = all(torch.equal(b, f.router.first) for b, f in zip(before, actual, strict=True))
        seen[label] = (modes, learning, same, bool(named["penalty"]))
        return history

    monkeypatch.setattr(lte, "train", watched)
    state = method(experts={"size": 16, "by": "random", "rounds": 1}).fit(
        Loaded(tiny_model(), None, {}), data, work(tmp_path)
    )
    assert seen == {"fit/soft": ({"soft"}, {True}, False, True), "fit/hard": ({"hard"}, {False}, True, False)}
    routing = state.info["extra"]["routing"]
    assert routing["dev_soft"]["sparsity"] == 0 < routing["dev_adapted"]["sparsity"]


def test_soft_stage_costs_all_experts_and_the_hard_stage_what_it_selects():
    """Executed neurons = 16 x selected experts."""
    model = soft_model().requires_grad_(False)
    for mode in ("soft", "hard"):
        if mode == "hard":
            harden(model, "above", 0.5)
        selected = []
        hooks = [
            f.register_forward_hook(lambda m, a, y, s=selected: s.append(int((m.router(a[0]) > 0).sum())))
            for f in conversion.ffns(model)
        ]
        with sparsity.counting(model) as counters, torch.no_grad():
            logits(model)
        for hook in hooks:
            hook.remove()
        kept = sum(int(c.kept.sum()) for c in counters.values())
        assert kept == (sum(selected) if mode == "hard" else 2 * 48 * 10)
        assert (kept < 2 * 48 * 10) == (mode == "hard")
    ffn, one = conversion.ffns(model)[0], torch.randn(1, 1, 64)
    neurons = ffn.keep(one).repeat_interleave(ffn.size, -1)
    _, _, x1 = ffn.hidden(one)
    torch.testing.assert_close(ffn(one), (x1 * neurons) @ ffn.last, rtol=1e-4, atol=1e-5)
    assert int(neurons.sum()) == 16 * int(ffn.keep(one).sum())


@torch.no_grad()
def test_order_of_experts_does_not_matter():
    model, order = soft_model(), torch.randperm(10, generator=torch.Generator().manual_seed(1))
    other = copy.deepcopy(model)
    for ffn in conversion.ffns(other):
        ffn.reorder(torch.arange(160).view(10, 16)[order].flatten())
        ffn.router.permute(order)
    penalties = [RouterPenalty(m, conversion.ffns(m), 1.0, 0.5, 0.5, 1e-4) for m in (model, other)]
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-4)
    assert float(penalties[0].value()) == pytest.approx(float(penalties[1].value()), rel=1e-4)


class Fits:
    """LTE fitted on the tiny model, once per setting."""

    def __init__(self, folder):
        from tests.helpers import TEXT, Rows, tiny_tokenizer

        ids = torch.tensor(tiny_tokenizer()(TEXT)["input_ids"])
        windows = ids[: len(ids) // 32 * 32].view(-1, 32)
        self.data = type(
            "Data", (), {"fit": Rows(windows[:64]), "dev": Rows(windows[64:80]), "test": Rows(windows[80:110])}
        )
        self.folder, self.record = folder, {}

    def __call__(self, **changes):
        key = str(changes)
        if key not in self.record:
            chosen = method(steps=60, router_std=0.1, experts={"size": 8, "by": "kmeans", "rounds": 2}, **changes)
            state = chosen.fit(Loaded(tiny_model(), None, {}), self.data, work(self.folder / str(len(self.record))))
            self.record[key] = (state, chosen.apply(tiny_model(), state, work(self.folder)))
        return self.record[key]

    def shares(self, model):
        quality, counters = language_quality(model, self.data.test, None, 8)
        actual = sparsity.summarise(model, counters)
        return quality["nll"], {n: s.sparsity for n, s in actual.items() if n.endswith(".down")}


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    return Fits(tmp_path_factory.mktemp("lte"))


def test_sparsity_rises_with_eta(fits):
    """With the default epsilon: at 1e-4 the wall at tau holds every score where it started (trap 2)."""
    means = []
    for eta in (0.0, 20.0):
        _, shares = fits.shares(fits(eta=eta)[1])
        means.append(sum(shares.values()) / len(shares))
    assert means[1] > means[0] + 0.1


def test_separability_leaves_fewer_undecided_scores(fits):
    """F3: share of scores in [0.4, 0.6]; logged beside the flip rate and the quality at the switch."""
    values = {lam: fits(eta=1.0, lam=lam)[0].info["extra"]["routing"] for lam in (0.0, 0.5)}
    assert values[0.5]["undecided"] < values[0.0]["undecided"]
    assert 0 <= values[0.5]["flip_rate"] <= 1
    assert {"dev_soft", "dev_at_the_switch", "dev_adapted", "epsilon"} <= set(values[0.5])
    assert values[0.5]["dev_soft"]["sparsity"] == 0


def test_learned_router_beats_a_random_one_and_layers_differ(fits):
    """F12 and F16, at equal sparsity: random scores, as many experts per layer as the learned router runs."""
    model = fits(eta=20.0)[1]
    nll, shares = fits.shares(model)
    assert len({round(s, 4) for s in shares.values()}) > 1
    other = copy.deepcopy(model)
    for i, ffn in enumerate(conversion.ffns(other)):
        ffn.rule, ffn.routing = "topk", "random"
        ffn.k = max(1, round((1 - shares[f"{i}.down"]) * ffn.num_experts))
    assert nll < fits.shares(other)[0]


def test_the_dense_control_trains_as_long(fits):
    state, model = fits(control="dense")
    lte, _ = fits(eta=20.0)
    assert state.info["tokens"] == lte.info["tokens"] and not conversion.ffns(model)
