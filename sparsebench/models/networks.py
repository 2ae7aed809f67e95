"""Networks of the literature that no library has: LeNet-5, and the ResNets of He et al. for CIFAR."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

CIFAR_RESNETS = {f"resnet{6 * n + 2}": n for n in (3, 5, 7, 9, 18)}  # blocks per stage; arXiv 1512.03385, 4.2
SIZES = {"lenet5": 28, **dict.fromkeys(CIFAR_RESNETS, 32)}  # pixels of the images they were made for


class LeNet5(nn.Module):
    """LeNet-5 with ReLU and max pooling: 6 and 16 filters of 5x5, then 120, 84 and the classes; 28 x 28 images."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, classes)
        self.relu1, self.relu2, self.relu3, self.relu4 = nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.relu1(self.conv1(x)))
        x = self.pool(self.relu2(self.conv2(x))).flatten(1)
        return self.fc3(self.relu4(self.fc2(self.relu3(self.fc1(x)))))


class CifarBlock(nn.Module):
    """Two 3x3 convolutions; where the size halves the shortcut takes every second position and pads channels with 0."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.stride, self.padding = 1 if inputs == outputs else 2, (outputs - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=self.stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return self.relu2(y + x)


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels, shortcuts without parameters (option A of He et al.); 32 x 32 images.

    Parameters are named as in public PyTorch code (akamaster/pytorch_resnet_cifar10): conv1, bn1, layer1..3, linear.
    """

    def __init__(self, channels: int, classes: int, blocks: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        widths = (16, 16, 32, 64)
        for stage, (before, width) in enumerate(pairwise(widths), 1):
            inputs = [before] + [width] * (blocks - 1)
            self.add_module(f"layer{stage}", nn.Sequential(*(CifarBlock(i, width) for i in inputs)))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))
