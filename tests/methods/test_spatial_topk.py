"""Spatial top-k on pretrained networks and real images (docs/methods/spatial_topk.md); skipped where they are not at hand."""

import pytest
import torch

from sparsebench.measure import quality, shape_bias
from sparsebench.modules.activation_map import maps_of
from tests.helpers import built, work


@pytest.fixture
def images(shared_data):
    folder = shared_data / "vision"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}: pretrained networks, ImageNet and cue-conflict images")
    return folder


def squeezenet(images, tmp_path):
    """(SqueezeNet 1.1 with torchvision's weights, one image of each class of ImageNet)."""
    weights = images / "squeezenet1_1_torchvision" / "squeezenet1_1.safetensors"
    data = built("dataset", "dataset=imagefolder", path=str(images / "imagenet-sample")).load(0)
    loaded = built("model", "model=squeezenet1_1", path=str(weights)).load(work(tmp_path), data)
    return loaded, data


def topk(module, keep):
    return built("method", "method=spatial_topk", "model=lenet5", keep=keep).apply(module, None, None)


@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_every_map_of_a_pretrained_network_keeps_its_largest(keep, images, tmp_path):
    """Checks 1 and 2 on a real image: at most k of each channel, those of the largest values, bit for bit."""
    loaded, data = squeezenet(images, tmp_path)
    (batch,) = data.test.batches(1, 1, "cpu")
    module, seen = topk(loaded.module, keep), {}
    hooks = [
        m.register_forward_hook(lambda m, x, y: seen.__setitem__(m.site, (x[0].relu(), y))) for m in maps_of(module)
    ]
    with torch.no_grad():
        module(batch.inputs)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 25
    for whole, cut in seen.values():
        kept, k = cut != 0, max(1, round(keep * whole[0, 0].numel()))
        assert torch.equal(whole[kept], cut[kept])
        assert torch.equal(kept.flatten(2).sum(2), (whole != 0).flatten(2).sum(2).clamp(max=k))
        smallest = torch.where(kept, whole, torch.inf).flatten(2).min(2).values
        largest = torch.where(kept, 0, whole).flatten(2).max(2).values
        assert bool((smallest >= largest).all())


@pytest.mark.slow
def test_topk_raises_the_shape_bias_of_a_pretrained_network_and_lowers_its_accuracy(images, tmp_path):
    """Check 7, the trend that the paper shows for AlexNet and VGG16; dense counts as torchvision's own code gives them."""
    loaded, data = squeezenet(images, tmp_path)
    dense = shape_bias.measure(loaded.module, data, str(images / "cue-conflict"), 32)
    assert (dense["shape_answers"], dense["texture_answers"], dense["trials"]) == (63, 242, 480)
    sparse = shape_bias.measure(topk(loaded.module, 0.2), data, str(images / "cue-conflict"), 32)
    assert sparse["shape_bias"] > dense["shape_bias"] and sparse["cue_accuracy"] < dense["cue_accuracy"]


@pytest.mark.slow
def test_accuracies_of_pretrained_networks_are_those_of_plain_code(images, tmp_path):
    """torchvision's SqueezeNet on 1,000 ImageNet images, a public ResNet-20 and -56 on 2,000 of CIFAR-10's."""
    loaded, data = squeezenet(images, tmp_path)
    assert quality.classification_quality(loaded.module, data.test, None, 32)[0]["accuracy"] == pytest.approx(0.644)
    for name, accuracy in (("resnet20", 0.8135), ("resnet56", 0.8315)):
        settings = built("dataset", "dataset=imagefolder", path=str(images / "cifar10-test-jpeg"), size=32, cut="none")
        weights = str(images / "resnet_cifar10" / f"{name}.safetensors")
        data = settings.load(0)
        module = built("model", f"model={name}", weights="pretrained", path=weights).load(work(tmp_path), data).module
        assert quality.classification_quality(module, data.test, None, 64)[0]["accuracy"] == pytest.approx(accuracy)
