"""Labelled images for classifiers: scikit-learn's digits, idx files (MNIST's format), torchvision's sets, class folders.

Pixels stay bytes until they are on the device, where they are normalised. An image that has the network's size is left
alone; others are brought to it by a `Recipe`, the weights' own where they have one. fit is for training, dev for choices,
test is only ever scored; an image that occurs twice is kept once, so no picture stands in two splits. A set without
images to fit on (one per class, or a `val` folder alone) can still be evaluated.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.transforms import v2

from sparsebench import cache
from sparsebench.config import NAME_PATTERN, setting
from sparsebench.data import hub
from sparsebench.data.idx import idx_parts, read_idx
from sparsebench.data.labelled import SPLITS, Labelled, LabelledData, stratified, subset, unique_rows

TORCHVISION = ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100")
IDX_TRAIN, IDX_TEST = "train", "t10k"


@dataclass(frozen=True)
class Recipe:
    """How images become the network's input.

    size: side of the network's input. resize: shorter side before the centre crop to `size`; None: the whole image is
    resized to size x size, nothing is cut off.
    """

    name: str
    size: int
    resize: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    def shape(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 [C, H, W] -> [C, size, size]; an image of that size is left alone."""
        if image.shape[-2:] == (self.size, self.size):
            return image
        side = (self.size, self.size) if self.resize is None else [self.resize]
        mode = v2.InterpolationMode(self.interpolation)
        return v2.functional.center_crop(v2.functional.resize(image, side, mode, antialias=True), self.size)

    def describe(self) -> dict:
        other = "to size x size" if self.resize is None else f"shorter side to {self.resize}, centre crop"
        return {**vars(self), "images_of_this_size": "left alone", "other_images": f"{other}, antialiased"}


@dataclass(frozen=True)
class Bytes:
    """Images as they are stored, moved to a device before they become numbers."""

    images: torch.Tensor  # uint8 [N, C, H, W]
    labels: torch.Tensor
    prepare: Callable[[torch.Tensor], torch.Tensor]

    def to(self, device: torch.device | str) -> Labelled:
        return Labelled(self.prepare(self.images.to(device)), self.labels.to(device))


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

    def __init__(self, paths: list[str], labels: torch.Tensor, size: int | None = None, augment: str = "none"):
        self.paths, self.labels, self.pool = paths, labels, ThreadPoolExecutor()
        crop = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()] if size else []
        self.crop = v2.Compose(crop) if augment == "resized-crop-flip" else None
        self.plain = self.alone = 0  # images read without augmentation, and those of them that had the right size

    def read(self, rows: torch.Tensor, train: bool, recipe: Recipe) -> torch.Tensor:
        decoded = list(self.pool.map(decode, [self.paths[i] for i in rows.tolist()]))
        if train and self.crop:
            return torch.stack([self.crop(image) for image in decoded])
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


