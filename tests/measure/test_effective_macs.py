"""Products with both operands non-zero against loops over every product (docs/methods/dstf.md, checks 5 and 6)."""

import itertools

import pytest
import torch
from torch import nn

from sparsebench.measure import effective_macs
from sparsebench.measure.effective_macs import Products
from tests.helpers import tiny_cnn

GEOMETRIES = [
    {},
    {"padding": 1},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": (0, 2)},
    {"groups": 2, "padding": 1},
    {"groups": 4, "stride": 2},
    {"dilation": 2, "padding": 2},
    {"dilation": (1, 2), "stride": 2, "groups": 2, "padding": 1},
]


def sparse_tensor(*shape, share=0.5):
    x = torch.randn(*shape)
    return x * (torch.rand(shape) > share)


def brute_force(conv: nn.Conv2d, x: torch.Tensor) -> tuple[int, int, int, int]:
    """(dense, both, activation, weight) by visiting each product of an unfolded convolution; padding is in none."""
    stride, padding, dilation = conv.stride, conv.padding, conv.dilation
    count, _, height, width = x.shape
    out_h, out_w = conv(x).shape[2:]
    in_group, out_group = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    dense = both = activation = weight = 0
    for n, o, i, a, b in itertools.product(
        range(count), range(conv.out_channels), range(in_group), *(range(k) for k in conv.kernel_size)
    ):
        channel = (o // out_group) * in_group + i
        w = bool(conv.weight[o, i, a, b] != 0)
        for row, column in itertools.product(range(out_h), range(out_w)):
            y, z = row * stride[0] - padding[0] + a * dilation[0], column * stride[1] - padding[1] + b * dilation[1]
            if 0 <= y < height and 0 <= z < width:
                v = bool(x[n, channel, y, z] != 0)
                dense, both = dense + 1, both + (v and w)
                activation, weight = activation + v, weight + w
    return dense, both, activation, weight


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_convolution_equals_brute_force(geometry):
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 8, 3, **geometry)
    conv.weight.data = sparse_tensor(*conv.weight.shape, share=0.4)
    x, actual = sparse_tensor(2, 4, 7, 6), Products()
    with torch.no_grad():
        effective_macs.count(conv, x, conv(x), actual)
        assert (actual.dense, actual.both, actual.activation, actual.weight) == brute_force(conv, x)
    assert actual.images == 2


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12)])
def test_linear_equals_brute_force(shape):
    linear = nn.Linear(12, 4)
    linear.weight.data = sparse_tensor(4, 12)
    x, actual = sparse_tensor(*shape), Products()
    effective_macs.count(linear, x, linear(x), actual)
    rows = x.flatten(0, -2)
    assert actual.both == sum(int(((row != 0) & (linear.weight != 0)).sum()) for row in rows)
    assert actual.dense == len(rows) * 48 and actual.activation == 4 * int((x != 0).sum())
    assert actual.weight == len(rows) * int((linear.weight != 0).sum())


def counted(model, x):
    with torch.no_grad(), effective_macs.counting(model) as actual:
        model(x)
    return actual


def test_no_zeros_no_reduction_and_all_zero_weights_reduce_everything():
    conv = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, stride=2))
    x = torch.rand(2, 2, 6, 6) + 0.1
    assert effective_macs.reduction(counted(conv, x)) == 0
    conv[0].weight.data.zero_()
    assert effective_macs.reduction(counted(conv, x)) == 1


def test_total_reduction_is_at_least_each_alone():
    model, x = tiny_cnn(), torch.randn(4, 1, 8, 8)
    for parameter in model.parameters():
        parameter.mul_((torch.rand_like(parameter) > 0.4).float())
    actual = counted(model, x)
    both, activation, weight = (effective_macs.reduction(actual, k) for k in ("both", "activation", "weight"))
    assert 1 > both >= max(activation, weight) > 0.1
    assert both == pytest.approx(1 - (1 - activation) * (1 - weight), abs=0.1)  # near independence for random zeros


def test_counts_are_additive_over_images():
    model, x = tiny_cnn(), torch.randn(5, 1, 8, 8)
    whole, first, second = counted(model, x), counted(model, x[:2]), counted(model, x[2:])
    for name, part in first.items():
        part.merge(second[name])
        assert part.both == whole[name].both and part.dense == whole[name].dense and part.images == 5


def test_dense_products_of_lenet5_by_hand():
    from sparsebench.models.networks import LeNet5

    actual = counted(LeNet5(1, 10), torch.rand(1, 1, 28, 28) + 0.1)
    inside = 6 * sum(min(28, y + 3) - max(0, y - 2) for y in range(28)) ** 2  # padding 2: less at the border
    assert actual["conv1"].dense == inside
    assert actual["conv2"].dense == 16 * 6 * 25 * 100
    assert [actual[f"fc{i}"].dense for i in (1, 2, 3)] == [400 * 120, 120 * 84, 84 * 10]


def test_weight_sparsity_counts_products_only():
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2))
    model[0].weight.data = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]], [[[1.0, 1.0], [1.0, 1.0]]]])
    model[1].bias.data.zero_()
    assert effective_macs.weight_sparsity(model) == 3 / 8
