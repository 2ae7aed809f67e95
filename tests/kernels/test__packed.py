"""Weights in 8 and 4 bits: what is stored, and that kernels read only what is kept (docs/quantisation.md, Checks)."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numba import njit

from sparsebench.kernels import cpu_numba, cpu_packed, masked_dense
from sparsebench.kernels._packed import MIDDLE, Packed, packed, quantised
from tests.kernel_checks import LIMIT, asymmetric, error

KINDS = {
    "int8": lambda w: quantised(w, 8),
    "int4": lambda w: quantised(w, 4, 32),
    "int4, zero points": lambda w: asymmetric(w, 32),
    "int4 along outputs": lambda w: quantised(w, 4, 64, "output"),
    "int8 in groups": lambda w: grouped8(w, 32),
}
SHAPES = [(1, 1, 1), (33, 45, 2), (200, 130, 1), (70, 64, 8)]  # of which 32 and 64 divide few


def grouped8(weight, group):
    """int8 with float16 scales to `group` inputs, as Q8_0 stores it."""
    columns = weight.float().t()
    whole = F.pad(columns, (0, 0, 0, -len(columns) % group)).unflatten(0, (-1, group))
    scale = (whole.abs().amax(1) / 127).half()
    wide = scale.float().repeat_interleave(group, 0)[: len(columns)].clamp_min(1e-8)
    return packed(
        (columns / wide).round().clamp(-127, 127).to(torch.int8), scale, None, 8, group, "input", weight.dtype
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_kernel_is_masked_dense_on_the_dequantised_weights(kind, dtype):
    """Checks 1 and 3: all kept, some, one channel, the last channel, none (the bias exactly); odd sizes; poisoned dropped rows."""
    for seed, (m, n, rows) in enumerate(SHAPES):
        torch.manual_seed(seed)
        weight, bias = torch.randn(m, n).to(dtype), torch.randn(m).to(dtype)
        x, scale = torch.randn(rows, 1, n).to(dtype), torch.rand(n) + 0.5
        stored = KINDS[kind](weight)
        exact = stored.dequantised(torch.float32)
        assert error(cpu_packed.quantised_linear(x, stored, threshold=-1.0), F.linear(x.float(), exact)) < LIMIT[dtype]
        for threshold in (0.4, 1.5):
            actual = cpu_packed.quantised_linear(x, stored, bias, threshold=threshold, scale=scale)
            keep = masked_dense.kept(x.float(), threshold, scale)
            assert (
                error(actual, masked_dense.input_sparse_linear(x.float(), exact, bias.float(), keep=keep))
                < LIMIT[dtype]
            )
            dropped = ~keep.reshape(-1, n).any(0)
            stored.q[dropped] = 77
            again = cpu_packed.quantised_linear(x, stored, bias, threshold=threshold, scale=scale)
            assert torch.equal(again, actual)
            stored = KINDS[kind](weight)
        assert torch.equal(cpu_packed.quantised_linear(x, stored, bias, threshold=1e9), bias.expand(rows, 1, m))
        for channel in {0, n - 1}:
            one = torch.zeros(rows, 1, n).to(dtype)
            one[..., channel] = 3.0
            expected = masked_dense.input_sparse_linear(one.float(), exact, bias.float(), threshold=0.0)
            assert error(cpu_packed.quantised_linear(one, stored, bias, threshold=0.0), expected) < LIMIT[dtype]
            keep = torch.arange(n).expand(rows, 1, n) == channel
            by_mask = cpu_packed.quantised_linear(x, stored, bias, keep=keep)
            assert error(by_mask, F.linear(torch.where(keep, x, 0).float(), exact, bias.float())) < LIMIT[dtype]


def test_threads_share_the_outputs(monkeypatch):
    monkeypatch.setattr(cpu_numba, "PARALLEL_BYTES", 1)
    x, weight = torch.randn(2, 1, 90), torch.randn(333, 90)
    for make in KINDS.values():
        stored = make(weight)
        alone = cpu_packed.quantised_linear(x, stored, threshold=0.5)
        cpu_numba.prepare(3)
        try:
            assert torch.equal(cpu_packed.quantised_linear(x, stored, threshold=0.5), alone)
        finally:
            cpu_numba.prepare(1)


@pytest.mark.parametrize("axis", ["input", "output"])
@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_to_the_nearest_level(bits, axis):
    """Check 2: no entry off by more than s / 2; int4 on -8..7 with s = max|w| / 7, int8 per output with max|w| / 127."""
    weight = torch.randn(50, 70) * torch.logspace(-6, 3, 70)
    weight[:, 3] = 0
    stored = quantised(weight, bits, 16, axis)
    scale, _ = stored.scales()
    off = (stored.dequantised() - weight).abs().t()
    assert (off <= scale / 2 * (1 + 1e-5)).all()
    assert stored.dequantised()[:, 3].abs().max() == 0
    levels = stored.levels().int() - (MIDDLE if bits == 4 else 0)
    assert levels.min() >= (-8 if bits == 4 else -127) and levels.max() == (7 if bits == 4 else 127)
    largest = weight.abs().amax(1) / 127 if bits == 8 else None
    if bits == 8:
        torch.testing.assert_close(stored.scale[0], largest)
    elif axis == "input":
        torch.testing.assert_close(stored.scale[0].float(), weight[:, :16].abs().amax(1) / 7, rtol=1e-3, atol=1e-7)
    with pytest.raises(ValueError, match="too large"):
        quantised(torch.full((2, 2), 1e9), 4)


def test_the_zero_point_counts_kept_inputs_only():
    """Check 4: with far zero points and half of every group dropped, the sum over the whole group would be wrong."""
    torch.manual_seed(0)
    stored = asymmetric(torch.randn(40, 64) + 3, 32)
    x = torch.rand(1, 1, 64) + 0.5
    keep = (torch.arange(64) % 2 == 0).expand(1, 1, 64)
    expected = F.linear(torch.where(keep, x, 0), stored.dequantised(torch.float32))
    assert error(cpu_packed.quantised_linear(x, stored, keep=keep), expected) < 1e-5
    scale, zero = stored.scales()
    levels = stored.levels().float()
    values = torch.where(keep, x, 0).flatten()
    wrong = (values[:, None] * levels * scale).sum(0) - (x.flatten()[:, None] * zero * scale).sum(0)
    assert error(wrong, expected.flatten()) > 0.1


def test_packing_loses_nothing_and_the_axes_differ():
    """Check 5: levels come back bit for bit, and a heavy column tells groups along outputs from groups along inputs."""
    for bits, top in ((8, 128), (4, 16)):
        levels = torch.randint(-top if bits == 8 else 0, top, (37, 101)).to(torch.int8 if bits == 8 else torch.uint8)
        scale = torch.rand(1, 101) if bits == 8 else torch.rand(3, 101).half()
        stored = packed(levels, scale, None, bits, 37 if bits == 8 else 16, "input", torch.float32)
        assert torch.equal(stored.levels(), levels) and stored.q.shape[0] == 37
        again = packed(stored.levels(), stored.scale, None, bits, stored.group, "input", torch.float32)
        assert torch.equal(again.q, stored.q)
    torch.manual_seed(0)
    weight = torch.randn(128, 128)
    weight[:, 5] *= 8
    along_inputs, along_outputs = (quantised(weight, 4, 128, axis).dequantised() for axis in ("input", "output"))
    off = [float((w - weight).norm() / weight.norm()) for w in (along_inputs, along_outputs)]
    assert off[0] > 1.5 * off[1]  # .296 against .120 for such columns
    rows = quantised(weight.t(), 4, 128).dequantised(), quantised(weight.t(), 4, 128, "output").dequantised()
    assert error(rows[0], weight.t()) < error(rows[1], weight.t())


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_tensors_indexed(kind, kept):
    """Check 6: a loop that indexes what a product needs counts the same bytes; half a byte a nibble, not a whole one."""
    m, n = 130, 96
    stored = KINDS[kind](torch.randn(m, n))
    channels = np.flatnonzero(np.random.default_rng(0).random(n) < kept) if kept < 1 else np.arange(n)
    read = groups = 0
    touched = set()
    for i in channels:
        read += stored.q[i].nbytes
        if kind == "int4 along outputs":
            read += stored.scale[i].nbytes
        elif kind == "int8":
            touched.add(0)
        else:
            touched.add(int(i) // stored.group)
    for g in touched:
        read += stored.scale[g].nbytes + (0 if stored.zero is None else stored.zero[g].nbytes)
    groups = len(touched) if touched else min(1, len(channels))
    assert stored.read_bytes(len(channels), groups) == read
    if kept == 1:
        assert stored.bytes == read
    assert stored.row_bytes == (192 if stored.bits == 8 else 96)  # 130 outputs in blocks of 64


def test_touched_groups_are_as_many_as_expected():
    """Check 7: 1 - (1 - kept)^G of the groups hold a kept channel, within three standard deviations."""
    from sparsebench.modules.quant_sparse import touched

    generator = torch.Generator().manual_seed(0)
    for kept, group in ((0.1, 8), (0.5, 4), (0.02, 32)):
        n, draws = 8 * group, 2000
        masks = torch.rand(draws, n // group, group, generator=generator) < kept
        measured = masks.any(-1).float().mean()
        stored = Packed(
            torch.empty(n, 32, dtype=torch.uint8), torch.empty(n // group, 64).half(), None, (64, n), 4, group, "input",
            torch.float32,
        )  # fmt: skip
        share = touched(kept, stored) / stored.groups
        assert share == pytest.approx(1 - (1 - kept) ** group)
        deviation = math.sqrt(share * (1 - share) / (draws * n / group))
        assert abs(float(measured) - share) < 3 * deviation


def test_sums_are_of_float32():
    """Check 8: |error| <= K 2^-24 sum|x w| on 1,000 products; sums in float16 break the bound."""
    torch.manual_seed(0)
    m, n = 1000, 64
    stored = quantised(torch.randn(m, n), 8)
    x = torch.randn(1, 1, n)
    exact = stored.levels().double().t() * stored.scale.double().t()
    expected, size = exact @ x.flatten().double(), exact.abs() @ x.flatten().double().abs()
    actual = cpu_packed.quantised_linear(x, stored, threshold=-1.0).flatten().double()
    bound = n * 2.0**-24 * size
    assert ((actual - expected).abs() <= bound).all()
    total = torch.zeros(m, dtype=torch.float16)
    for i in range(n):
        total += (exact[:, i] * x.flatten()[i]).half()
    assert ((total.double() - expected).abs() > bound).float().mean() > 0.9


@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        (torch.randn(9, 1, 64), "int4", "1 to 8 rows"),
        (torch.randn(1, 1, 64).bfloat16(), "int4", "model's dtype"),
        (torch.randn(1, 1, 64).half(), "int4", "float32 and bfloat16"),
        (torch.randn(1, 1, 64), "narrow", "multiples of 64"),
    ],
)
def test_what_the_cpu_kernel_can_not_do_is_refused(x, kind, message):
    weight = torch.randn(70, 64).to(x.dtype if x.dtype == torch.float16 else torch.float32)
    stored = quantised(weight, 4, 16, "output") if kind == "narrow" else KINDS[kind](weight)
    with pytest.raises(ValueError, match=message):
        cpu_packed.quantised_linear(x, stored, threshold=0.5)


def test_nibbles_are_the_same_with_and_without_the_table_look_up():
    """Processors without AVX-512 shift and convert; both ways are compiled here where they can be."""
    from sparsebench.kernels import _packed_numba

    stored, values = quantised(torch.randn(100, 9), 4, 32), np.array([[1.5, -0.25, 0.0]], np.float32)
    index, results = np.array([7, 2, 0], np.int64), []
    for table in {False, _packed_numba.has_table_lookup()}:
        run, part = _packed_numba.passes(2, False, table), np.zeros((1, 128), np.float32)

        @njit
        def body(part, q, index, values, scale):
            run(part, q, index, values, scale, 0, 0, 0, 128, 1)  # noqa: B023

        body(part, stored.q.numpy(), index, values, np.empty((0, 0), np.uint16))
        results.append(part[0, :100])
    levels = stored.levels().float().numpy() - 8
    for each in results:
        np.testing.assert_allclose(each, 1.5 * levels[7] - 0.25 * levels[2], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_unpacking_is_dequantising(kind, dtype):
    for m, n, _ in SHAPES:
        stored = KINDS[kind](torch.randn(m, n).to(dtype))
        assert torch.equal(cpu_packed.unpacked(stored), stored.dequantised()) and stored.dequantised().dtype == dtype