class ImageSplit:
    """One split. Indexing gives training batches (augmented), `batches` plain ones in order."""

    unit = "images"

    def __init__(self, name: str, store: Memory | Files, rows: torch.Tensor, classes: int, settings: Images):
        self.name, self.store, self.rows, self.classes, self.settings = name, store, rows, classes, settings
        size = settings.size or store.images.shape[-1]
        self.channels = settings.channels or (store.images.shape[1] if isinstance(store, Memory) else 3)
        resize = round(size * 256 / 224) if isinstance(store, Files) else None
        norm = (tuple(settings.mean), tuple(settings.std))
        self.recipe = Recipe("of the data set", size, resize, *norm)
        self.digests: list[str] | None = None

    @property
    def size(self) -> int:
        return self.recipe.size

    @property
    def facts(self) -> dict:
        """For the record: the share of the images read so far that had the network's size."""
        store = self.store
        return {"left_alone": store.alone / store.plain} if isinstance(store, Files) and store.plain else {}

    def needed(self) -> None:
        """Raise ValueError where there is no image."""
        if not len(self.rows):
            raise ValueError(
                f"dataset={self.settings.name}: its {self.name} split holds no image (a set to evaluate on only), and "
                f"what was asked for needs one"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: torch.Tensor) -> Bytes:
        self.needed()
        chosen = self.rows[rows]
        images = self.store.read(chosen, True, self.recipe)
        if self.settings.augment in ("shift", "shift-flip"):
            images = shifted(images, self.settings.shift, flip=self.settings.augment == "shift-flip")
        return Bytes(images, self.store.labels[chosen], self.prepare)

    def batches(self, limit: int | None, batch_size: int, device: torch.device) -> Iterator[Labelled]:
        self.needed()
        rows = self.rows[subset(self.store.labels[self.rows], limit)]
        for part in rows.split(batch_size):
            yield Bytes(self.store.read(part, False, self.recipe), self.store.labels[part], self.prepare).to(device)

    def read_files(self, paths: list[str]) -> torch.Tensor:
        """Images that are not of the set, uint8 [N, 3, size, size], cropped only where the set's own would be."""
        recipe = self.recipe if isinstance(self.store, Files) else dataclasses.replace(self.recipe, resize=None)
        return Files(paths, torch.zeros(len(paths))).read(torch.arange(len(paths)), False, recipe)

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """float32 [N, channels, size, size], normalised, on the device of `images`."""
        x = images.float() / 255
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        x = x.expand(-1, self.channels, -1, -1) if x.shape[1] == 1 else x
        mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (self.recipe.mean, self.recipe.std))
        return ((x - mean) / std).contiguous()

    def fingerprints(self) -> list[str]:
        if self.digests is None:
            self.digests = Part(self.store, self.rows).fingerprints()
        return self.digests


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


def shifted(images: torch.Tensor, pixels: int, flip: bool) -> torch.Tensor:
    """Each image moved by up to `pixels` both ways (zeros come in) and, with `flip`, mirrored half of the time.

    Offsets come from torch's global generator, which checkpoints keep.
    """
    count, _, height, width = images.shape
    moves = torch.randint(0, 2 * pixels + 1, (2, count, 1))
    rows, columns = torch.arange(height) + moves[0], torch.arange(width) + moves[1]
    if flip:
        columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (pixels,) * 4)
    index = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@dataclass(kw_only=True)
