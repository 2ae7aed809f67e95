"""Labelled images for classifiers: scikit-learn's digits, idx files (MNIST's format), torchvision's sets, class folders.

Pixels stay bytes until they are on the device, where they are normalised. An image that has the network's size is left
alone; others are brought to it by a `Recipe`, the weights' own where they have one. fit is for training, dev for choices,
test is only ever scored; an image that occurs twice is kept once, so no picture stands in two splits. A set without
images to fit on (one per class, or a `val` folder alone) can still be evaluated, and `cut` says what else to do with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torchvision.transforms import v2

from sparsebench import cache
from sparsebench.config import NAME_PATTERN, setting
from sparsebench.data import hub
from sparsebench.data.idx import idx_parts
from sparsebench.data.image_sources import (
    TORCHVISION,
    Files,
    Memory,
    Part,
    digits,
    folders,
    idx,
    torchvision_set,
)
from sparsebench.data.labelled import SPLITS, Labelled, LabelledData, stratified, subset, unique_rows

USUAL_SIZE = 224  # pixels, where neither data set nor weights say a size
CUTS = {"class": "stratified by class", "random": "at random, whatever the class", "none": "all of it is test"}


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

    def at(self, size: int) -> Recipe:
        """The same for a network of another input size: what is cut off stays the same share."""
        resize = None if self.resize is None else round(size * self.resize / self.size)
        return dataclasses.replace(self, size=size, resize=resize)

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


class ImageSplit:
    """One split. Indexing gives training batches (augmented), `batches` plain ones in order."""

    unit = "images"

    def __init__(self, name: str, store: Memory | Files, rows: torch.Tensor, classes: int, settings: Images):
        self.name, self.store, self.rows, self.classes, self.settings = name, store, rows, classes, settings
        self.fixed_size = settings.size or (store.images.shape[-1] if isinstance(store, Memory) else None)
        size = self.fixed_size or USUAL_SIZE
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
            way = "random" if self.classes > len(self.store.labels) / len(SPLITS) else "class"
            raise ValueError(
                f"dataset={self.settings.name}: its {self.name} split holds no image (a set to evaluate on only), and "
                f"what was asked for needs one: dataset.cut={way} takes it from the set, {CUTS[way]}"
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
    cut: str = setting(choices=("auto", *CUTS))
    kind = "vision"

    def __post_init__(self):
        problems = []
        if self.dev_share + self.test_share >= 1:
            problems.append(f"test_share must be below 1 - dev_share = {1 - self.dev_share:g}, got {self.test_share}")
        if len(self.mean) != len(self.std):
            problems.append(f"std must have as many numbers as mean ({len(self.mean)}), got {len(self.std)}")
        if (self.augment == "resized-crop-flip") and self.source != "folder":
            problems.append(f"augment=resized-crop-flip needs source=folder, got source={self.source}")
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

        Where the set has a test part of its own that is test, and dev_share of the rest is dev; otherwise `cut` decides.
        Raises ValueError where files can't be read.
        """
        reader = {"digits": digits, "idx": idx, "torchvision": torchvision_set, "folder": folders}[self.source]
        train, test, classes = reader(self)
        if self.cut != "auto" and train and test:
            raise ValueError(f"dataset.cut must be auto for a set with parts of its own, got {self.cut!r}")
        if self.cut in ("class", "random") and train is None:
            train, test = test, None
        seen: set[str] = set()
        held = torch.tensor(unique_rows(test.fingerprints(), seen)) if test else None
        kept = torch.tensor(unique_rows(train.fingerprints(), seen) if train else [], dtype=torch.int64)
        repeated = (len(train.labels) if train else 0) - len(kept) + (len(test.labels) - len(held) if test else 0)
        labels = train.labels[kept] if train else kept
        shares, rule = self.shares(labels, test is not None)
        groups = torch.zeros_like(labels) if rule == "random" else labels
        rows = {name: kept[part] for name, part in stratified(groups, shares).items()}
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
            "split_rule": f"{CUTS[rule]}: {shares}" + ("; the set's own test part" if test else ""),
        }  # fmt: skip
        return LabelledData(**splits, classes=classes, info=info, kind="vision")

    def shares(self, labels: torch.Tensor, has_test: bool) -> tuple[dict[str, float], str]:
        """(share of each split, how the set is cut: one of CUTS). labels: of the images that no part holds out."""
        if has_test:
            return {"fit": 1 - self.dev_share, "dev": self.dev_share}, "class"
        enough = len(SPLITS) <= int(labels.bincount().max())  # of a class, for three splits
        rule = ("class" if enough else "none") if self.cut == "auto" else self.cut
        if rule == "none":
            return {"fit": 0.0, "dev": 0.0, "test": 1.0}, rule
        return {"fit": 1 - self.dev_share - self.test_share, "dev": self.dev_share, "test": self.test_share}, rule


def use_recipe(data: LabelledData, recipe: Recipe) -> None:
    """Bring the images of a set to the network as its weights were trained to see them."""
    for split in (data.fit, data.dev, data.test):
        split.recipe = recipe
    data.info |= {"size": recipe.size, "preprocessing": recipe.describe()}
