"""The top-k family: each faithfulness check of its specification, and the two sparse forms of a model."""

import pytest
import torch
import transformers
from torch import nn

from sparsebench import config, kernels
from sparsebench.config.compose import compose_all
from sparsebench.measure import quality, sparsity
from sparsebench.methods import topk as topk_method
from sparsebench.models.language import Loaded
from sparsebench.modules.activations import StatisticalTopK, TopK, topk, topk_mask
from sparsebench.modules.topk_linear import TopKLinear, TopKTraining, kept_count
from sparsebench.records.state import State
from tests.helpers import KINDS, tiny_model, tiny_tokenizer, work

data, logits = KINDS["language"].data, KINDS["language"].logits

CPU_KERNELS = [n for n in kernels.names() if kernels.device_of(n) != "cuda"]
QUICK = [
    "method.train.steps=4", "method.train.warmup=1", "method.train.precision=no", "method.train.log_every=2",
    "method.probe_sequences=8",
]  # fmt: skip


def build(*overrides):
    return config.build_settings(compose_all(["method=topk", "hardware=cpu", *QUICK, *overrides])[0]).method


def fitted(method, folder):
    return method.fit(Loaded(tiny_model(), tiny_tokenizer(), {}), data(), work(folder))


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [None, 8])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_exactly_k_and_the_largest(k, block):
    """Check 1: ties and all-zero groups included; kept values keep their bits."""
    size = block or 24
    for z in (rand(5, 24), torch.zeros(2, 24), torch.ones(2, 24), torch.tensor([[0.0, 1.0] * 12])):
        mask = topk_mask(z.abs(), k, block)
        groups, scores = mask.unflatten(-1, (-1, size)), z.abs().unflatten(-1, (-1, size))
        assert (groups.sum(-1) == min(k, size)).all()
        kept = torch.where(groups, scores, torch.inf).amin(-1)
        dropped = torch.where(groups, -torch.inf, scores).amax(-1)
        assert (kept >= dropped).all()
        assert torch.equal(topk(z, mask)[mask], z[mask]) and not topk(z, mask)[~mask].any()
    assert topk_mask(torch.ones(1, 6), 2).tolist() == [[True, True, False, False, False, False]]  # lowest index wins


def test_k_of_the_whole_group_is_the_identity():
    """Check 2, with the gradient; and permuting the group permutes the output."""
    z = rand(3, 12).requires_grad_(True)
    for backward in ("mask", "ste"):
        y = topk(z, topk_mask(z.detach().abs(), 12), backward)
        assert torch.equal(y, z)
        (gradient,) = torch.autograd.grad(y.square().sum(), z)
        torch.testing.assert_close(gradient, 2 * z.detach())
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    act = TopK("silu", 4)
    assert torch.equal(act(z[:, order]), act(z)[:, order])


def test_spatial_groups_keep_the_same_count_in_every_channel():
    """Check 2, shape variant: one image and channel is a group; permuting channels commutes."""
    z = rand(2, 5, 4, 6).relu()
    mask = topk_mask(z.flatten(2).abs(), kept_count(0.2, 24)).view_as(z)
    assert (mask.sum((2, 3)) == 5).all()
    order = torch.randperm(5)
    again = topk_mask(z[:, order].flatten(2).abs(), 5).view_as(z)
    assert torch.equal(again, mask[:, order])


def test_gradients():
    """Check 3: mask stops dropped entries; STE gives the dense input gradient and a weight gradient from the sparse input."""
    x, upstream = rand(4, 10).requires_grad_(True), rand(4, 6, seed=1)
    dense = nn.Linear(10, 6)
    (full,) = torch.autograd.grad(dense(x), x, upstream)
    for backward in ("mask", "ste"):
        sparse = TopKTraining(dense, 3, backward=backward)
        dense.zero_grad()
        (gradient,) = torch.autograd.grad(sparse(x), x, upstream, retain_graph=True)
        sparse(x).backward(upstream)
        mask = topk_mask(x.detach().abs(), 3)
        torch.testing.assert_close(gradient, full if backward == "ste" else full * mask)
        torch.testing.assert_close(dense.weight.grad, upstream.t() @ (x.detach() * mask))


