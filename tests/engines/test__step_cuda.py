"""The largest k inside the kernels of the fused CUDA step, built for the CPU: exactly k, the first of equal ones; the whole step."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from sparsebench import engines
from sparsebench.engines import fused_cpu, fused_cuda
from sparsebench.kernels import cuda_gather, masked_dense
from sparsebench.kernels._packed import quantised
from sparsebench.kernels.cuda_gather import Gather, Tuning, choose_bytes, gather_bytes
from sparsebench.methods.rsparse.low_rank import factors
from sparsebench.modules.input_sparse import InputSparseLinear, replace, sparse_of
from sparsebench.modules.quant_sparse import QuantLinear
from sparsebench.sites import find_blocks
from tests.helpers import emulate, special_model, tiny_model

IDS = torch.randint(0, 320, (1, 24), generator=torch.Generator().manual_seed(5))
TUNING = Tuning(2, 4, 1, 2.0)
SMALL = dict.fromkeys(fused_cuda.DEFAULTS, TUNING)
SIZES = {"WARPS": 2, "LOADS": 4, "WIDE": 1, "HEAD_DIM": 64, "GROUP": 1, "SPLITS": 1, "TOPK": 1}


def selected(library, x, k, scale=None, grid=(1, 3)):
    """The channels that a product of x [n] with the largest k reads: it is finite, of weights that are NaN elsewhere."""
    n, m = len(x), 16
    keep = masked_dense.largest(x, k, scale) & (x != 0)
    weight = torch.randn(n, m, generator=torch.Generator().manual_seed(n)).half()
    weight[~keep] = torch.nan
    out, word = torch.zeros(m), torch.zeros(2)
    threshold, guess = torch.zeros(()), torch.full((1,), 0x3F000000, dtype=torch.int32)
    arguments = Gather()
    arguments.set_part(0, weight, x, out, threshold, scale)
    arguments.choose(0, k, word, guess)
    bytes_ = max(gather_bytes(TUNING), choose_bytes(n, TUNING))
    library.run_gather_plain(*grid, bytes_, ctypes.byref(arguments))
    assert not library.count_overruns()
    expected = x[keep] @ weight[keep].float()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5 * float(x.abs().max()) * max(1, k) ** 0.5)
    return int(library.count_prefetched())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("n, k", [(1, 1), (8, 0), (8, 8), (70, 1), (70, 69), (1000, 377), (4104, 2052), (1000, 2000)])
def test_the_largest_are_those_of_the_reference(emulated, n, k, scaled):
    generator = torch.Generator().manual_seed(n + k)
    x = torch.randn(n, generator=generator)
    scale = torch.rand(n, generator=generator) + 0.5 if scaled else None
    selected(emulated(**SIZES), x, k, scale)
    wide = x * 10.0 ** torch.randint(-6, 6, (n,), generator=generator)
    early = selected(emulated(**SIZES), wide, k, scale, grid=(1, 1))
    kept = int(masked_dense.largest(wide, k, scale)[:64].sum())
    assert kept - 1 <= early <= kept, "rows above the guess, here the limit itself, are on their way early"


def test_of_equal_ones_exactly_the_first_are_kept_and_zeros_never(emulated):
    library = emulated(**SIZES)
    selected(library, torch.tensor([1.0, -1, 1, 2, -1, 0, 0, 3]), 4)
    selected(library, torch.tensor([0.0, 3, -0.0, 0, 0, 0, 0, 0]), 3)
    selected(library, torch.zeros(16), 2)
    selected(library, torch.ones(3000), 1234)
    selected(library, torch.randint(-3, 4, (3000,), generator=torch.Generator().manual_seed(0)).float(), 777)
    outlier = torch.randn(512, generator=torch.Generator().manual_seed(1))
    outlier[37] = 1e6  # a massive activation: all others lie in the last bin of the first round
    for k in (1, 2, 256, 511):
        selected(library, outlier, k)


def test_what_is_not_among_the_largest_is_read_by_a_remainder(emulated):
    """The complement of a choice that another part published: both together are the whole product."""
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(200, generator=generator), torch.randn(200, 16, generator=generator).half()
    outs, word, zero, arguments = torch.zeros(2, 16), torch.zeros(2), torch.zeros(()), Gather()
    for i in range(2):
        arguments.set_part(i, weight, x, outs[i], zero, complement=i == 1)
        arguments.choose(i, 50 if i == 0 else -1, word)
    emulated(**SIZES).run_gather_plain(2, 3, choose_bytes(200, TUNING) + gather_bytes(TUNING), ctypes.byref(arguments))
    keep = masked_dense.largest(x, 50)
    torch.testing.assert_close(outs[0], torch.where(keep, x, 0) @ weight.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outs[1], torch.where(keep, 0, x) @ weight.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_alone_chooses_in_a_launch_before(emulated, monkeypatch, dtype):
    """cuda_gather's operator through its own code: the input in 16 bits, where many scores are equal."""
    library = emulated(**SIZES, **({"BF16": 1} if dtype == torch.bfloat16 else {}))
    monkeypatch.setattr(cuda_gather, "built", lambda name, *_, **__: getattr(library, f"run_{name}"))
    monkeypatch.setattr(cuda_gather, "processors", lambda _: 4)
    monkeypatch.setattr(
        cuda_gather._nvrtc, "launch",
        lambda kernel, grid, threads, shared, arguments, overlap: kernel(*grid, shared, ctypes.byref(arguments[0])),
    )  # fmt: skip
    monkeypatch.setattr(cuda_gather, "gather_linear", cuda_gather.gather_linear._init_fn)
    generator = torch.Generator().manual_seed(2)
    x, weight = (
        torch.randn(1, 1, 300, generator=generator).to(dtype),
        torch.randn(24, 300, generator=generator).to(dtype),
    )
    weight, scale, bias = weight.t().contiguous().t(), torch.rand(300, generator=generator), torch.ones(24).to(dtype)
    low_rank = (torch.randn(300, 8, generator=generator).to(dtype), torch.randn(8, 24, generator=generator).to(dtype))
    for given in ({}, {"scale": scale}, {"scale": scale, "low_rank": low_rank}, {"threshold": torch.full((), -1.0)}):
        rule = {"threshold": torch.zeros(()), **given}
        y = cuda_gather.input_sparse_linear(x, weight, bias, top_k=120, tuning=TUNING, **rule)
        keep = (masked_dense.largest(x, 120, rule.get("scale")) & (x != 0)) | (rule["threshold"] < 0)
        wide = tuple(f.float() for f in rule["low_rank"]) if "low_rank" in rule else None
        expected = masked_dense.input_sparse_linear(x.float(), weight.float(), bias.float(), keep=keep, low_rank=wide)
        assert float((y.float() - expected).norm() / expected.norm()) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


