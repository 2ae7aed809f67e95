"""A tiny convolutional network and a tiny learnable image set for tests."""

import torch
from torch import nn

from sparsebench.data.images import Images, ImageSplit, Memory
from sparsebench.data.labelled import LabelledData
from sparsebench.modules.activation_map import isolate
from tests.conftest import built


class TinyCNN(nn.Module):
    """Three products behind ReLUs: stride, padding, groups, one ReLU module called twice and one function."""

    def __init__(self, classes: int = 3):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.conv3 = nn.Conv2d(8, 8, 1)
        self.relu, self.head = nn.ReLU(), nn.Linear(8 * 4, classes)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.conv2(x))
        x = torch.relu(self.conv3(x) + x)
        return self.head(nn.functional.max_pool2d(x, 2).flatten(1))


def tiny_cnn(seed: int = 0, classes: int = 3) -> nn.Module:
    """Traced, float32, eval mode, frozen."""
    torch.manual_seed(seed)
    return isolate(TinyCNN(classes)).eval().requires_grad_(False)


def tiny_vit(seed: int = 0) -> nn.Module:
    """A vision transformer for the 8 x 8 images, float32, eval mode, frozen."""
    import transformers

    torch.manual_seed(seed)
    shape = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=4,
        num_channels=1, num_labels=3, initializer_range=0.2,
    )  # fmt: skip
    return transformers.ViTForImageClassification(shape).eval().requires_grad_(False)


def image_settings(**changes) -> Images:
    return built("dataset", "dataset=digits", **{"size": None, "augment": "none", **changes})


def tiny_images(count: int = 96, **changes) -> LabelledData:
    """8 x 8 images of three classes: a bright upper half, lower half or left half, on noise."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 120, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    images[labels == 0, :, :4] += 120
    images[labels == 1, :, 4:] += 120
    images[labels == 2, :, :, :4] += 120
    store, settings, third = Memory(images, labels), image_settings(**changes), count // 3
    rows = {n: torch.arange(i * third, (i + 1) * third) for i, n in enumerate(("fit", "dev", "test"))}
    splits = {n: ImageSplit(n, store, r, 3, settings) for n, r in rows.items()}
    return LabelledData(**splits, classes=["up", "down", "left"], info={"augment": "none"}, kind="vision")
