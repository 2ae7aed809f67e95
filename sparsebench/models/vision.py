"""Image classifiers: LeNet5, the networks of torchvision, vision transformers of transformers.

Convolutional networks are traced so that each ReLU is a module (modules/activation_map.py). Weights come from
torchvision where its server answers, from a file, from training here, or are random (timing only).
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
import transformers
from torch import nn

from sparsebench.config import NAME_PATTERN, setting
from sparsebench.data import hub
from sparsebench.data.images import Recipe, use_recipe
from sparsebench.measure import quality, shape_bias
from sparsebench.models import Loaded
from sparsebench.modules.activation_map import isolate, maps_of
from sparsebench.records import files, machine
from sparsebench.training import from_scratch
from sparsebench.training.loop import Training, classification_loss
from sparsebench.training.work import Work

log = logging.getLogger(__name__)

TORCHVISION = ("resnet18", "resnet34", "resnet50", "googlenet", "densenet121", "mobilenet_v2")
VIT = {  # hidden size, blocks, heads, patch; vit_b_16's shapes are torchvision's
    "vit_b_16": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16},
    "vit_tiny": {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 4},
}
STEMS = {  # first convolution and first pooling (None: the first convolution alone halves the image)
    "resnet": ("conv1", "maxpool"),
    "densenet": ("features.conv0", "features.pool0"),
    "googlenet": ("conv1.conv", "maxpool1"),
    "mobilenet": ("features.0.0", None),
}


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


@dataclass(kw_only=True)
class Vision:
    """An image classifier by the name of its architecture; classes, channels and image size come from the data set."""

    name: str = setting(**NAME_PATTERN)
    architecture: str = setting(choices=("lenet5", *TORCHVISION, *VIT))
    stem: str = setting(choices=("imagenet", "cifar"))
    weights: str = setting(choices=("pretrained", "random", "scratch"))
    path: str | None = setting(file="model")
    train: Training | None
    kind = "vision"

    def __post_init__(self):
        if self.stem == "cifar" and self.architecture not in TORCHVISION:
            raise ValueError(f"stem must be imagenet for {self.architecture}, got 'cifar'")
        if self.weights == "scratch" and self.train is None:
            raise ValueError("weights=scratch needs model.train, got null")

    def problems(self, settings: Any) -> list[str]:
        problems = []
        cues = settings.eval.classifier.cue_conflict
        wrong = cues is not None and shape_bias.problem(cues)
        if wrong:
            problems.append(f"eval.classifier.cue_conflict must be a folder of cue-conflict images: {wrong}")
        if settings.dataset.kind == "vision" and self.architecture == "lenet5" and settings.dataset.size != 28:
            problems.append(f"dataset.size must be 28 for model={self.name}, got {settings.dataset.size}")
        if self.weights == "pretrained" and self.path is None:
            if self.architecture in ("lenet5", "vit_tiny") or self.stem == "cifar":
                problems.append(
                    f"model.path must be a file of weights for model={self.name}: torchvision has none, got null"
                )
            elif not self.downloaded().exists() and not hub.reachable():
                problems.append(
                    f"model.weights=pretrained: torchvision's weights of {self.architecture} are not in "
                    f"{self.downloaded().parent} and can't be downloaded; set model.path=<file> or model.weights=scratch"
                )
        if self.path is not None and not Path(self.path).is_file():
            problems.append(
                f"model.path must be an existing .safetensors or .pth file of a state dict, got {self.path!r}"
            )
        return problems

    def downloaded(self) -> Path:
        """Where torchvision keeps its pretrained weights."""
        url = torchvision.models.get_model_weights(self.architecture).DEFAULT.url
        return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])

    def plain(self, channels: int, classes: int, size: int) -> nn.Module:
        """The network as its library builds it, random weights."""
        if self.architecture == "lenet5":
            return LeNet5(channels, classes)
        if self.architecture in VIT:
            shape = VIT[self.architecture]
            if size % shape["patch_size"]:
                raise ValueError(
                    f"dataset.size must be a multiple of {shape['patch_size']} for {self.name}, got {size}"
                )
            settings = transformers.ViTConfig(
                **shape, intermediate_size=4 * shape["hidden_size"], image_size=size, num_channels=channels,
                num_labels=classes, layer_norm_eps=1e-6, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )  # fmt: skip
            return transformers.ViTForImageClassification(settings)
        extra = {}
        if self.architecture == "googlenet":  # its published weights expect inputs scaled otherwise than the others'
            official = self.weights == "pretrained" and self.path is None
            extra = {"aux_logits": False, "init_weights": not official, "transform_input": official}
        module = torchvision.models.get_model(self.architecture, weights=None, num_classes=classes, **extra)
        family = next(f for f in STEMS if self.architecture.startswith(f))
        first, pool = STEMS[family]
        old = module.get_submodule(first)
        cifar = {"kernel_size": 3, "stride": 1, "padding": 1}
        shape = cifar if self.stem == "cifar" else {k: getattr(old, k) for k in cifar}
        if self.stem == "cifar" or channels != old.in_channels:
            new = nn.Conv2d(channels, old.out_channels, bias=old.bias is not None, **shape)
            module.get_submodule(first.rpartition(".")[0]).register_module(first.rpartition(".")[2], new)
        if self.stem == "cifar" and pool is not None:
            module.get_submodule(pool.rpartition(".")[0]).register_module(pool.rpartition(".")[2], nn.Identity())
        return module

    def load(self, work: Work, data) -> Loaded:
        """The network on the target's device in its dtype. Raises ValueError where weights don't fit it."""
        channels, classes, size = data.fit.channels, len(data.classes), data.fit.size
        torch.manual_seed(work.seed)
        module, source = self.plain(channels, classes, size), "random weights"
        if self.weights == "pretrained":
            path = Path(self.path) if self.path else self.downloaded()
            if self.path is None and not path.exists():
                torchvision.models.get_model_weights(self.architecture).DEFAULT.get_state_dict(check_hash=True)
            fill(module, read_weights(path), str(path))
            source, recipe = str(path), self.recipe(path, size)
            if recipe is not None and channels == len(recipe.mean):
                use_recipe(data, recipe)
        module = (module if self.architecture in VIT else isolate(module)).to(work.hardware.torch_device)
        training = None
        if self.weights == "scratch":
            folder = self.trained(module, work, data)
            safetensors.torch.load_model(module, folder / "model.safetensors", device=str(work.hardware.torch_device))
            source, training = str(folder), json.loads((folder / "training.json").read_text())["dev"]
        module = module.to(work.hardware.torch_dtype).eval().requires_grad_(False)
        info = {
            "name": self.name,
            "num_parameters": sum(p.numel() for p in module.parameters()),
            "source": source,
            "architecture": self.architecture,
            "stem": self.stem,
            "input": [channels, size, size],
            "classes": classes,
            "maps": [m.site for m in maps_of(module)],
            "dev_after_training": training,
        }
        return Loaded(module, None, info)

    def recipe(self, path: Path, size: int) -> Recipe | None:
        """How images of `size` are prepared for torchvision's weights of this name; None for other weights."""
        if self.architecture not in (*TORCHVISION, "vit_b_16"):
            return None
        for weights in torchvision.models.get_model_weights(self.architecture):
            if weights.url.rpartition("/")[2] == path.name:
                own = weights.transforms()
                resize = round(size * own.resize_size[0] / own.crop_size[0])
                norm = (tuple(own.mean), tuple(own.std))
                return Recipe(f"torchvision {weights}", size, resize, *norm, own.interpolation.value)
        return None

    def trained(self, module: nn.Module, work: Work, data) -> Path:
        """The folder of this network trained by `model.train` on data.fit with work.seed; trained first where missing."""
        shape = {
            "architecture": [self.architecture, self.stem, data.fit.channels, data.fit.size, len(data.classes)],
            "train": vars(self.train),
            "data": data.describe()["fit"]["fingerprint"],
            "augment": data.info["augment"],
            "seed": work.seed,
            "machine": machine.machine(),
        }

        def judge(module, history) -> dict[str, Any]:
            metrics, _ = quality.classification_quality(module, data.dev, None, work.batch_size)
            return {"dev": {k: metrics[k] for k in ("accuracy", "nll", "ece")}}

        def save(module, folder: Path) -> None:
            content = safetensors.torch.save({k: v.cpu().contiguous() for k, v in module.state_dict().items()})
            files.write_atomic(folder / "model.safetensors", content)

        return from_scratch.trained(
            self, shape, work, lambda: (module, data.fit), judge, save, loss=classification_loss
        )


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from .safetensors, or from torch's format with tensors only (no code in it is run)."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, weights_only=True, map_location="cpu")
        return content.get("state_dict", content)
    except Exception as error:
        raise ValueError(f"model.path: {path} can't be read as a state dict ({error})".splitlines()[0]) from error


