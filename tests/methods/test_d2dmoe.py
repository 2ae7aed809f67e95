"""D2DMoE and MoEfication: penalties, routers, fit and apply (docs/methods/d2dmoe.md, Faithfulness checks)."""

import copy

import pytest
import torch

from sparsebench import config
from sparsebench.config.compose import compose_all
from sparsebench.data.labelled import Labelled
from sparsebench.experts import conversion, routers
from sparsebench.experts.clustering import Grouping
from sparsebench.measure import quality, sparsity
from sparsebench.measure.quality import classification_quality, language_quality
from sparsebench.methods.d2dmoe import ActivationPenalty, hoyer, projection_width, regularise
from sparsebench.methods.moefication import activation_labels
from sparsebench.models import Loaded
from sparsebench.modules.expert_ffn import Router
from sparsebench.sites import find_blocks
from sparsebench.training.loop import Training, order, train
from tests.helpers import QUICK_TRAINING, built, tiny_images, tiny_model, tiny_vit, work


def method(name, train=3, router=30, **changes):
    node = compose_all([f"method={name}"])[0]["method"]
    node["train"] = None if train is None else {**node["train"], "steps": train, **QUICK_TRAINING}
    node["router"] = {**node["router"], "steps": router, **QUICK_TRAINING}
    if changes.pop("distil", None):
        node["distil"] = {**node["distil"], "steps": 3, **QUICK_TRAINING}
    return built("method", f"method={name}", **{**node, **changes})


def test_hoyer():
    """One-hot 1, constant F, zero 0, scale-free, gradient orthogonal to a."""
    one = torch.zeros(8, dtype=torch.float64)
    one[3] = -2.5
    assert float(hoyer(one)) == pytest.approx(1) and float(hoyer(torch.full((8,), 0.3))) == pytest.approx(8)
    assert float(hoyer(torch.zeros(8))) == 0
    a = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.testing.assert_close(hoyer(7 * a), hoyer(a))
    hoyer(a).sum().backward()
    assert float((a.grad * a.detach()).sum(-1).abs().max()) < 1e-9


def test_regularisers_by_their_formulas():
    z = torch.tensor([[-12.0, -9.0, 1.0, 2.0]])
    a = z.relu()
    assert float(regularise("l1", z, a)) == 3 and float(regularise("hoyer", z, a)) == pytest.approx(9 / 5)
    assert float(regularise("l1_clamped", z, a)) == 0 + 1 + 11 + 12
    assert float(regularise("hoyer_clamped", z, a)) == pytest.approx(24**2 / (1 + 121 + 144))


def test_width_of_a_distilled_projection():
    h = projection_width(768, 1.0)
    assert h == 384 and h * (2 * 768 + 1) + 768 == 590_976 and 768 * 768 + 768 == 590_592


def penalty_on(model, actual, alpha=1.0, ramp=0.5):
    return ActivationPenalty(model, actual, "hoyer", alpha, 100, ramp)


def test_groups_are_averaged_apart_and_padding_counts_nowhere():
    model = tiny_model()
    actual = conversion.convert(model, 16, "relu")
    actual[1].site = "1.q"  # stands for an attention MLP
    penalty = penalty_on(model.train(), actual)
    rows = torch.arange(24).view(2, 12)
    seen = {}
    hooks = [f.register_forward_hook(lambda m, a, y: seen.__setitem__(m.site, m.hidden(a[0])[1])) for f in actual]
    model(input_ids=rows, use_cache=False)
    assert float(penalty.value()) == pytest.approx(float(sum(hoyer(a).mean() for a in seen.values())), rel=1e-5)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    model(input_ids=rows, attention_mask=mask, use_cache=False)
    expected = sum(hoyer(a)[mask.bool()].mean() for a in seen.values())
    assert float(penalty.value()) == pytest.approx(float(expected), rel=1e-5)
    assert penalty.coefficient(0) == pytest.approx(1 / 50) and penalty.coefficient(49) == penalty.coefficient(99) == 1
    assert penalty.stats()["zeros"] > 0.2
    model(input_ids=rows, attention_mask=mask, use_cache=False)
    real = [float((a == 0)[mask.bool()].float().mean()) for a in seen.values()]
    assert penalty.stats()["zeros"] == pytest.approx(sum(real) / 2, abs=1e-6)  # logged zeros, too, are of tokens only
    for hook in hooks:
        hook.remove()
    penalty.remove()


