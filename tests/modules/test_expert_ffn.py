"""Experts, routers and rules (docs/methods/d2dmoe.md and lte.md), every kernel against masked dense."""

import copy
import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsebench import kernels
from sparsebench.engines import check
from sparsebench.experts import clustering, conversion, routers
from sparsebench.experts.clustering import Grouping
from sparsebench.measure import latency, macs, sparsity
from sparsebench.modules.base import MANY
from sparsebench.modules.expert_ffn import ExpertFFN, Router, select
from sparsebench.sites import find_blocks
from tests.helpers import accounted, tiny_model
from tests.kernel_checks import FFNS, backend, check_fp32, check_half, check_router, model_of, scalar, tensors, x_of

CPU = [n for n in kernels.names() if kernels.device_of(n) != "cuda" and hasattr(kernels.load(n), "expert_ffn")]

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 before Python starts"
)


def grouping(size=16, by="kmeans", rounds=5):
    return Grouping(size=size, by=by, rounds=rounds)


def ffn_of(num_experts=6, activation="gelu", **arguments):
    actual = ExpertFFN(tensors(**arguments), activation, num_experts, site="0.ffn", dense_macs={"0.fc1": 1, "0.fc2": 1})
    generator = torch.Generator().manual_seed(5)
    actual.router = routers.random_router(actual.first.shape[1], 10, num_experts, generator, outer="abs").to(
        actual.first
    )
    return actual.eval()


def as_float64(ffn):
    return copy.deepcopy(ffn).double()


@pytest.mark.parametrize("by", ["kmeans", "random"])
def test_experts_have_exactly_equal_sizes_and_the_seed_decides(by):
    rows = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
    first = clustering.labels(rows, 6, grouping(by=by), seed=3)
    assert torch.bincount(first, minlength=6).tolist() == [16] * 6
    assert torch.equal(first, clustering.labels(rows, 6, grouping(by=by), seed=3))
    if by == "random":
        assert not torch.equal(first, clustering.labels(rows, 6, grouping(by=by), seed=4))
    with pytest.raises(ValueError, match="7 equal experts can't be made of 96 neurons"):
        clustering.labels(rows, 7, grouping(by=by), seed=0)


def test_clustering_finds_planted_experts_whatever_the_length_of_the_rows():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 12, generator=generator)
    truth = torch.arange(40) % 5
    lengths = 10 ** (4 * torch.rand(40, 1, generator=generator) - 2)  # 0.01 to 100: most rows lie near the origin
    rows = (centres[truth] + 0.05 * torch.randn(40, 12, generator=generator)) * lengths
    actual = clustering.labels(rows, 5, grouping(), seed=0)
    assert all(len(actual[truth == e].unique()) == 1 for e in range(5))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_all_experts_equal_dense(kind, dtype, limit):
    """Conversion and reordering, all experts on: relative error within 1e-5 (fp32), 1e-10 (fp64); same for tau=0, k=E."""
    model = tiny_model(kind).to(dtype)
    block = find_blocks(model)[0]
    path = block.sites["down" if kind == "llama" else "fc2"].path.rpartition(".")[0]
    own, x = copy.deepcopy(model.get_submodule(path)), x_of(2, 5, d=64, dtype=dtype)
    (actual, *_) = conversion.convert(model, 16, None)
    actual.requires_grad_(False)
    expected = own(x)

    def error():
        return float((actual(x) - expected).abs().max() / expected.abs().max())

    assert error() <= limit
    clustering.group([actual], grouping(), 0, lambda row: None)
    assert error() <= limit
    actual.router = routers.random_router(64, 8, actual.num_experts, torch.Generator().manual_seed(0), outer="abs")
    for rule, value, keep in (("max", 0.0, None), ("topk", 0.0, 1.0), ("cumshare", 1.0, None), ("above", 0.0, None)):
        routers.harden(model_of(actual), rule, value, keep=keep)
        with torch.no_grad():
            assert error() <= limit, rule
        assert error() <= limit, rule  # with gradients on: the training path


def test_a_size_that_does_not_divide_is_one_clear_line():
    with pytest.raises(ValueError, match="method.experts.size must divide the 160 neurons of an FFN, got 7"):
        conversion.convert(tiny_model(), 7, None)