def test_one_token_never_moves_anothers_mask():
    """Check 4: per token; group=layer does."""
    z = rand(1, 4, 20)
    other = z.clone()
    other[0, 0] = 100 * rand(20, seed=2).abs()
    token, layer = TopK("relu", 5), TopK("relu", 5, group="layer")
    assert torch.equal(token(z)[0, 1:], token(other)[0, 1:])
    assert not torch.equal(layer(z)[0, 1:], layer(other)[0, 1:])
    assert int(layer.keep(z, z.relu()).sum()) == 20


def test_statistical_topk_count():
    """Check 5."""
    f, k = 14336, 1146
    y = StatisticalTopK("relu", k / f)(rand(64, f))
    assert float((y != 0).sum(-1).float().mean()) == pytest.approx(k, rel=0.01)
    assert (y >= 0).all()
    z = rand(1, 200).double()
    act = StatisticalTopK("gelu_pytorch_tanh", 0.2).double()
    steps = [act(z + e * rand(1, 200, seed=3).double()) for e in (0.0, 1e-4)]
    assert float((steps[1] - steps[0]).abs().max()) < 1e-3  # continuous
    assert torch.equal(StatisticalTopK("gelu", 1.0)(z), torch.nn.functional.gelu(z))


@pytest.mark.parametrize("kernel", CPU_KERNELS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("options", [{}, {"block": 8}, {"rescale": True}])
def test_gathered_equals_masked(kernel, dtype, tolerance, options):
    """Check 6: the kernel of a one-token call against the dense product of the sparse input."""
    linear, x = nn.Linear(64, 48).to(dtype), rand(1, 1, 64).to(dtype)
    sparse = TopKLinear(linear, "0.q", 3 if options.get("block") else 16, kernel=kernel, **options)
    kept = torch.where(sparse.keep(x), x, 0)
    if options.get("rescale"):
        kept = kept * (x.norm() / kept.norm())
    expected = kept.double() @ linear.weight.double().t() + linear.bias.double()
    with torch.no_grad():
        assert float((sparse(x) - expected).norm()) <= tolerance * float(expected.norm())
        assert float((sparse(x.expand(2, 3, 64))[1, 2] - expected[0, 0]).norm()) <= tolerance * float(expected.norm())


def test_overall_sparsity_of_the_papers_rows():
    """Check 7 and docs/methods/metrics.md: Q-Sparse's Mistral rows from their per-group figures; 23.1 is printed as 23.0 there."""
    d, f, kv = 4096, 14336, 1024
    weights = {"qkv": d * (d + 2 * kv), "o": d * d, "gate": d * f, "up": d * f, "down": d * f}
    for row, expected in (
        ((51.4, 50, 50, 50, 80), 58.2),
        ((42, 40, 40, 40, 60.4), 45.7),
        ((12.3, 0, 10.3, 10.3, 79.3), 28.3),
        ((0.1, 0, 0.1, 0.1, 85.5), 23.1),
    ):
        assert sparsity.model_wide(dict(zip(weights, row, strict=True)), weights) == pytest.approx(expected, abs=0.1)


def test_k_is_rounded_not_truncated():
    assert kept_count(0.29, 100) == 29 and kept_count(0.001, 100) == 1
    assert build("method.keep=0.29").k(100) == 29 and build("method.keep=0.29", "method.count=down").k(100) == 28


def test_annealing_ends_at_k():
    method = build("method.keep=0.1", "method.anneal=0.5", "method.train.steps=40")
    values = [method.annealed(step, 160) for step in range(40)]
    assert values[0] > 140 and values[18] > 16 and values[19:] == [16] * 21
    assert values == sorted(values, reverse=True)
    assert build("method.anneal=0").annealed(0, 160) == 16


@pytest.mark.parametrize("variant", ["lazy", "qsparse"])
def test_training_runs_with_the_annealed_k(variant, tmp_path, monkeypatch):
    """The k of every sparse module at every step, as the training sets it before the step."""
    given = (f"method.variant={variant}", "method.activation=relu", "method.keep=0.25", "method.anneal=1.0")
    method, seen, right = build(*given), [], topk_method.train

    def watched(module, *arguments, before_step, **named):
        held = [m for m in module.modules() if isinstance(m, (TopK, TopKTraining))]

        def noted(step):
            before_step(step)
            seen.append([m.count for m in held])

        return right(module, *arguments, before_step=noted, **named)

    monkeypatch.setattr(topk_method, "train", watched)
    fitted(method, tmp_path)
    sizes = [160, 160] if variant == "lazy" else [64, 64, 64, 64, 64, 64, 160] * 2
    assert seen == [[method.annealed(step, size) for size in sizes] for step in range(4)]
    assert seen[0][-1] == 130 and seen[-1][-1] == 40


@pytest.mark.parametrize("variant", ["lazy", "stat", "qsparse"])
def test_trained_state_rebuilds_the_sparse_model(variant, tmp_path):
    extra = {"qsparse": ["method.activation=relu2", "method.backward=ste"], "stat": ["method.activation=gelu"]}
    method = build(f"method.variant={variant}", "method.keep=0.25", *extra.get(variant, []))
    state = fitted(method, tmp_path)
    model = method.apply(tiny_model(), state, work(tmp_path))
    _, counters = quality.language_quality(model, data().test, None, 4)
    actual = sparsity.summarise(model, counters)
    assert len(actual) == (14 if variant == "qsparse" else 4)
    for name, share in actual.items():
        low = 0.60 if variant == "stat" else 0.745
        assert low <= share.sparsity, name  # ReLU may leave fewer than k
        assert variant == "lazy" or share.sparsity <= 0.9
    never = [s["never_selected"] for s in state.info["extra"]["selection_on_fit"].values()]
    assert all(0 <= n < 1 for n in never)
    assert state.info["tokens"] == 4 * 8 * 32


def test_training_and_use_give_the_same_logits(tmp_path):
    """The trained form (masks, straight-through) and the form in use (kernels) are one function."""
    for overrides in (["method.variant=lazy"], ["method.variant=qsparse", "method.activation=relu2"]):
        method = build("method.keep=0.3", "method.train=null", *overrides)
        training, use = tiny_model(), tiny_model()
        method.swap(training, None)
        method.swap(use, "masked_dense")
        rows = data().test.sequences(3)
        torch.testing.assert_close(logits(training, rows), logits(use, rows), rtol=1e-5, atol=1e-5)


def test_measured_sparsity_of_qsparse_is_the_one_asked_for(tmp_path):
    method = build("method.variant=qsparse", "method.train=null", "method.keep=0.4")
    model = method.apply(tiny_model(), fitted(method, tmp_path), work(tmp_path))
    _, counters = quality.language_quality(model, data().test, None, 4)
    shares = sparsity.summarise(model, counters)
    assert method.requested == pytest.approx(0.6)
    assert all(s.sparsity == pytest.approx(0.6, abs=0.01) for s in shares.values())


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["method.variant=stat", "method.block=32"], "method.block must be null with variant=stat"),
        (["method.variant=qsparse", "method.group=layer"], "method.group=layer needs variant=lazy and block=null"),
        (["method.rescale=true"], "method.rescale must be false with variant=lazy, got true"),
        (["method.keep=0"], "method.keep must be a number in (0, 1], got 0"),
    ],
)
def test_bad_settings(overrides, message):
    with pytest.raises(config.ConfigError) as error:
        build(*overrides)
    assert any(message in line for line in error.value.problems), error.value.problems