def test_penalty_makes_activations_sparser(data, tmp_path):
    zeros = {}
    for alpha in (0.0, 0.05):
        model = copy.deepcopy(tiny_model()).requires_grad_(True)
        actual = conversion.convert(model, 16, "relu")
        model.requires_grad_(True)
        penalty = penalty_on(model, actual, alpha, 0.1)
        node = compose_all(["method=d2dmoe"])[0]["method"]["train"]
        settings = config.build({**node, "steps": 25, **QUICK_TRAINING, "lr": 3e-3}, "train", [], Training)
        train(model, data.fit.rows, settings, folder=tmp_path / str(alpha), seed=0, penalty=penalty)
        penalty.remove()
        total = []

        def see(ffn, x, z, a, x1, total=total):
            total.append(float((a == 0).float().mean()))

        with torch.no_grad(), conversion.watching(actual, see):
            model(input_ids=data.dev.rows, use_cache=False)
        zeros[alpha] = sum(total) / len(total)
    assert zeros[0.05] > zeros[0.0] + 0.05


@pytest.mark.parametrize("name", ["d2dmoe", "moefication"])
def test_router_training_changes_routers_only(name, data, tmp_path):
    """All other tensors stay bitwise equal."""
    chosen = method(name, train=None, router=5)
    model = tiny_model()
    actual = conversion.convert(model, chosen.experts.size, chosen.activation)
    for ffn in actual:
        ffn.router = routers.random_router(64, 8, ffn.num_experts, torch.Generator().manual_seed(0), outer="abs")
    before = {k: v.clone() for k, v in model.named_parameters()}
    label = activation_labels if name == "moefication" else type(actual[0]).norms
    routers.fit_routers(model, actual, label, torch.nn.functional.mse_loss, data, chosen.router, work(tmp_path))
    after = dict(model.named_parameters())
    changed = {k for k in after if not torch.equal(after[k], before[k])}
    assert changed and all(".router." in k for k in changed)
    assert not any(p.requires_grad for p in model.parameters())


class Padded:
    """Texts of 5 to 11 tokens whose padding is loud: id 319 repeated."""

    unit, classes = "texts", 2

    def __len__(self):
        return 12

    def __getitem__(self, rows):
        ids, mask = torch.full((len(rows), 12), 319), torch.zeros(len(rows), 12, dtype=torch.int64)
        for i, row in enumerate(rows.tolist()):
            length = 5 + row % 7
            ids[i, :length], mask[i, :length] = torch.arange(length) + row, 1
        return Labelled({"input_ids": ids, "attention_mask": mask}, torch.zeros(len(rows), dtype=torch.int64))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_labels_are_float32_and_of_real_tokens(precision, tmp_path):
    """Whatever precision the routers train in, labels are those of a float32 pass over tokens that are no padding."""
    model, seen = tiny_model(), []
    actual = conversion.convert(model, 16, "relu")
    for ffn in actual:
        ffn.router = routers.random_router(64, 8, ffn.num_experts, torch.Generator().manual_seed(0), outer="abs")
    plain = copy.deepcopy(model)

    def label(ffn, x1):
        seen.append((ffn.site, x1, ffn.norms(x1)))
        return seen[-1][2]

    node = compose_all(["method=d2dmoe"])[0]["method"]["router"]
    settings = config.build(
        {**node, "steps": 1, **QUICK_TRAINING, "warmup": 0, "precision": precision}, "t", [], Training
    )
    data = type("Data", (), {"fit": Padded()})
    routers.fit_routers(model, actual, label, torch.nn.functional.mse_loss, data, settings, work(tmp_path))
    batch, expected = Padded()[order(12, 0, 0)[:8]], []

    def see(ffn, x, z, a, x1):
        expected.append(ffn.norms(x1)[batch.inputs["attention_mask"].bool()])

    with torch.no_grad(), conversion.watching(conversion.ffns(plain), see):
        quality.logits(plain, batch.inputs)
    assert len(seen) == 2 and all(x1.dtype == torch.float32 for _, x1, _ in seen)
    for (_, _, labels), right in zip(seen, expected, strict=True):
        torch.testing.assert_close(labels, right, rtol=1e-4, atol=1e-5)


def test_norms_ignore_autocast():
    ffn = conversion.convert(tiny_model(), 16, "relu")[0]
    x1 = torch.randn(64, 160)
    plain = ffn.norms(x1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ffn.norms(x1), plain)


def test_moefication_labels():
    actual = conversion.convert(tiny_model(), 16, "relu")[0]
    x1 = torch.randn(2, 3, 160)
    sums = x1.abs().view(2, 3, 10, 16).sum(-1)
    torch.testing.assert_close(activation_labels(actual, x1), sums / sums.max())