def test_output_bias_stands_once():
    """No expert: b2 exactly. One expert each, summed: (E - 1) b2 too many."""
    actual, x = ffn_of(), x_of(3)
    none = torch.zeros(3, 6, dtype=torch.bool)
    for name in CPU:
        y = kernels.load(name).expert_ffn(x, none, actual.first, actual.last, actual.activation, **actual.maps)
        assert torch.equal(y, actual.last_bias.expand(3, -1))


def permuted(actual, order):
    other = copy.deepcopy(actual)
    neurons = torch.arange(len(actual.first)).view(actual.num_experts, -1)[order].flatten()
    other.reorder(neurons)
    other.router.permute(order)
    return other


@pytest.mark.parametrize("rule, value", [("max", 0.5), ("cumshare", 0.6), ("above", 0.5), ("topk", 0.0)])
def test_order_of_neurons_and_of_experts_does_not_matter(rule, value):
    actual, x = ffn_of(gated=True), x_of(2, 7)
    routers.harden(model_of(actual), rule, value, keep=0.5)
    y = actual(x)
    within = torch.cat([torch.randperm(8) + 8 * e for e in range(6)])
    other = copy.deepcopy(actual)
    other.reorder(within)
    torch.testing.assert_close(other(x), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(permuted(actual, torch.randperm(6))(x), y, rtol=1e-4, atol=1e-5)


def test_dynamic_k_is_between_one_and_all_and_shrinks_with_tau():
    scores = torch.rand(50, 12, generator=torch.Generator().manual_seed(0))
    before = torch.ones(50, 12, dtype=torch.bool)
    for tau in (0.0, 0.1, 0.4, 0.7, 0.95, 1.0):
        keep = select(scores, "max", scalar(tau))
        assert int(keep.sum(1).min()) >= 1 and not (keep & ~before).any()
        assert torch.equal(keep, select(scores * 37.5, "max", scalar(tau)))  # R -> c R
        before = keep
    assert select(scores, "max", scalar(0)).all() and (select(scores, "max", scalar(1)).sum(1) == 1).all()


def test_experts_of_which_nothing_is_expected_are_not_run():
    """A layer that the sparsifying fine-tune silenced has R = 0 everywhere, and 0 >= tau 0 would run all of it."""
    scores = torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 1.0]])
    assert select(scores, "max", scalar(0.3)).tolist() == [[False] * 3, [False, True, True]]
    assert select(scores, "max", scalar(0)).all()
    assert select(scores, "cumshare", scalar(0.9)).tolist() == [[True, False, False], [False, True, True]]
    assert select(scores, "cumshare", scalar(1)).all()


def test_paper_tau_keeps_exact_ties():
    """The released code's 1 - tau drops them (docs/methods/d2dmoe.md, Traps)."""
    scores = torch.tensor([[1.0, 0.01, 0.009]])
    assert select(scores, "max", scalar(0.01)).tolist() == [[True, True, False]]


