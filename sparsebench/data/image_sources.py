"""Where images lie and how they are read: in memory or as files; scikit-learn's digits, idx files, torchvision's sets, folders."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

from sparsebench import cache
from sparsebench.data.idx import idx_parts, read_idx

if TYPE_CHECKING:
    from sparsebench.data.images import Images, Recipe

TORCHVISION = ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100")
IDX_TRAIN, IDX_TEST = "train", "t10k"


class Memory:
    """Images held as one uint8 tensor [N, C, H, W]."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        self.images, self.labels = images, labels

    def read(self, rows: torch.Tensor, train: bool, recipe: Recipe) -> torch.Tensor:
        return self.images[rows]

    def fingerprints(self) -> list[str]:
        return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in self.images]


class Files:
    """Image files, decoded when they are asked for; brought to one square size there."""

    def __init__(self, paths: list[str], labels: torch.Tensor, augment: str = "none"):
        self.paths, self.labels, self.pool, self.augment = paths, labels, ThreadPoolExecutor(), augment
        self.plain = self.alone = 0  # images read without augmentation, and those of them that had the right size

    def read(self, rows: torch.Tensor, train: bool, recipe: Recipe) -> torch.Tensor:
        decoded = list(self.pool.map(decode, [self.paths[i] for i in rows.tolist()]))
        if train and self.augment == "resized-crop-flip":
            crop = v2.Compose([v2.RandomResizedCrop(recipe.size, antialias=True), v2.RandomHorizontalFlip()])
            return torch.stack([crop(image) for image in decoded])
        self.plain += len(decoded)
        self.alone += sum(image.shape[-2:] == (recipe.size, recipe.size) for image in decoded)
        return torch.stack([recipe.shape(image) for image in decoded])

    def fingerprints(self) -> list[str]:
        """Of size and first 64 KiB of each file: a whole ImageNet would take an hour to read."""
        return list(self.pool.map(file_digest, self.paths))


def decode(path: str) -> torch.Tensor:
    with Image.open(path) as picture:
        return v2.functional.pil_to_tensor(picture.convert("RGB"))


def file_digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(str(Path(path).stat().st_size).encode() + file.read(1 << 16)).hexdigest()


@dataclass
class Part:
    """Some rows of a store."""

    store: Memory | Files
    rows: torch.Tensor

    def fingerprints(self) -> list[str]:
        if isinstance(self.store, Files):
            return Files.fingerprints(self.subset())
        return Memory(self.store.images[self.rows], self.store.labels[self.rows]).fingerprints()

    def subset(self) -> Files:
        chosen = Files.__new__(Files)
        chosen.paths, chosen.pool = [self.store.paths[i] for i in self.rows.tolist()], self.store.pool
        return chosen


def digits(settings: Images) -> tuple[Memory, None, list[str]]:
    """scikit-learn's 1,797 scans of 8 x 8 pixels with 17 grey levels, shipped with the package."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy((bunch.images * 255 / 16).round().astype(np.uint8))[:, None]
    return Memory(images, torch.from_numpy(bunch.target.astype(np.int64))), None, [str(i) for i in range(10)]


def idx(settings: Images) -> tuple[Memory, Memory | None, list[str]]:
    """MNIST's file format, plain or gzipped. `t10k` beside `train` is the test part; a part alone is cut in three."""
    parts = {name: idx_memory(*files) for name, files in idx_parts(Path(settings.path)).items()}
    test = parts.pop(IDX_TEST) if IDX_TRAIN in parts and IDX_TEST in parts else None
    train = parts.get(IDX_TRAIN) or next(iter(parts.values()))
    classes = int(max(part.labels.max() for part in (train, test) if part)) + 1
    return train, test, [str(i) for i in range(classes)]


def idx_memory(images: Path, labels: Path) -> Memory:
    pixels, answers = read_idx(images, 3), read_idx(labels, 1)
    if len(pixels) != len(answers):
        raise ValueError(f"dataset.path: {images.name} has {len(pixels)} images, {labels.name} {len(answers)} labels")
    return Memory(pixels[:, None], answers.long())


def torchvision_set(settings: Images) -> tuple[Memory, Memory, list[str]]:
    """A set of torchvision by its name, downloaded where missing (torchvision checks the files' MD5)."""
    root = Path(settings.path) if settings.path else cache.folder()
    cls = getattr(torchvision.datasets, settings.torchvision_name)
    parts = []
    for train in (True, False):
        part = cls(str(root), train=train, download=not settings.present(root))
        pixels = torch.as_tensor(np.asarray(part.data))
        pixels = pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        parts.append(Memory(pixels, torch.as_tensor(np.asarray(part.targets), dtype=torch.int64)))
    return (*parts, [str(c) for c in part.classes])


class ClassFolders(torchvision.datasets.ImageFolder):
    """Folders by name; where all names are numbers, by these: 10 comes after 9, not after 1."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        classes, _ = super().find_classes(directory)
        if all(name.isdecimal() for name in classes):
            classes = sorted(classes, key=int)
        return classes, {name: i for i, name in enumerate(classes)}


def folders(settings: Images) -> tuple[Files | None, Files | None, list[str]]:
    """Class folders (ImageNet's layout): <path>/train and <path>/val (or test), one of them alone, or the classes
    directly in <path>."""
    root, parts = Path(settings.path), []
    names = [next((n for n in group if (root / n).is_dir()), None) for group in (("train",), ("val", "test"))]
    try:
        for name in names if any(names) else [""]:
            if name is not None:
                parts.append(ClassFolders(str(root / name)))
    except FileNotFoundError as error:
        raise ValueError(f"dataset.path: {' '.join(str(error).split())}") from error
    if len({tuple(p.classes) for p in parts}) > 1:
        raise ValueError(f"dataset.path: {root}/train and {root}/{names[1]} have different classes")
    stores = [Files([f for f, _ in p.samples], torch.tensor(p.targets), settings.augment) for p in parts]
    train = stores.pop(0) if names[0] or not any(names) else None
    return train, stores[0] if stores else None, parts[0].classes
