"""TwELL's packed format as a reference (checks 5 to 7 of its specification, docs/methods/prosparse.md)."""

import pytest
import torch

from sparsebench.modules import packed


def activations(tokens=12, width=600, most=31):
    """Random h with at most `most` non-zeros in each tile of 256; the last tile is narrower."""
    torch.manual_seed(0)
    h = torch.zeros(tokens, width)
    for row in h:
        for first in range(0, width, 256):
            size = min(256, width - first)
            count = int(torch.randint(0, min(most, size) + 1, ()))
            row[first + torch.randperm(size)[:count]] = torch.randn(count)
    return h


@pytest.mark.parametrize(("compression", "places"), [(8, 31), (4, 63), (2, 127)])
def test_round_trip_and_overflow(compression, places):
    """Check 5: what fits comes back bit for bit; one more is an error, it never wraps."""
    h = activations(most=places)
    h[0, :256] = 0
    h[0, 7 : 7 + places] = 1.5  # a full tile
    form = packed.pack(h, compression=compression)
    assert torch.equal(packed.unpack(form), h) and form.values.shape == (12, 3, places)
    assert int(form.counts[0, 0]) == places
    h[0, 255] = 1.5
    with pytest.raises(ValueError, match=rf"holds {places} non-zeros at compression {compression}, got {places + 1}"):
        packed.pack(h, compression=compression)


def test_product_of_lists_is_the_dense_one():
    """Check 6: and the order of a list does not matter but for rounding."""
    torch.manual_seed(1)
    h, x = activations().double(), torch.randn(12, 40).double()
    up, down = torch.randn(600, 40).double(), torch.randn(40, 600).double()
    expected = (h * (x @ up.T)) @ down.T
    form = packed.pack(h)
    torch.testing.assert_close(packed.product(form, x, up, down), expected, rtol=1e-6, atol=1e-9)
    order = torch.stack([torch.randperm(31) for _ in range(36)]).view(12, 3, 31)
    order = order.masked_fill(~form.valid, 99).argsort(-1)  # the filled places among themselves
    form.values, form.index = form.values.gather(-1, order), form.index.gather(-1, order)
    torch.testing.assert_close(packed.product(form, x, up, down), expected, rtol=1e-5, atol=1e-8)


def test_rows_are_split_by_their_non_zeros():
    """Check 7: at most the limit = packed, more = dense; together they are h; a backup that is too small is an error."""
    h = torch.zeros(16, 300)
    for i in range(16):
        h[i, : 126 + i // 4] = 1.0 + i  # 126, 127, 128, 129
    few, many = packed.split(h, 128, backup=4)
    assert few.tolist() == list(range(12)) and many.tolist() == [12, 13, 14, 15]
    whole = torch.zeros_like(h)
    whole[few], whole[many] = packed.unpack(packed.pack(h[few], compression=1)), h[many]
    assert torch.equal(whole, h)
    with pytest.raises(ValueError, match="room for 2 rows, 4 have more than 128"):
        packed.split(h)


def test_fit_of_a_model():
    h = torch.zeros(10, 512)
    h[0, :40] = 1  # above 31, not 63
    h[1, :140] = 1  # above all three, and above a row's limit
    fit = packed.fit_of(h)
    assert fit == {"overflow_at_8": 2 / 20, "overflow_at_4": 1 / 20, "overflow_at_2": 1 / 20, "rows_above_128": 0.1,
                   "bytes_at_8": 0.25}  # fmt: skip