def with_largest(dtype=torch.float16, scale="none", bits=None, rank=0, layers=2, **changes):
    """A model that keeps the largest k: one k per input, or with `scale=some` rules that differ inside a group (WINA's)."""
    model = tiny_model(layers=layers, hidden_size=64, intermediate_size=136, **changes).to(dtype)
    for block in find_blocks(model):
        for i, (role, site) in enumerate(block.sites.items()):
            linear = model.get_submodule(site.path)
            n = linear.weight.shape[1]
            rule = {"top_k": n // 2 - 3 * block.index - (i if scale == "all" else 0)}
            if scale == "all" or (scale == "some" and role in ("k", "gate")):
                rule["scale"] = torch.rand(n, generator=torch.Generator().manual_seed(i)) + 0.5
            if rank:
                rule["low_rank"] = tuple(f.to(dtype) for f in factors(linear.weight, rank))
            if scale == "some" and role in ("o",):
                rule.pop("top_k")  # by a threshold beside the others
            linear = QuantLinear(quantised(linear.weight, bits, 32), linear.bias) if bits else linear
            threshold = 0.0 if "top_k" in rule else 0.05
            replace(model, site.path, sparse_of(linear, site.name, threshold, **rule))
    return model


STEPS = [
    {}, {"dtype": torch.bfloat16, "scale": "all"}, {"scale": "some"}, {"scale": "some", "rank": 5}, {"bits": 8},
    {"bits": 4, "scale": "some"}, {"choose": "before"}, {"choose": "before", "scale": "some", "dtype": torch.bfloat16},
    {"kind": "qwen2", "rank": 3, "num_key_value_heads": 1},
]  # fmt: skip


@pytest.mark.parametrize("given", STEPS, ids=str)
def test_a_step_with_the_largest_k_is_the_models(emulated, given, monkeypatch):
    choose = given.get("choose", "inside")
    monkeypatch.setattr(fused_cuda.Step, "choose", choose)
    model = with_largest(**{k: v for k, v in given.items() if k != "choose"})
    assert fused_cuda.unsupported(model) is None
    cache, _ = engines.prefilled(model, IDS[:, :20], 4)
    step = fused_cuda.Step(model, cache, processors=4, tunings=SMALL)
    assert any(launch.name.startswith("choose") for launch in step.launches) == (choose == "before")
    library = emulated(**step.defines(TUNING))
    holder = SimpleNamespace(module=model, position=20, cache=cache, blocks=find_blocks(model))
    holder.fixed = [None] * 3 + [False] + [None] * 3 + [t.numpy() for t in (step.cosine, step.sine)]
    for i in (20, 21):  # twice: words and sums must be left as they were found
        holder.position = i
        expected = fused_cpu.reference_step(holder, int(IDS[0, i]))
        step.token.fill_(int(IDS[0, i]))
        step.position.fill_(i)
        errors = step.check(emulate(library), lambda: None)
        assert max(errors.values()) < 1e-5, errors
        # a channel at the limit may fall on its other side in 16 bits: the logits are near, not equal
        assert float((step.logits - expected).norm() / expected.norm()) < 0.1
    assert int(library.count_prefetched()) > 0, "the second token knows the limits of the first"
    assert not library.count_overruns()


def test_a_negative_threshold_keeps_all_of_the_largest(emulated):
    model = with_largest(layers=1)
    cache, _ = engines.prefilled(model, IDS[:, :20], 4)
    for module in model.modules():
        if isinstance(module, InputSparseLinear):
            module.threshold.fill_(-1)
    step = fused_cuda.Step(model, cache, processors=4, tunings=SMALL)
    step.position.fill_(20)
    assert max(step.check(emulate(emulated(**step.defines(TUNING))), lambda: None).values()) < 1e-5


def test_a_step_of_thresholds_knows_no_choice():
    """Its kernels are compiled without one, and nothing is reserved for it."""
    model = tiny_model().half()
    engines.channel_major(model)
    cache, _ = engines.prefilled(model, IDS[:, :20], 4)
    step = fused_cuda.Step(model, cache, processors=4)
    assert "TOPK" not in step.defines(TUNING) and not step.of_attention.numel()
    assert {launch.name for launch in step.launches} >= {"gather_attention", "attend"}


# ---------------------------------------------------------------------------------------------------------------------
# Norms that rotate, and neurons that the gate chooses


@pytest.mark.parametrize("kind", ["rotated", "rotated by thresholds", "cats", "cats and rotated"])
@pytest.mark.parametrize("keep_all", [False, True])
def test_a_step_that_rotates_or_chooses_neurons_is_the_models(emulated, kind, keep_all):
    """Every launch in fp32, and the whole against the same step in torch; twice, on the same buffers."""
    model = special_model(kind, torch.float16, layers=2, hidden_size=64, intermediate_size=136)
    assert fused_cuda.unsupported(model) is None
    cache, _ = engines.prefilled(model, IDS[:, :20], 4)
    step = fused_cuda.Step(
        model, cache, processors=4, tunings=dict.fromkeys(fused_cuda.DEFAULTS, TUNING), keep_all=keep_all
    )
    library = emulated(**step.defines(TUNING))
    sixteen = emulated(**step.defines(Tuning(16, 4, 1, 1.0))) if "cats" in kind else library  # rows of up
    assert sum("rotation" in launch.label for launch in step.launches) == (4 if "rotated" in kind else 0)
    holder = SimpleNamespace(module=model, position=20, cache=cache, blocks=find_blocks(model))
    holder.fixed = [None] * 3 + [keep_all] + [None] * 3 + [t.numpy() for t in (step.cosine, step.sine)]
    for i in (20, 21):
        holder.position = i
        expected = fused_cpu.reference_step(holder, int(IDS[0, i]))
        step.token.fill_(int(IDS[0, i]))
        step.position.fill_(i)
        run = {2: emulate(library), 16: emulate(sixteen)}
        errors = step.check(lambda launch, run=run: run[2 if launch.tuning.warps != 16 else 16](launch), lambda: None)
        assert max(errors.values()) < 1e-5, errors
        assert float((step.logits - expected).norm() / expected.norm()) < 0.1
    assert not library.count_overruns() and not sixteen.count_overruns()