class Images:
    """An image data set; `source` says where the images come from."""

    name: str = setting(**NAME_PATTERN)
    source: str = setting(choices=("digits", "idx", "torchvision", "folder"))
    path: str | None = setting(file="images")
    torchvision_name: str | None = setting(choices=(None, *TORCHVISION))
    size: int | None = setting(ge=8)
    channels: int | None = setting(choices=(None, 1, 3))
    mean: list[float]
    std: list[float] = setting(gt=0)
    augment: str = setting(choices=("none", "shift", "shift-flip", "resized-crop-flip"))
    shift: int = setting(ge=0)
    dev_share: float = setting(gt=0, lt=1)
    test_share: float = setting(gt=0, lt=1)
    kind = "vision"

    def __post_init__(self):
        problems = []
        if self.dev_share + self.test_share >= 1:
            problems.append(f"test_share must be below 1 - dev_share = {1 - self.dev_share:g}, got {self.test_share}")
        if len(self.mean) != len(self.std):
            problems.append(f"std must have as many numbers as mean ({len(self.mean)}), got {len(self.std)}")
        if (self.augment == "resized-crop-flip") and self.source != "folder":
            problems.append(f"augment=resized-crop-flip needs source=folder, got source={self.source}")
        if self.source == "folder" and self.size is None:
            problems.append("size must be a whole number >= 8 for source=folder, got null")
        if problems:
            raise ValueError("\n".join(problems))

    def problems(self, settings: Any) -> list[str]:
        if self.source == "torchvision":
            root = Path(self.path) if self.path else cache.folder()
            if not self.present(root) and not hub.reachable():
                return [
                    f"dataset={self.name}: {self.torchvision_name} is not in {root} and can't be downloaded; set "
                    f"dataset.path=<folder in torchvision's layout>"
                ]
            return []
        if self.source == "digits":
            return []
        if self.path is None or not Path(self.path).is_dir():
            wanted = "*-images-idx3-ubyte[.gz]" if self.source == "idx" else "one folder of images per class"
            return [f"dataset.path must be a folder with {wanted} for dataset={self.name}, got {self.path!r}"]
        if self.source == "idx" and not idx_parts(Path(self.path)):
            return [
                f"dataset.path must be a folder with *-images-idx3-ubyte[.gz] and *-labels-idx1-ubyte[.gz], got {self.path!r}"
            ]
        return []

    def present(self, root: Path) -> bool:
        try:
            getattr(torchvision.datasets, self.torchvision_name)(str(root), download=False)
        except RuntimeError:
            return False
        return True

    def load(self, seed: int) -> LabelledData:
        """Read and split. The split is a function of the labels only, never of `seed`: every run has the same test set.

        Where the set has a test part of its own that is test, and dev_share of the rest is dev; otherwise each class is
        cut by dev_share and test_share. Raises ValueError where files can't be read.
        """
        reader = {"digits": digits, "idx": idx, "torchvision": torchvision_set, "folder": folders}[self.source]
        train, test, classes = reader(self)
        seen: set[str] = set()
        held = torch.tensor(unique_rows(test.fingerprints(), seen)) if test else None
        kept = torch.tensor(unique_rows(train.fingerprints(), seen) if train else [], dtype=torch.int64)
        repeated = (len(train.labels) if train else 0) - len(kept) + (len(test.labels) - len(held) if test else 0)
        shares = {"fit": 1 - self.dev_share, "dev": self.dev_share}
        if test is None:
            shares = {"fit": 1 - self.dev_share - self.test_share, "dev": self.dev_share, "test": self.test_share}
            if int(train.labels[kept].bincount().max()) < len(SPLITS):  # too few of each class for three splits
                shares = {"fit": 0.0, "dev": 0.0, "test": 1.0}
        labels = train.labels[kept] if train else kept
        rows = {name: kept[part] for name, part in stratified(labels, shares).items()}
        splits = {
            n: ImageSplit(n, *((test, held) if test and n == "test" else (train or test, rows[n])), len(classes), self)
            for n in SPLITS
        }
        if not len(splits["test"]):
            raise ValueError(f"dataset={self.name}: no image for the test split")
        for split in splits.values():
            if len(self.mean) not in (1, split.channels):
                raise ValueError(f"dataset.mean must have 1 or {split.channels} numbers, got {len(self.mean)}")
        info = {
            "name": self.name, "source": self.path or self.torchvision_name or self.source, "size": splits["fit"].size,
            "channels": splits["fit"].channels, "augment": [self.augment, self.shift],
            "preprocessing": splits["test"].recipe.describe(),
            "repeated_images_left_out": repeated,
            "split_rule": f"stratified by class: {shares}" + ("; the set's own test part" if test else ""),
        }  # fmt: skip
        return LabelledData(**splits, classes=classes, info=info, kind="vision")


def use_recipe(data: LabelledData, recipe: Recipe) -> None:
    """Bring the images of a set to the network as its weights were trained to see them."""
    for split in (data.fit, data.dev, data.test):
        split.recipe = recipe
    data.info["preprocessing"] = recipe.describe()


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


def folders(settings: Images) -> tuple[Files | None, Files | None, list[str]]:
    """Class folders (ImageNet's layout): <path>/train and <path>/val (or test), one of them alone, or the classes
    directly in <path>."""
    root, parts = Path(settings.path), []
    names = [next((n for n in group if (root / n).is_dir()), None) for group in (("train",), ("val", "test"))]
    try:
        for name in names if any(names) else [""]:
            if name is not None:
                parts.append(torchvision.datasets.ImageFolder(str(root / name)))
    except FileNotFoundError as error:
        raise ValueError(f"dataset.path: {' '.join(str(error).split())}") from error
    if len({tuple(p.classes) for p in parts}) > 1:
        raise ValueError(f"dataset.path: {root}/train and {root}/{names[1]} have different classes")
    stores = [Files([f for f, _ in p.samples], torch.tensor(p.targets), settings.size, settings.augment) for p in parts]
    train = stores.pop(0) if names[0] or not any(names) else None
    return train, stores[0] if stores else None, parts[0].classes
