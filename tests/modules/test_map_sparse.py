"""The kernel that skips zeros of an activation map: equal to the dense product, never claimed where it lost."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsebench import kernels, tasks
from sparsebench.measure import effective_macs, latency
from sparsebench.modules.map_sparse import MapSparse, reference, unsupported
from sparsebench.tasks import image_classification
from tests.helpers import tiny_cnn

CPU = SimpleNamespace(kernel_name="cpu_numba", torch_device=torch.device("cpu"))
GEOMETRIES = [{}, {"padding": 1}, {"stride": 2, "padding": 1}, {"stride": (2, 1), "padding": (0, 2)},
              {"dilation": 2, "padding": 2}, {"bias": False}]  # fmt: skip


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.8, 1.0])
def test_convolution_equals_the_dense_product(geometry, share):
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 20, 3, **geometry).requires_grad_(False)
    x = torch.randn(1, 5, 9, 8) * (torch.rand(1, 5, 9, 8) >= share)
    torch.testing.assert_close(MapSparse(conv, "cpu_numba")(x), reference(conv, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 7, 1), nn.Linear(40, 11)], ids=["1x1", "linear"])
def test_1x1_and_linear_equal_the_dense_product(layer):
    layer.requires_grad_(False)
    x = torch.randn(1, 6, 4, 4).relu() if isinstance(layer, nn.Conv2d) else torch.randn(1, 40).relu()
    torch.testing.assert_close(MapSparse(layer, "cpu_numba")(x), reference(layer, x), rtol=1e-5, atol=1e-5)


def test_more_than_one_image_runs_dense():
    conv, x = nn.Conv2d(3, 4, 3).requires_grad_(False), torch.randn(2, 3, 6, 6)
    assert torch.equal(MapSparse(conv, "cpu_numba")(x), conv(x))


def test_what_is_not_supported_is_said():
    assert "groups" in unsupported(nn.Conv2d(4, 4, 3, groups=2), CPU)
    assert "float32" in unsupported(nn.Conv2d(4, 4, 3).bfloat16(), CPU)
    assert "no kernel" in unsupported(nn.Conv2d(4, 4, 3), SimpleNamespace(kernel_name="masked_dense"))
    assert unsupported(nn.Conv2d(4, 4, 3), CPU) is None


def test_layers_report_break_even_and_a_wrong_kernel_is_found(monkeypatch):
    settings = SimpleNamespace(warmup=3, samples=30)
    rows = image_classification.layer_latency(tiny_cnn(), torch.randn(1, 1, 8, 8), settings, CPU)
    assert set(rows) == {"conv1", "conv2", "conv3", "head"} and "groups" in rows["conv2"]["unsupported"]
    assert rows["conv1"]["input_zeros"] == 0 and rows["conv3"]["input_zeros"] > 0.1
    assert rows["conv3"]["parity_relative_error"] < 1e-5
    assert all({"dense_ms", "sparse_ms", "break_even"} <= set(rows[n]) for n in ("conv1", "conv3", "head"))
    assert rows["conv1"]["break_even"]["reason"] == "needs three measured sparsities, got 1"  # an image has no zeros
    points = [p["sparsity"] for p in rows["conv3"]["break_even"]["points"]]
    assert points[0] == 0 and points[-1] == rows["conv3"]["input_zeros"] and len(points) == 4
    backend = kernels.load("cpu_numba")
    right = backend.map_sparse_conv2d
    monkeypatch.setattr(backend, "map_sparse_conv2d", lambda *a: right(*a) * 1.01)
    with pytest.raises(ArithmeticError, match="differs from masked-dense at conv"):
        image_classification.layer_latency(tiny_cnn(), torch.randn(1, 1, 8, 8), settings, CPU)


def test_a_convolutional_network_executes_less_only_in_layers_that_ran_the_kernel():
    """By hand, per image: of a layer that skips, the products with a non-zero input; of the others, all."""
    task, image = tasks.load("vision"), torch.randn(1, 1, 8, 8)
    model = tiny_cnn()
    with effective_macs.counting(model) as products, torch.no_grad():
        model(image)
    section = {
        "dense": sum(p.dense for p in products.values()), "parts": {"attention": 0},
        "per_site": {name: image_classification.site_cost(p, None, "both") for name, p in products.items()},
    }  # fmt: skip
    seen = {}
    hook = model.conv3.register_forward_hook(lambda _, x, y: seen.setdefault("x", x[0]))
    with torch.no_grad():
        model(image)
    hook.remove()
    saved = 8 * int((seen["x"] == 0).sum())  # 1 x 1: a zero input saves one product of each of 8 output channels
    assert saved > 0
    for skipping, expected in ((set(), section["dense"]), ({"conv3"}, section["dense"] - saved)):
        assert task.executed(section, latency.Timing(latency={}, skipping=skipping)) == expected