def test_the_original_router_starts_from_cluster_means(data, tmp_path, monkeypatch):
    """V1 = mean of each expert's rows of length 1 in their new order, V2 = identity; before training the router already
    ranks an expert first for a token that looks like its rows."""
    begun, right = [], routers.fit_routers

    def watched(module, actual, *rest):
        begun.extend((ffn, ffn.router.first.detach().clone(), ffn.router.second.detach().clone()) for ffn in actual)
        return right(module, actual, *rest)

    monkeypatch.setattr(routers, "fit_routers", watched)
    chosen = method(
        "moefication", train=None, router=2, variant="original", experts={"size": 16, "by": "kmeans", "rounds": 2}
    )
    chosen.fit(Loaded(tiny_model(), None, {}), data, work(tmp_path))
    assert len(begun) == 2
    for ffn, first, second in begun:
        rows = ffn.first.detach() / ffn.first.detach().norm(dim=1, keepdim=True)
        means = torch.stack([rows[16 * e : 16 * (e + 1)].mean(0) for e in range(10)])
        torch.testing.assert_close(first, means)
        assert torch.equal(second, torch.eye(10))
        start = Router(means, torch.eye(10), **chosen.kind_of_router())
        tokens = means / means.norm(dim=1, keepdim=True)
        expected = (tokens @ means.t()).tanh()  # tokens of length 1, tanh between, identity after it
        torch.testing.assert_close(start(5 * tokens), expected)
        assert (expected.argmax(1) == torch.arange(10)).float().mean() >= 0.8


def test_kept_experts_are_rounded_not_truncated():
    model = tiny_model()
    (ffn, *_) = conversion.convert(model, 16, "relu")  # 10 experts
    for keep, count in ((0.29, 3), (0.01, 1), (1.0, 10)):
        routers.harden(model, "topk", 0.0, keep=keep)
        assert ffn.k == count


@pytest.mark.parametrize("name", ["d2dmoe", "moefication"])
def test_a_fit_trains_routers_on_the_methods_own_labels(name, data, tmp_path, monkeypatch):
    """D2DMoE: norms of the experts' outputs. MoEfication: sums of activations, over the largest of the batch."""
    given, right = {}, routers.fit_routers

    def watched(module, actual, label, loss, *rest):
        given.update(label=label, loss=loss)
        return right(module, actual, label, loss, *rest)

    monkeypatch.setattr(routers, "fit_routers", watched)
    method(name, train=None, router=2).fit(Loaded(tiny_model(), None, {}), data, work(tmp_path))
    ffn, x1 = conversion.convert(tiny_model(), 16, "relu")[0], torch.randn(2, 3, 160)
    sums = x1.abs().view(2, 3, 10, 16).sum(-1)
    outputs = torch.einsum("btei,eid->bted", x1.view(2, 3, 10, 16), ffn.last.detach().view(10, 16, 64))
    expected = outputs.norm(dim=-1) if name == "d2dmoe" else sums / sums.max()
    torch.testing.assert_close(given["label"](ffn, x1), expected, rtol=1e-4, atol=1e-5)
    binary = torch.nn.functional.binary_cross_entropy_with_logits
    assert given["loss"] is (torch.nn.functional.mse_loss if name == "d2dmoe" else binary)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(method, data, state) of D2DMoE on the tiny model, fitted once."""
    from tests.helpers import TEXT, Rows, tiny_tokenizer

    ids = torch.tensor(tiny_tokenizer()(TEXT)["input_ids"])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)

    class Data:
        fit, dev, test = Rows(windows[:64]), Rows(windows[64:80]), Rows(windows[80:110])

    chosen = method("d2dmoe", train=20, router=80, experts={"size": 8, "by": "kmeans", "rounds": 3})
    folder = tmp_path_factory.mktemp("d2dmoe")
    return chosen, Data, chosen.fit(Loaded(tiny_model(), None, {}), Data, work(folder))


def scored(trained, tmp_path, rule, value, keep=None, routing="trained"):
    """(perplexity, share of experts skipped) of the fitted model under another rule."""
    chosen, data, state = trained
    model = chosen.apply(tiny_model(), state, work(tmp_path))
    routers.harden(model, rule, value, keep=keep, routing=routing)
    quality, counters = language_quality(model, data.test, None, 8)
    actual = sparsity.summarise(model, counters)
    return quality["nll"], sum(s.sparsity for s in actual.values()) / len(actual)


def test_oracle_beats_the_trained_router_beats_a_random_one(trained, tmp_path):
    """At equal k. The oracle of norms, through a rule that keeps k: topk ranks by sums, as MoEfication's oracle does."""
    nll = {r: scored(trained, tmp_path, "topk", 0.0, keep=0.3, routing=r)[0] for r in ("oracle", "trained", "random")}
    assert nll["oracle"] <= nll["trained"] + 0.02 and nll["trained"] < nll["random"]