def test_cumulative_share():
    scores = torch.tensor([[5.0, 1.0, 3.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert select(scores, "cumshare", scalar(0.5))[0].tolist() == [True, False, False, False]
    assert select(scores, "cumshare", scalar(0.6))[0].tolist() == [True, False, True, False]
    assert select(scores, "cumshare", scalar(0))[1].tolist() == [True, False, False, False]  # at least one
    assert select(scores, "cumshare", scalar(1)).all()


def test_topk_keeps_exactly_k():
    scores = torch.randn(40, 9)
    assert (select(scores, "topk", scalar(0), 4).sum(1) == 4).all()
    assert (select(torch.zeros(3, 9), "topk", scalar(0), 4).sum(1) == 4).all()


def test_hard_mask_is_the_sign_of_the_logit():
    """LTE: tau = 0.5 means x . w > 0; a logit of exactly 0 is not selected; a token may select none."""
    logits = torch.tensor([[0.3, -0.2, 0.0], [-1.0, -2.0, -0.0]])
    assert select(logits, "above", scalar(0.5)).tolist() == [[True, False, False], [False, False, False]]
    assert torch.equal(select(logits, "above", scalar(0.7)), torch.sigmoid(logits) > 0.7)
    actual, x = ffn_of(), x_of(20)
    actual.router = routers.random_router(24, None, 6, torch.Generator().manual_seed(0))
    routers.harden(model_of(actual), "above", 0.5)
    assert torch.equal(actual.keep(x), x @ actual.router.first.t() > 0)


def test_gram_labels_are_direct_norms():
    actual, x = ffn_of(gated=True), x_of(5)
    x1 = actual.hidden(x)[2]
    direct = torch.stack([(x1.view(5, 6, 8)[:, e] @ actual.last[8 * e : 8 * e + 8]).norm(dim=-1) for e in range(6)], -1)
    torch.testing.assert_close(actual.norms(x1), direct, rtol=1e-4, atol=1e-6)


def test_oracle_error_is_bounded_by_the_skipped_norms():
    actual, x = as_float64(ffn_of()), x_of(2, 9, dtype=torch.float64)
    actual.routing = "oracle"
    norms, dense = actual.norms(actual.hidden(x)[2]), actual(x)
    for tau in (0.2, 0.6, 0.9):
        routers.harden(model_of(actual), "max", tau, routing="oracle")
        skipped = (norms * ~actual.keep(x)).sum(-1)
        assert ((actual(x) - dense).norm(dim=-1) <= skipped + 1e-12).all() and float(skipped.max()) > 0


def test_router_norms_are_never_negative_and_formulas_hold():
    generator = torch.Generator().manual_seed(0)
    v1, v2, x = torch.randn(7, 5, generator=generator), torch.randn(3, 7, generator=generator), x_of(11, d=5)
    router = Router(v1, v2, outer="abs")
    torch.testing.assert_close(router(x), ((x @ v1.t()).relu() @ v2.t()).abs())
    assert (router(x) >= 0).all() and router.num_products == 7 * (5 + 3)
    torch.testing.assert_close(Router(v1)(x), x @ v1.t())
    unit = x / x.norm(dim=1, keepdim=True)
    torch.testing.assert_close(Router(v1, v2, inner="tanh", normalise=True)(x), (unit @ v1.t()).tanh() @ v2.t())


FAST = [*(n for n in CPU if n != "masked_dense"), "cuda_triton"]


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("rows", [1, 3, 37])
@pytest.mark.parametrize("gated, activation", FFNS)
def test_kernels_equal_masked_dense(name, rows, gated, activation):
    """docs/methods/d2dmoe.md and docs/methods/lte.md: fp32, zero-expert and all-expert tokens, an expert with zero tokens."""
    check_fp32(name, rows, gated, activation)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("rows", [2, 20])
def test_kernels_in_16_bits(name, rows):
    """Triton's interpreter multiplies bfloat16 matrices wrongly (a plain tl.dot, too), so float16 stands in there."""
    check_half(name, rows, torch.float16 if name == "cuda_triton" else torch.bfloat16)


@pytest.fixture
def cuda_on_cpu(emulated, monkeypatch):
    """cuda_gather with its own host code, on CPU tensors: a GPU of 2 processors, small CTAs; checks shared memory."""
    from sparsebench.kernels import _nvrtc, cuda_gather
    from sparsebench.kernels.cuda_gather import Tuning

    def built(name, weight, tuning, shared):
        defines = {"WARPS": tuning.warps, "LOADS": tuning.loads, "WIDE": tuning.wide}
        defines |= {"BF16": 1} if weight.dtype == torch.bfloat16 else {}
        return emulated(**defines, HEAD_DIM=64, GROUP=1, SPLITS=1), name

    def launch(kernel, grid, threads, shared, arguments, overlap):
        library, name = kernel
        getattr(library, f"run_{name}")(*grid, shared, *(ctypes.byref(a) for a in arguments))
        assert library.count_overruns() == 0, f"{name} wrote past its shared memory"

    small = {"KEEP": Tuning(2, 2), "HIDDEN": Tuning(1, 2, 1, 1.0), "LAST": Tuning(1, 2, 1, 2.0)}
    for name, value in {**small, "PLAIN_HIDDEN": Tuning(2, 2, 1, 1.0), "built": built}.items():
        monkeypatch.setattr(cuda_gather, name, value)
    monkeypatch.setattr(cuda_gather, "processors", lambda device: 2)
    monkeypatch.setattr(cuda_gather, "cuda_experts", cuda_gather.run_experts)
    monkeypatch.setattr(cuda_gather, "cuda_expert_keep", cuda_gather.run_keep)
    monkeypatch.setattr(cuda_gather, "_workspaces", {})
    monkeypatch.setattr(_nvrtc, "launch", launch)
    return cuda_gather


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gated, activation", FFNS)
def test_cuda_kernels_equal_masked_dense(cuda_on_cpu, gated, activation, dtype):
    """One token; no, some, all experts; sizes that no tile divides; weights of other experts may be NaN; buffers stay."""
    reference, limit = kernels.load("masked_dense").expert_ffn, 2e-3 if dtype == torch.float16 else 1e-2
    for d, n, num_experts, size, bias in ((40, 24, 6, 8, True), (552, 264, 5, 3, True), (16, 8, 301, 1, False)):
        maps = tensors(d=d, f=num_experts * size, n=n, gated=gated, bias=bias, dtype=dtype)
        x, generator = x_of(1, 1, d=d, dtype=dtype), torch.Generator().manual_seed(2)
        for share in (0.0, 0.4, 1.0):
            keep = torch.rand(1, 1, num_experts, generator=generator) < share
            wide = {k: v.double() for k, v in maps.items()}
            expected = reference(x.double(), keep, wide.pop("first"), wide.pop("last"), activation, **wide)
            poisoned = {k: v.clone() for k, v in maps.items()}
            for key in poisoned.keys() - {"last_bias"}:
                poisoned[key].view(num_experts, size, -1)[~keep.flatten()] = float("nan")
            y = cuda_on_cpu.expert_ffn(x, keep, poisoned.pop("first"), poisoned.pop("last"), activation, **poisoned)
            assert y.shape == (1, 1, n) and y.dtype == dtype
            assert float((y - expected).norm()) <= limit * float(expected.norm())
            assert not any(t.any() for t in cuda_on_cpu._workspaces[x.device, n])


@pytest.mark.parametrize("router", [torch.float32, torch.float16])
def test_cuda_router_is_the_rule(cuda_on_cpu, router):
    """Rule `above` in the router's launch: tau = 0 and below keep all, 1 none, equality is not above."""
    for d, num_experts in ((24, 7), (1032, 70)):
        x = x_of(1, d=d, dtype=torch.float16)
        weight = torch.randn(num_experts, d, generator=torch.Generator().manual_seed(0)).to(router)
        weight[3] = 0
        for tau in (-1.0, 0.0, 0.3, 0.5, 0.8, 1.0):
            expected = select(x.double() @ weight.double().t(), "above", scalar(tau))
            assert torch.equal(cuda_on_cpu.expert_keep(x, weight, scalar(tau)), expected), tau


@interpreted
def test_triton_router_is_the_rule():
    check_router(torch.float32)


def test_routers_that_no_kernel_fuses_take_the_plain_way():
    """tanh, normalised inputs (MoEfication) and rules that rank go to torch; two maps never go to cuda_gather."""
    two = routers.random_router(24, 8, 6, torch.Generator().manual_seed(0))
    one = routers.random_router(24, None, 6, torch.Generator().manual_seed(0))
    assert two.rules() == ("above", "max") and one.rules() == ("above",)
    assert Router(two.first, two.second, inner="tanh").rules() == Router(one.first, normalise=True).rules() == ()
    assert Router(one.first, outer="abs").rules() == ()
    serving = lambda x, router: kernels.serving("cuda_gather", x, router.first, "expert_keep", router.second).__name__  # noqa: E731
    assert serving(x_of(3), two).endswith("cuda_triton") and serving(x_of(1), two).endswith("cuda_triton")
    assert serving(x_of(3), one).endswith("masked_dense")
    assert serving(x_of(1, dtype=torch.float16), one).endswith("cuda_gather")
    with pytest.raises(ValueError, match="cuda_gather serves"):
        kernels.load("cuda_gather").expert_keep(x_of(1), two.first, scalar(0.5), two.second)


def test_one_token_takes_the_fused_router_and_kernels(cuda_on_cpu, monkeypatch):
    """ExpertFFN in 16 bits: rule and product by cuda_gather, the same as masked dense; other calls go to other kernels."""
    served = []

    def noting(name, own):
        return lambda *a, **k: served.append(name) or own(*a, **k)

    for name in ("expert_ffn", "expert_keep"):
        monkeypatch.setattr(cuda_on_cpu, name, noting(name, getattr(cuda_on_cpu, name)))
    actual, x = ffn_of(gated=True, activation="silu", dtype=torch.float16), x_of(1, 1, dtype=torch.float16)
    actual.router = routers.random_router(24, None, 6, torch.Generator().manual_seed(0))
    routers.harden(model_of(actual), "above", 0.5)
    with torch.no_grad():
        expected = actual(x)
        actual.kernel_name = "cuda_gather"
        torch.testing.assert_close(actual(x), expected, rtol=1e-2, atol=1e-2)
    assert (
        served == ["expert_keep", "expert_ffn"]
        and actual.kernel(1) == "cuda_gather"
        and actual.kernel(MANY) == "cuda_triton"
    )


def test_what_the_cuda_kernels_can_not_serve_goes_to_the_next():
    served = lambda x, maps: kernels.serving("cuda_gather", x, maps["first"], "expert_ffn", maps["last"])  # noqa: E731
    half, name = torch.float16, lambda backend: backend.__name__.rpartition(".")[2]
    assert name(served(x_of(1, dtype=half), tensors(dtype=half))) == "cuda_gather"
    for x, maps in (
        (x_of(2, dtype=half), tensors(dtype=half)),
        (x_of(1), tensors()),
        (x_of(1, d=20, dtype=half), tensors(d=20, dtype=half)),
        (x_of(1, dtype=half), tensors(n=20, dtype=half)),
    ):
        assert name(served(x, maps)) == "cuda_triton"
        with pytest.raises(ValueError, match="cuda_gather (serves|needs)"):
            first, last = maps.pop("first"), maps.pop("last")
            kernels.load("cuda_gather").expert_ffn(x, torch.ones(1, 6, dtype=torch.bool), first, last, "relu", **maps)


def test_triton_kernels_through_the_interpreter():
    """The cases of this file that need TRITON_INTERPRET=1, in a process of their own."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        __file__,
        "-q",
        "-k",
        "cuda_triton or (test_triton and not through)",
        "-m",
        "not gpu",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0 and " skipped" not in done.stdout, done.stdout[-3000:]


@interpreted
@pytest.mark.parametrize("rows, num_experts", [(1, 1), (9, 5), (300, 70)])
def test_triton_groups_pairs_by_expert_then_token(rows, num_experts):
    from sparsebench.kernels import _triton_grouped

    keep = torch.rand(rows, num_experts, generator=torch.Generator().manual_seed(0)) < 0.4
    pairs = _triton_grouped.Pairs(keep.view(torch.uint8))
    tokens, ends = pairs.tokens, pairs.ends
    expected = keep.t().nonzero()
    assert torch.equal(tokens[: len(expected)].long(), expected[:, 1])
    for t, mine in enumerate(pairs.of_token.tolist()):
        wanted = (expected[:, 1] == t).nonzero().flatten().tolist()
        assert mine[: len(wanted) + 1] == [*wanted, -1]
    assert torch.equal(ends[:, -1].long(), keep.sum(0).cumsum(0))


@interpreted
@pytest.mark.parametrize("experts_there", [1, 7, 24])
def test_tiles_are_listed_once_each_by_their_place_in_the_text(experts_there):
    from sparsebench.kernels import _triton_grouped

    torch.manual_seed(experts_there)
    shares = torch.rand(experts_there) * (torch.rand(experts_there) > 0.2)  # unequal, some experts without tokens
    pairs = _triton_grouped.Pairs((torch.rand(700, experts_there) < shares).view(torch.uint8))
    order, most = pairs.listed(16)
    ends = pairs.ends[:, -1].tolist()
    tiles = [-(-(end - begin) // 16) for begin, end in zip([0, *ends], ends, strict=False)]
    wanted = sorted(((2 * b + 1) / (2 * n), e, b) for e, n in enumerate(tiles) for b in range(n))
    assert [divmod(int(code), most) for code in order[: sum(tiles)]] == [(e, b) for _, e, b in wanted]


@interpreted
@pytest.mark.parametrize("gated, pieces", [(False, 1), (True, 1), (True, 3)])
def test_triton_takes_several_tiles_per_program(gated, pieces, monkeypatch):
    """Uneven experts, several tiles of pairs, neurons, depth and outputs, none of which divides its size."""
    from sparsebench.kernels import _triton_grouped

    monkeypatch.setattr(_triton_grouped, "PARTS_BYTES", -(-70 * 4 * 36 * 4 // pieces))
    for name in ("HIDDEN", "GATED", "LAST", "DEEP"):
        monkeypatch.setattr(_triton_grouped, name, {4: _triton_grouped.Tiles(16, 16, 16, 4, 2, 1)})
    maps = tensors(d=40, f=4 * 20, n=36, gated=gated)
    x, keep = (
        x_of(70, d=40),
        torch.rand(70, 4, generator=torch.Generator().manual_seed(0)) < torch.tensor([1, 0.5, 0, 0.1]),
    )
    first, last = maps.pop("first"), maps.pop("last")
    expected = kernels.load("masked_dense").expert_ffn(x, keep, first, last, "silu", **maps)
    y = kernels.load("cuda_triton").expert_ffn(x, keep, first, last, "silu", **maps)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in CPU if n != "masked_dense"])
def test_one_token_reads_the_selected_experts_only(name):
    """Weights of unselected experts may be anything, even NaN."""
    maps = tensors(gated=True)
    x, keep = x_of(1), torch.tensor([[True, False, False, True, False, False]])
    poisoned = {k: v.clone() for k, v in maps.items()}
    for key in ("first", "up", "last"):
        poisoned[key].view(6, 8, -1)[~keep[0]] = float("nan")
    expected = kernels.load("masked_dense").expert_ffn(x, keep, maps.pop("first"), maps.pop("last"), "silu", **maps)
    served = kernels.load(name).expert_ffn
    torch.testing.assert_close(
        served(x, keep, poisoned.pop("first"), poisoned.pop("last"), "silu", **poisoned), expected, rtol=1e-4, atol=1e-5
    )


@interpreted
@pytest.mark.parametrize("rows", [1, 9])
def test_triton_reads_the_selected_experts_only(rows):
    served = backend("cuda_triton").expert_ffn
    maps = tensors()
    keep = torch.tensor([[True, False, False, True, False, False]]).expand(rows, -1)
    poisoned = {k: v.clone() for k, v in maps.items()}
    for key in ("first", "last"):
        poisoned[key].view(6, 8, -1)[~keep[0]] = float("nan")
    expected = kernels.load("masked_dense").expert_ffn(
        x_of(rows), keep, maps.pop("first"), maps.pop("last"), "relu", **maps
    )
    y = served(x_of(rows), keep, poisoned.pop("first"), poisoned.pop("last"), "relu", **poisoned)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_counts_and_macs():
    """Expert MACs sum to dense MACs; tau = 0 costs dense + routers; what was counted is what is charged."""
    model = tiny_model()
    dense = macs.dense_sites(model)
    total = sum(c.dense_macs for c in dense.values())
    actual = conversion.convert(model, 16, None)
    for ffn in actual:
        assert ffn.expert_macs * ffn.num_experts == sum(ffn.covers.values()) == 3 * 64 * 160
        ffn.router = routers.random_router(64, 8, 10, torch.Generator().manual_seed(0), outer="abs")
    rows, overhead = torch.arange(24).view(2, 12), 2 * 8 * (64 + 10)
    for tau in (0.0, 0.6):
        routers.harden(model, "max", tau, kernel=CPU[-1])
        kept = []
        hooks = [
            f.register_forward_hook(lambda m, a, y, kept=kept: kept.append(int(m.keep(a[0]).sum()))) for f in actual
        ]
        with sparsity.counting(model) as counters, torch.no_grad():
            model(input_ids=rows, use_cache=False)
        for hook in hooks:
            hook.remove()
        measured = sparsity.summarise(model, counters)
        assert set(measured) == {f"{i}.{r}" for i in (0, 1) for r in ("gate", "up", "down")}
        costs, _ = accounted(dense, model, measured, 8, True)
        outside = costs["parts"]["head"] + costs["parts"]["attention"]
        pairs = sum(kept) * actual[0].expert_macs / 24
        attention = total - 2 * 3 * 64 * 160
        assert costs["overhead"] == overhead
        assert costs["sparse"] - outside == pytest.approx(attention + pairs + overhead)
        if tau == 0:
            assert costs["sparse"] == pytest.approx(costs["dense"] + overhead) and costs["sparse"] > costs["dense"]


def test_router_shares_of_the_specifications():
    """docs/methods/d2dmoe.md and lte.md, Formulas: w(d + E)/(c d F), 1/64 and 1/96."""

    def share(d, f, experts_, width, maps):
        router = routers.random_router(d, width, experts_, torch.Generator().manual_seed(0))
        return 100 * router.num_products / (maps * d * f)

    assert share(768, 3072, 512, 128, 2) == pytest.approx(3.47, abs=0.005)
    assert share(768, 384, 64, 128, 2) == pytest.approx(18.1, abs=0.05)
    assert share(768, 3072, 128, 128, 2) == pytest.approx(2.43, abs=0.005)
    assert share(768, 3072, 768, 128, 2) == pytest.approx(4.17, abs=0.005)
    assert share(2048, 16384, 512, 512, 3) == pytest.approx(1.30, abs=0.005)
    assert share(2048, 16384, 4096, 512, 3) == pytest.approx(3.13, abs=0.005)
    assert share(4096, 11008, 344, None, 3) == pytest.approx(1.04, abs=0.005)
    assert share(1024, 4096, 128, None, 2) == pytest.approx(1.56, abs=0.005)


def test_llama_7b_costs_12_06_in_the_paper_unit():
    """docs/methods/lte.md: 2 FLOPs per MAC over attention projections and FFN of 32 layers, divided by 2**30."""
    import transformers

    shape = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(shape)
    sites = macs.dense_sites(model)
    assert round(2 * sum(c.dense_macs for c in sites.values()) / 2**30, 2) == 12.06
    ffn = sum(c.dense_macs for n, c in sites.items() if n.split(".")[1] in ("gate", "up", "down"))
    assert 2 * ffn / 2**30 == pytest.approx(8.0625)


def test_parity_and_nothing_skipped():
    """measure's hooks: each kernel against masked dense; thresholds at -1 keep every expert."""
    model = tiny_model()
    for ffn in conversion.convert(model, 16, None):
        ffn.router = routers.random_router(64, 8, 10, torch.Generator().manual_seed(0), outer="abs")
    routers.harden(model, "max", 0.8, kernel=CPU[0])
    step = lambda: model(input_ids=torch.tensor([[3]]), use_cache=False)  # noqa: E731
    with torch.no_grad():
        errors = check.parity(model, step)
        assert set(errors) == {"0.ffn", "1.ffn"} and max(errors.values()) < 1e-4
        ffn = conversion.ffns(model)[0]
        with latency.dial(model) as turn:
            turn(0.0)
            assert ffn.keep(x_of(1, 1, d=64)).all()
        assert not ffn.keep(x_of(1, 1, d=64)).all()


def test_an_oracle_never_counts_as_a_kernel_that_skips():
    actual = ffn_of()
    routers.harden(model_of(actual), "max", 0.5, routing="oracle", kernel="cpu_numba")
    assert actual.kernel(1) == "masked_dense"
    routers.harden(model_of(actual), "max", 0.5, kernel="cpu_numba")
    assert actual.kernel(1) == "cpu_numba"


def test_the_benchmark_times_what_it_says(tmp_path, monkeypatch):
    """Wanted shares are hit, errors are small, the table has a row for each; a small shape of each kind on the CPU."""
    from types import SimpleNamespace

    from sparsebench.bench import experts as bench
    from sparsebench.bench import output
    from tests.helpers import work

    monkeypatch.setattr(bench, "ROTATED_BYTES", 2e5)
    monkeypatch.setitem(bench.SHAPES, "lte", {**bench.SHAPES["lte"], "d": 64, "experts": 16, "size": 8})
    monkeypatch.setitem(
        bench.SHAPES, "d2dmoe", {**bench.SHAPES["d2dmoe"], "tokens": 50, "d": 32, "experts": 8, "size": 16}
    )
    hardware = work(tmp_path).hardware
    hardware.kernel_name = "cpu_numba"
    kernels.load("cpu_numba").prepare(1)
    actual = bench.time_experts(SimpleNamespace(hardware=hardware, samples=30, warmup=3, seed=0))
    for part in actual:
        assert part["kernel"] == "cpu_numba" and len(part["rows"]) == len(bench.SHARES)
        for row in part["rows"]:
            assert row["measured"] == pytest.approx(row["executed"], abs=0.01) and row["relative_error"] < 1e-4
    assert sum(line.startswith("| 50.0%") for line in output.expert_lines(actual)) == 2


def test_one_token_is_one_graph():
    """Compiled decode of hard experts has no break, though passes that keep figures have one."""
    ffn = ExpertFFN(
        tensors(d=16, f=24, n=16, gated=True), "silu", 6, site="0.ffn", dense_macs={"0.fc1": 1}, kernel="masked_dense"
    )
    ffn.router = routers.random_router(16, None, 6, torch.Generator().manual_seed(0))
    routers.harden(model_of(ffn), "above", 0.5, kernel="masked_dense")
    with torch.no_grad():
        x = x_of(1, 1, d=16)
        expected = ffn(x)
        torch.testing.assert_close(torch.compile(ffn, fullgraph=True, backend="eager")(x), expected)