def test_qsparse_has_a_file_of_its_own():
    method = config.build_settings(compose_all(["method=qsparse", "hardware=cpu"])[0]).method
    assert (method.variant, method.backward, method.activation, method.anneal) == ("qsparse", "ste", "relu2", 0.0)


def test_zeros_among_the_largest_are_counted_as_zeros():
    """Of 10 inputs 7 are exactly 0 and k = 6: three are kept, 0.7 are dropped, whatever the mask of k says."""
    layer, x = TopKLinear(nn.Linear(10, 4), "0.q", 6), torch.zeros(2, 5, 10)
    x[..., :3] = rand(2, 5, 3)
    with sparsity.counting(layer) as counters:
        y = layer(x)
    assert sparsity.summarise(layer, counters)["0.q"].sparsity == pytest.approx(0.7)
    torch.testing.assert_close(y, nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("variant", ["lazy", "qsparse"])
def test_gemma_names_its_activation_otherwise(variant, tmp_path):
    """Gemma-2 has hidden_activation and no hidden_act; at keep=1 its own activation must come back."""
    shape = transformers.Gemma2Config(
        vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model, rows = transformers.Gemma2ForCausalLM(shape).eval().requires_grad_(False), torch.randint(0, 320, (2, 12))
    expected = logits(model, rows)
    method = build(f"method.variant={variant}", "method.keep=1.0", "method.activation=null", "method.train=null")
    torch.testing.assert_close(logits(method.apply(model, State(), work(tmp_path)), rows), expected)