def test_sparsified_base_beats_unsparsified_at_equal_macs(data, tmp_path):
    """Both fine-tuned for as many steps, the same experts per token by the true norms' order: what the penalty is for."""
    nll = {}
    for alpha in (0.0, 0.02):
        chosen = method(
            "d2dmoe", train=60, router=2, alpha=alpha, ramp=0.2, experts={"size": 8, "by": "kmeans", "rounds": 3}
        )
        chosen.train.lr = 2e-3
        state = chosen.fit(Loaded(tiny_model(), None, {}), data, work(tmp_path / str(alpha)))
        model = chosen.apply(tiny_model(), state, work(tmp_path))
        routers.harden(model, "topk", 0.0, keep=0.15, routing="oracle")
        nll[alpha] = language_quality(model, data.test, None, 8)[0]["nll"]
    assert nll[0.02] < nll[0.0]


def test_sparsity_rises_with_tau_without_fitting_again(trained, tmp_path):
    shares = [scored(trained, tmp_path, "max", tau)[1] for tau in (0.0, 0.1, 0.4, 1.0)]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == pytest.approx(1 - 1 / 20)
    assert {"tau", "select", "routing"} == set(trained[0].operating_point)


def test_the_neutral_tau_is_the_sparsified_dense_model(trained, tmp_path):
    chosen, data, state = trained
    model = chosen.apply(tiny_model(), state, work(tmp_path))
    rows = data.test.rows[:2]
    with torch.no_grad():
        routers.harden(model, "max", 0.0)
        all_on = model(input_ids=rows, use_cache=False).logits
        for ffn in conversion.ffns(model):
            ffn.mode = "dense"
        torch.testing.assert_close(all_on, model(input_ids=rows, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_attention_projections_become_experts_of_a_vision_transformer(tmp_path):
    """Distilled MLPs at q, k, v and o; routers and clusters of their own; counted per site; tau = 0 runs all."""
    chosen = method(
        "d2dmoe", train=3, router=3, projections=["q", "k", "v", "o"], projection_experts=4, distil=True,
        experts={"size": 8, "by": "kmeans", "rounds": 2},
    )  # fmt: skip
    data, dense = tiny_images(), tiny_vit()
    sites = {s.name for b in find_blocks(dense) for s in b.sites.values()}
    state = chosen.fit(Loaded(dense, None, {}), data, work(tmp_path))
    model = chosen.apply(tiny_vit(), state, work(tmp_path))
    actual = conversion.ffns(model)
    assert {f.site for f in actual} == {f"{i}.{r}" for i in (0, 1) for r in ("q", "k", "v", "o", "ffn")}
    _, counters = classification_quality(model, data.test, None, 8)
    measured = sparsity.summarise(model, counters)
    assert set(measured) == sites
    costs = {k: v for f in actual for k, v in f.costs(measured).items()}
    assert costs["0.q"].dense_macs == 32 * 32 and costs["0.q"].overhead_macs == 128 * (32 + 4)
    assert costs["0.fc1"].dense_macs == 32 * 64


def test_distillation_imitates_the_projections(tmp_path):
    """More steps, smaller error; the base model is not touched."""
    data, model = tiny_images(), tiny_vit()
    before = copy.deepcopy(model.state_dict())
    losses = {}
    for steps in (2, 100):
        chosen = method(
            "d2dmoe", projections=["q"], distil=True, projection_experts=4, projection_dropout=0.0, projection_alpha=0.0
        )
        chosen.distil.steps, chosen.distil.lr = steps, 1e-2
        students = chosen.students(model, torch.Generator().manual_seed(0))
        history, *_ = chosen.distilled(model, students, data, work(tmp_path / str(steps)))
        losses[steps] = history.rows[-1]["fit/distil/loss"]
    assert losses[100] < 0.5 * losses[2]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=d2dmoe", "method.tau=1.5"], r"method.tau must be a number in \[0, 1\], got 1.5"),
        (
            ["method=d2dmoe", "method.experts.size=7"],
            "method.experts.size must divide the 768 neurons of an FFN, got 7",
        ),
        (["method=d2dmoe", "method.activation=null"], "method.regulariser must be hoyer_clamped or l1_clamped where"),
        (["method=d2dmoe", "method.projections=[q]"], r"method.projections must be \[\] for models of kind language"),
        (["method=moefication", "method.keep=0"], r"method.keep must be a number in \(0, 1\], got 0"),
        (["method=lte", "model=lenet5"], "method=lte takes transformers, e.g. model=vit-tiny, got model=lenet5"),
        (["method=lte", "method.train=null"], "method.adapt must be null exactly where train is"),
        (["method=lte", "eval.neurons.enabled=true"], "eval.neurons.enabled must be false with method=lte"),
    ],
)
def test_bad_settings_are_one_clear_line(overrides, message):
    with pytest.raises(config.ConfigError, match=message):
        config.build_settings(compose_all(overrides)[0])


def test_grouping_is_a_setting():
    assert Grouping(size=8, by="random", rounds=1).by == "random"
