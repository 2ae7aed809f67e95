"""How a network's weights want their images: torchvision's transforms, timm's data configuration, a processor of transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torchvision
from torch import nn

from sparsebench.data.images import Recipe

PIL_MODES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
MODES = ("bilinear", "bicubic")  # those that torchvision has for tensors, antialiased


def of_torchvision(architecture: str, path: Path, classes: int) -> tuple[Recipe, list[tuple[str, ...]]] | None:
    """(recipe, names of each class) of the published weights in `path`; None where these weights are not torchvision's.

    A file under another name that knows as many classes as the published weights gets the recipe of the first of them.
    """
    published = list(torchvision.models.get_model_weights(architecture))
    for weights in published:
        if weights.url.rpartition("/")[2] == path.name:
            return recipe_of(weights, f"torchvision {weights}"), [(name,) for name in weights.meta["categories"]]
    first = published[0]
    names = [(name,) for name in first.meta["categories"]]
    if classes != len(names):
        return None
    return recipe_of(first, f"torchvision {first}, assumed from the number of classes"), names


def recipe_of(weights: Any, name: str) -> Recipe:
    own = weights.transforms()
    norm = (tuple(own.mean), tuple(own.std))
    return Recipe(name, own.crop_size[0], own.resize_size[0], *norm, own.interpolation.value)


def of_timm(module: nn.Module) -> tuple[Recipe, list[tuple[str, ...]] | None]:
    """(recipe, names of each class) of a timm network's pretrained configuration. Raises ValueError for rare crops."""
    import timm

    own = timm.data.resolve_data_config(model=module, use_test_size=True)
    config = module.pretrained_cfg
    name = ".".join(filter(None, (config.get("architecture"), config.get("tag"))))
    size, share, mode = own["input_size"][-1], own["crop_pct"], own["crop_mode"]
    if own["input_size"][1] != size or own["interpolation"] not in MODES or not (
        mode == "center" or (mode == "squash" and share == 1)
    ):  # fmt: skip
        raise ValueError(f"model: timm's recipe of {name} is not supported ({own}): set model.recipe=dataset")
    resize = None if mode == "squash" else math.floor(size / share)
    recipe = Recipe(f"timm {name}", size, resize, tuple(own["mean"]), tuple(own["std"]), own["interpolation"])
    return recipe, imagenet_names(config.get("num_classes"), config.get("label_names"))


def imagenet_names(count: int | None, given: list[str] | None) -> list[tuple[str, ...]] | None:
    """Names of each class of a timm network: those it states, or ImageNet-1k's WordNet ids and words."""
    if given:
        return [(name,) for name in given]
    if count != 1000:
        return None
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    words = [[w.strip() for w in info.index_to_description(i).split(",")] for i in range(count)]
    return [(words[i][0], *words[i][1:], info.index_to_label_name(i)) for i in range(count)]


def of_processor(processor: Any, name: str) -> Recipe:
    """The recipe of an image processor of transformers. Raises ValueError for one that does something else."""
    settings = processor.to_dict()
    size, crop = sides(settings.get("size")), sides(settings.get("crop_size"))
    resizes, crops = settings.get("do_resize"), settings.get("do_center_crop")
    edge = (settings.get("size") or {}).get("shortest_edge")
    share = settings.get("crop_pct")
    if resizes and size and not crops:
        side, resize = size, None
    elif resizes and edge and share:  # ConvNeXt: resized to edge / crop_pct below 384, as a whole from there on
        side, resize = (edge, math.floor(edge / share)) if edge < 384 else (edge, None)
    elif resizes and edge and crops and crop:
        side, resize = crop, edge
    elif resizes and size and crops and crop and size == crop:
        side, resize = crop, None
    else:
        raise ValueError(
            f"model: the image processor of {name} is not supported (size {settings.get('size')}, crop "
            f"{settings.get('crop_size') if crops else None}): set model.recipe=dataset"
        )
    channels = len(settings.get("image_mean") or (0, 0, 0))
    normalised = settings.get("do_normalize")
    mean = settings["image_mean"] if normalised else [0.0] * channels
    std = settings["image_std"] if normalised else [1.0] * channels
    factor = 255 * settings["rescale_factor"] if settings.get("do_rescale") else 255  # ours are in [0, 1] before this
    mode = PIL_MODES.get(int(settings.get("resample") or 2), "")
    if mode not in MODES:
        raise ValueError(f"model: the image processor of {name} resizes by {mode!r}: set model.recipe=dataset")
    norm = (tuple(m / factor for m in mean), tuple(s / factor for s in std))
    return Recipe(f"processor of {name}", side, resize, *norm, mode)


def sides(size: Any) -> int | None:
    """The side of a square size {height, width} of a processor, or None."""
    if isinstance(size, dict) and size.get("height") and size.get("height") == size.get("width"):
        return int(size["height"])
    return None
