"""Inputs, references and tolerances by which every kernel is checked, on the CPU, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import os
import random

import pytest
import torch

from sparsebench import kernels
from sparsebench.kernels import masked_dense
from sparsebench.kernels._packed import packed as packed_of
from sparsebench.modules.expert_ffn import select

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
RANDOM = random.Random(0)
KERNEL_SHAPES = [(1, 1, 1), (33, 8, 2), (4096, 17, 1)] + [
    (RANDOM.randrange(1, 700), RANDOM.randrange(1, 700), RANDOM.randrange(1, 9)) for _ in range(50)
]
# just past one tile of each kernel in one direction at a time (128 outputs, 512 inputs, 8 rows), none of which divides them
TILED = [(1, 1, 1), (133, 29, 1), (9, 523, 2), (37, 30, 8)]


def inputs(m, n, rows, dtype):
    weight = torch.randn(m, n).to(dtype).t().contiguous().t()
    return torch.randn(rows, 1, n).to(dtype), weight, torch.randn(m).to(dtype), torch.rand(n) + 0.5


def error(actual, reference):
    return float((actual.float() - reference).norm() / reference.norm().clamp_min(1e-30))


def check_triton(device: str, shapes, dtypes) -> None:
    from sparsebench.kernels import cuda_triton

    for i, (m, n, rows) in enumerate(shapes):
        for dtype in dtypes:
            torch.manual_seed(i)
            x, weight, bias, scale = (t.to(device) for t in inputs(m, n, rows, dtype))
            weight = weight.t().contiguous().t()
            low_rank = tuple(t.to(device, dtype) for t in (torch.randn(n, 3), torch.randn(3, m)))
            for threshold in (-1.0, 0.7, 1e9):
                actual = cuda_triton.input_sparse_linear(
                    x, weight, bias, threshold=threshold, scale=scale, low_rank=low_rank
                )
                wide = tuple(t.float() for t in low_rank)
                reference = masked_dense.input_sparse_linear(
                    x.float(), weight.float(), bias.float(), threshold=threshold, scale=scale, low_rank=wide
                )
                assert error(actual, reference) < LIMIT[dtype], (m, n, rows, dtype, threshold)
            gate, up = torch.relu(torch.randn(rows, 1, m)).to(device, dtype), torch.randn(m, n).to(device, dtype)
            down = torch.randn(m, n).to(device, dtype).t()
            actual = cuda_triton.neuron_sparse_ffn(x, gate, up, down)
            reference = masked_dense.neuron_sparse_ffn(x.float(), gate.float(), up.float(), down.float())
            assert error(actual, reference) < LIMIT[dtype], (m, n, rows, dtype)
            assert not cuda_triton.neuron_sparse_ffn(x, torch.zeros_like(gate), up, down).any()


def tensors(d=24, f=48, n=24, gated=False, bias=True, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator(device).manual_seed(seed)
    shapes = {"first": (f, d), "last": (f, n)}
    shapes |= {"up": (f, d)} if gated else {}
    shapes |= {"first_bias": (f,), "last_bias": (n,)} if bias else {}
    shapes |= {"up_bias": (f,)} if bias and gated else {}
    return {k: (torch.randn(*s, generator=generator, device=device) * 0.3).to(dtype) for k, s in shapes.items()}


def x_of(*shape, d=24, seed=1, dtype=torch.float32):
    return torch.randn(*shape, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def model_of(*actual):
    return torch.nn.ModuleList(actual)


def scalar(value):
    return torch.tensor(float(value))


def backend(name):
    if name == "cuda_triton" and os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        pytest.skip("needs TRITON_INTERPRET=1 before Python starts")
    return kernels.load(name)


FFNS = [(False, "relu"), (True, "silu"), (False, "gelu"), (True, "gelu_tanh")]


def check_fp32(name, rows, gated, activation, device="cpu"):
    """atol 1e-4 against masked dense: tokens without experts, with all, and an expert without tokens."""
    served, reference = backend(name).expert_ffn, kernels.load("masked_dense").expert_ffn
    for bias in (True, False):
        maps = {k: v.to(device) for k, v in tensors(d=40, f=48, n=56, gated=gated, bias=bias).items()}
        first, last = maps.pop("first"), maps.pop("last")
        x, generator = x_of(rows, d=40).to(device), torch.Generator().manual_seed(2)
        for share in (0.0, 0.4, 1.0):
            keep = torch.rand(rows, 6, generator=generator).to(device) < share
            keep[:, 2] = share == 1
            keep[0] = share > 0.5
            y = served(x, keep, first, last, activation, **maps)
            expected = reference(x, keep, first, last, activation, **maps)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def check_half(name, rows, dtype, device="cpu"):
    """Relative error below 1e-2 against float64."""
    maps = {k: v.to(device) for k, v in tensors(d=32, f=64, n=32, gated=True, dtype=dtype).items()}
    x = x_of(rows, d=32, dtype=dtype).to(device)
    keep = (torch.rand(rows, 4, generator=torch.Generator().manual_seed(3)) < 0.5).to(device)
    wide = {k: v.double() for k, v in maps.items()}
    reference = kernels.load("masked_dense").expert_ffn
    expected = reference(x.double(), keep, wide.pop("first"), wide.pop("last"), "silu", **wide)
    y = backend(name).expert_ffn(x, keep, maps.pop("first"), maps.pop("last"), "silu", **maps).double()
    assert float((y - expected).norm() / expected.norm()) < 1e-2


def check_router(dtype, device="cpu"):
    """Router of two maps and rule in one pass, against scores in float64; a token whose scores are all 0 keeps none."""
    served = kernels.load("cuda_triton")
    for rows, d, width, num_experts in ((1, 5, 3, 2), (70, 40, 20, 7), (200, 136, 128, 24)):
        x = x_of(rows, d=d, dtype=dtype).to(device)
        generator = torch.Generator().manual_seed(0)
        shapes = (width, d), (num_experts, width)
        first, second = (torch.randn(s, generator=generator).div(s[1] ** 0.5).to(device, dtype) for s in shapes)
        x[-1] = 0
        for outer in ("none", "abs"):
            scores = masked_dense.expert_scores(x.double(), first.double(), second.double(), outer=outer)
            for rule in ("above", "max"):
                for tau in (-1.0, 0.0, 0.3, 0.6, 1.0) if outer == "abs" or rule == "above" else (0.0,):
                    limit = scalar(tau).to(device)
                    actual = served.expert_keep(x, first, limit, second, outer=outer, rule=rule)
                    expected = select(scores, rule, limit)
                    line = (
                        tau * scores.amax(-1, keepdim=True)
                        if rule == "max"
                        else scalar(tau).clamp(0).logit().to(device)
                    )
                    clear = ((scores - line).abs() > MARGIN[dtype]) | (tau < 0) | (scores == 0)
                    assert torch.equal(actual & clear, expected & clear), (rows, outer, rule, tau)
                    assert clear.float().mean() > 0.8


MARGIN = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def check_selective_attention(attention, dtype, shapes, device="cpu") -> None:
    """Equal to dense attention followed by masking, for ragged lengths, no, one, some and all groups kept.

    shapes: (sequences, groups, heads of a group, head size, positions). What a sequence does not keep, or what lies
    behind its tokens, is NaN in its cache: it must not be read, or not matter.
    """
    for batch, groups, shared, head_dim, positions in shapes:
        generator = torch.Generator().manual_seed(positions)
        q = torch.randn(batch, groups * shared, head_dim, generator=generator).to(dtype)
        keys, values = (torch.randn(batch, groups, positions, head_dim, generator=generator).to(dtype) for _ in "kv")
        lengths = torch.tensor(
            [positions, *torch.randint(1, positions + 1, (batch - 1,), generator=generator).tolist()]
        )
        for kept in {0, 1, (groups + 1) // 2, groups}:
            order = torch.rand(batch, groups, generator=generator).argsort(-1)
            keep = order < kept
            expected = masked_dense.selective_attention(q.float(), keys.float(), values.float(), keep, lengths, 0.3)
            poisoned = [t.clone() for t in (keys, values)]
            behind = torch.arange(positions) >= lengths.view(-1, 1)
            for t in poisoned:
                t[~keep] = float("nan")
                t[behind.unsqueeze(1).expand(t.shape[:3])] = float("nan")
            given = [t.to(device) for t in (q, *poisoned, keep, lengths)]
            for _ in range(2):
                y = attention(*given, 0.3).cpu()
                assert y.shape == q.shape and y.dtype == dtype
                assert not y.view(batch, groups, -1)[~keep].any()
                if kept:
                    assert error(y, expected) < LIMIT[dtype], (batch, groups, shared, head_dim, positions, kept)


def check_mask(device: str) -> None:
    """One kernel compares and selects: with and without a scale, and tokens that stay whole; odd sizes."""
    from sparsebench.kernels._triton_mask import keep_or_zero

    torch.manual_seed(0)
    threshold = torch.tensor(0.6, device=device)
    for scale in (None, torch.rand(70, device=device) + 0.5):
        for dense in (None, torch.rand(3, 5, device=device) < 0.3):
            x = torch.randn(3, 5, 70, device=device)
            keep = masked_dense.kept(x, threshold, scale)
            keep = keep if dense is None else keep | dense.unsqueeze(-1)
            assert torch.equal(keep_or_zero(x, threshold, scale, dense), torch.where(keep, x, 0))


def check_largest(device: str) -> None:
    """Exactly the k largest, the first of equal ones: ties, signs, both zeros, infinities; odd sizes, every k that is special."""
    from sparsebench.kernels._triton_mask import k_largest

    torch.manual_seed(0)
    for n in (1, 5, 70, 576):
        for x in (torch.randn(3, 2, n), torch.randint(-2, 3, (3, 2, n)) * 0.5, torch.randn(3, 2, n).bfloat16()):
            x[0, 0, ::3] *= -0.0
            x[1, 1, -1] = float("inf")
            order = x.float().sort(dim=-1, descending=True, stable=True).indices
            for k in {1, n // 3 + 1, n}:
                expected = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, order[..., :k], True)
                assert torch.equal(k_largest(x.to(device), k).cpu(), expected), (n, k, x.dtype)


def asymmetric(weight, group):
    """A weight [m, n] in 4 bits with zero points far from the middle, in groups along the inputs."""
    columns = weight.float().t()
    padded = torch.nn.functional.pad(columns, (0, 0, 0, -len(columns) % group)).unflatten(0, (-1, group))
    low, high = padded.amin(1), padded.amax(1)
    scale = ((high - low) / 15).clamp_min(2**-20).half()
    even = torch.arange(low.shape[1], device=low.device) % 2 == 0
    zero = torch.where(even, -low / scale.float(), 14.0).round().half()
    wide_scale, wide_zero = (t.float().repeat_interleave(group, 0)[: len(columns)] for t in (scale, zero))
    levels = (columns / wide_scale + wide_zero).round().clamp(0, 15).to(torch.uint8)
    return packed_of(levels, scale, zero, 4, group, "input", weight.dtype)