def fill(module: nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Load `weights` (older torchvision names too; a torchvision ViT is translated). Raises ValueError where they don't fit."""
    weights = {renamed(k): v for k, v in weights.items()}
    if "encoder.pos_embedding" in weights:
        try:
            weights = translate_vit(weights)
        except KeyError as error:
            raise ValueError(f"model: {source} doesn't fit the network: {error.args[0]} is missing") from error
    weights = {k: v for k, v in weights.items() if not k.startswith(("aux1.", "aux2."))}  # GoogLeNet's training heads
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"model: {source} doesn't fit the network: {' '.join(str(error).split())[:400]}") from error


def renamed(key: str) -> str:
    """torchvision's present name of a parameter for the one in its older files (DenseNet, ViT)."""
    key = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key)
    return key.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")


def translate_vit(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """torchvision's names of a vision transformer to transformers' names; the joint qkv is split."""
    renamed = {
        "vit.embeddings.cls_token": weights["class_token"],
        "vit.embeddings.position_embeddings": weights["encoder.pos_embedding"],
    }
    pairs = {
        "conv_proj": "vit.embeddings.patch_embeddings.projection",
        "encoder.ln": "vit.layernorm",
        "heads.head": "classifier",
    }
    inner = {"ln_1": "layernorm_before", "ln_2": "layernorm_after", "self_attention.out_proj": "attention.o_proj",
             "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2"}  # fmt: skip
    depth = 1 + max(int(k.split(".")[2].rpartition("_")[2]) for k in weights if k.startswith("encoder.layers."))
    for layer in range(depth):
        old, new = f"encoder.layers.encoder_layer_{layer}", f"vit.layers.{layer}"
        pairs |= {f"{old}.{a}": f"{new}.{b}" for a, b in inner.items()}
        for part in ("weight", "bias"):
            joint = weights[f"{old}.self_attention.in_proj_{part}"].chunk(3)
            for role, tensor in zip("qkv", joint, strict=True):
                renamed[f"{new}.attention.{role}_proj.{part}"] = tensor
    return renamed | {f"{b}.{part}": weights[f"{a}.{part}"] for a, b in pairs.items() for part in ("weight", "bias")}
