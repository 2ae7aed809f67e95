"""IDX files: the format of MNIST and its kin, plain or gzipped."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import torch


def idx_parts(folder: Path) -> dict[str, tuple[Path, Path]]:
    """The pairs (images, labels) of idx files in a folder by their prefix (train, t10k, or any other)."""
    pairs = {}
    for images in sorted(folder.glob("*-images*idx3-ubyte*")):
        labels = images.with_name(images.name.replace("-images", "-labels").replace("idx3", "idx1"))
        if labels.exists():
            pairs[images.name.partition("-images")[0]] = (images, labels)
    return pairs


def read_idx(file: Path, dimensions: int) -> torch.Tensor:
    """uint8 array of an idx file. Raises ValueError for another magic number or length."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        magic, *shape = struct.unpack_from(f">{1 + dimensions}I", content)
    except (OSError, EOFError, struct.error) as error:
        raise ValueError(f"dataset.path: {file} can't be read ({error})") from error
    start, count = 4 * (1 + dimensions), int(np.prod(shape))
    if magic != 0x0800 + dimensions or len(content) != start + count:
        raise ValueError(f"dataset.path: {file} is no idx file of {dimensions} dimensions of bytes, or is cut short")
    return torch.from_numpy(np.frombuffer(content, np.uint8, count, start).reshape(shape).copy())
