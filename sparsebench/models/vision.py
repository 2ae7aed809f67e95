"""Image classifiers by name: networks of torchvision and timm, and a few small ones of our own (networks.py).

Convolutional networks are traced so that each ReLU is a module (modules/activation_map.py); torchvision's vision
transformers stand in transformers' modules. Weights come from the library's server, from a file, from training here, or
are random (timing only). Images are prepared as the weights want them (recipes.py), classes numbered as they do (classes.py).
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
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
from sparsebench.data.images import USUAL_SIZE, Recipe, use_recipe
from sparsebench.measure import quality, shape_bias
from sparsebench.models import Loaded, recipes
from sparsebench.models.classes import align
from sparsebench.models.networks import CIFAR_RESNETS, SIZES, CifarResNet, LeNet5
from sparsebench.models.weights import classes_in, file_problem, fill, named, read_weights
from sparsebench.modules.activation_map import isolate, maps_of
from sparsebench.records import files, machine
from sparsebench.training import from_scratch
from sparsebench.training.loop import Training, classification_loss
from sparsebench.training.work import Work

log = logging.getLogger(__name__)

TORCHVISION = tuple(torchvision.models.list_models(module=torchvision.models))  # its classifiers
BUILTIN = ("lenet5", *CIFAR_RESNETS, "vit_tiny")
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
HUGE = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16}
VIT = {  # vision transformers in transformers' modules; all but vit_tiny have torchvision's shapes
    "vit_b_16": BASE | {"patch_size": 16}, "vit_b_32": BASE | {"patch_size": 32},
    "vit_l_16": LARGE | {"patch_size": 16}, "vit_l_32": LARGE | {"patch_size": 32}, "vit_h_14": HUGE | {"patch_size": 14},
    "vit_tiny": {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 4},
}  # fmt: skip
STEMS = {  # first convolution and first pooling (None: the first convolution alone halves the image)
    "resnet": ("conv1", "maxpool"),
    "densenet": ("features.conv0", "features.pool0"),
    "googlenet": ("conv1.conv", "maxpool1"),
    "mobilenet_v2": ("features.0.0", None),
}
SUFFIXES = (".safetensors", ".pth", ".pt", ".th", ".bin", ".ckpt")  # of files with a state dict
FILE = "a file of a state dict (.safetensors, or torch's format with tensors only)"


@dataclass(kw_only=True)
class Vision:
    """An image classifier by the name of its architecture; its classes are the weights' own, else those of the data."""

    name: str = setting(**NAME_PATTERN)
    library: str = setting(choices=("builtin", "torchvision", "timm"))
    architecture: str | None
    stem: str = setting(choices=("imagenet", "cifar"))
    weights: str = setting(choices=("pretrained", "random", "scratch"))
    path: str | None = setting(file="model")
    recipe: str = setting(choices=("weights", "dataset"))
    train: Training | None
    kind = "vision"

    def __post_init__(self):
        networks = {"builtin": BUILTIN, "torchvision": TORCHVISION}.get(self.library)
        if networks and self.architecture not in networks:
            raise ValueError(unknown(self.architecture, networks, self.library))
        if self.stem == "cifar" and (self.library != "torchvision" or not self.architecture.startswith(tuple(STEMS))):
            raise ValueError(f"stem must be imagenet for {self.architecture}, got 'cifar'")
        if self.weights == "scratch" and self.train is None:
            raise ValueError("weights=scratch needs model.train, got null")
        if self.weights != "pretrained" and self.path is not None and self.path.endswith(SUFFIXES):
            raise ValueError(f"weights must be pretrained where model.path is set, got {self.weights!r}")

    @property
    def repository(self) -> str | None:
        """The folder or Hub id at `path` that says itself which network of timm it holds."""
        single = self.path is None or self.path.endswith(SUFFIXES) or Path(self.path).is_file()
        return None if single or self.library != "timm" or self.weights != "pretrained" else self.path

    def problems(self, settings: Any) -> list[str]:
        lines = []
        cues = settings.eval.classifier.cue_conflict
        wrong = cues is not None and shape_bias.problem(cues)
        if wrong:
            lines.append(f"eval.classifier.cue_conflict must be a folder of cue-conflict images: {wrong}")
        size = getattr(settings.dataset, "size", None)
        if self.architecture == "lenet5" and size not in (28, None):
            lines.append(f"dataset.size must be 28 for model={self.name}, got {size}")
        if self.library == "timm":
            lines += self.timm_problems()
        return lines + (self.path_problems() if self.weights == "pretrained" else [])

    def timm_problems(self) -> list[str]:
        if importlib.util.find_spec("timm") is None:
            return [f"model={self.name} needs timm: pip install 'sparsebench[timm]'"]
        import timm

        if self.architecture is None:
            needed = f"model.architecture must be a network of timm for model={self.name}, got null"
            return [] if self.repository else [needed]
        if timm.is_model(self.architecture):
            return []
        return [f"model.{unknown(self.architecture, timm.list_models(), 'timm')}"]

    def path_problems(self) -> list[str]:
        if self.repository:
            problem = hub.model_problem(self.repository, "model.path")
            return [problem] if problem else []
        if self.path is not None:
            problem = file_problem(Path(self.path)) if Path(self.path).is_file() else "no file"
            return [f"model.path must be {FILE}, got {self.path!r} ({problem})"] if problem else []
        if self.library == "timm":
            known = f"{FILE}, a folder as timm saves it, or a Hub id like timm/resnet18.a1_in1k"
            return [f"model.path must be {known} for model={self.name}, got null"]
        if self.library == "builtin" or self.stem == "cifar":
            return [f"model.path must be {FILE} for model={self.name}: torchvision has none, got null"]
        if not self.downloaded().exists() and not hub.reachable():
            return [
                f"model.weights=pretrained: torchvision's weights of {self.architecture} are not in "
                f"{self.downloaded().parent} and can't be downloaded; set model.path=<file> or model.weights=random"
            ]
        return []

    def downloaded(self) -> Path:
        """Where torchvision keeps its pretrained weights."""
        url = torchvision.models.get_model_weights(self.architecture).DEFAULT.url
        return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])

    def home(self) -> Path:
        """The folder of `repository`; one of the Hub as the local cache has it, downloaded first where it may be."""
        if Path(self.repository).is_dir():
            return Path(self.repository)
        from huggingface_hub import snapshot_download

        source = {"revision": hub.commit(self.repository, None), "local_files_only": not hub.reachable()}
        return Path(snapshot_download(self.repository, allow_patterns=["config.json", "model.safetensors"], **source))

    def weights_file(self) -> Path:
        """The file of the pretrained weights, downloaded first where it is the library's and missing."""
        if self.repository:
            return self.home() / "model.safetensors"
        if self.path is not None:
            return Path(self.path)
        if not self.downloaded().exists():
            torchvision.models.get_model_weights(self.architecture).DEFAULT.get_state_dict(check_hash=True)
        return self.downloaded()

    # -----------------------------------------------------------------------------------------------------------------

    def plain(self, channels: int, outputs: int, size: int, published: bool = False) -> nn.Module:
        """The network as its library builds it, random weights. published: for torchvision's own weights."""
        if self.library == "timm":
            return self.timm_network(channels, outputs)
        if self.architecture == "lenet5":
            return LeNet5(channels, outputs)
        if self.library == "builtin" and self.architecture in CIFAR_RESNETS:
            return CifarResNet(channels, outputs, CIFAR_RESNETS[self.architecture])
        if self.architecture in VIT:
            shape = VIT[self.architecture]
            if size % shape["patch_size"]:
                raise ValueError(
                    f"dataset.size must be a multiple of {shape['patch_size']} for {self.name}, got {size}"
                )
            settings = transformers.ViTConfig(
                **shape, intermediate_size=4 * shape["hidden_size"], image_size=size, num_channels=channels,
                num_labels=outputs, layer_norm_eps=1e-6, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )  # fmt: skip
            return transformers.ViTForImageClassification(settings)
        extra = {}
        if self.architecture in ("googlenet", "inception_v3"):  # published weights expect inputs scaled otherwise
            extra = {"aux_logits": False, "init_weights": not published, "transform_input": published}
        module = torchvision.models.get_model(self.architecture, weights=None, num_classes=outputs, **extra)
        return self.with_stem(module, channels)

    def with_stem(self, module: nn.Module, channels: int) -> nn.Module:
        """A network of torchvision with its first convolution for so many channels, or for small images."""
        family = next((f for f in STEMS if self.architecture.startswith(f)), None)
        first, pool = STEMS[family] if family else (first_convolution(module), None)
        old = module.get_submodule(first)
        cifar = {"kernel_size": 3, "stride": 1, "padding": 1}
        shape = cifar if self.stem == "cifar" else {k: getattr(old, k) for k in cifar}
        if self.stem == "cifar" or channels != old.in_channels:
            module.set_submodule(first, nn.Conv2d(channels, old.out_channels, bias=old.bias is not None, **shape))
        if self.stem == "cifar" and pool is not None:
            module.set_submodule(pool, nn.Identity())
        return module

    def timm_network(self, channels: int, outputs: int) -> nn.Module:
        """A network of timm: what the folder or Hub repository at `path` says it is, else `architecture`."""
        import timm

        name = f"local-dir:{self.home()}" if self.repository else self.architecture
        return timm.create_model(name, pretrained=False, num_classes=outputs, in_chans=channels)

    def pretrained(self, data) -> tuple[nn.Module, str, str]:
        """(the network with its weights, their file, how its classes were told); `data` is prepared for it."""
        channels, guess, usual = data.fit.channels, len(data.classes), self.input_size(data)
        path = self.weights_file()
        weights = named(read_weights(path), str(path))
        module = self.plain(channels, guess, usual)
        outputs = classes_in(weights, module, guess)
        recipe, names = self.recipe_of(module, path, outputs)
        size = data.fit.fixed_size or (recipe.size if recipe else usual)
        if (outputs, size) != (guess, usual) or recipe is not None:
            module = self.plain(channels, outputs, size, published=recipe is not None)
        fill(module, weights, str(path))
        self.prepare(data, recipe)
        told = align(data, outputs, names if names and len(names) == outputs else None, self.name)
        return module, str(path), told

    def recipe_of(
        self, module: nn.Module, path: Path, outputs: int
    ) -> tuple[Recipe | None, list[tuple[str, ...]] | None]:
        """(how the weights in `path` want their images, the names of their classes), where their library says so."""
        if self.recipe == "dataset" or self.library == "builtin" or self.stem == "cifar":
            return None, None
        if self.library == "timm":
            return recipes.of_timm(module)
        return recipes.of_torchvision(self.architecture, path, outputs) or (None, None)

    def input_size(self, data) -> int:
        """Pixels of the network's input where no recipe says another size."""
        return data.fit.fixed_size or SIZES.get(self.architecture, USUAL_SIZE)

    def prepare(self, data, recipe: Recipe | None) -> None:
        """Images of `data` by `recipe` where it fits their channels, else by the data set's own means and the usual crop."""
        if recipe is not None and data.fit.channels == len(recipe.mean):
            use_recipe(data, recipe.at(data.fit.fixed_size or recipe.size))
        elif data.fit.size != self.input_size(data):
            use_recipe(data, data.fit.recipe.at(self.input_size(data)))

    def load(self, work: Work, data) -> Loaded:
        """The network on the target's device in its dtype. Raises ValueError where weights or classes don't fit it."""
        torch.manual_seed(work.seed)
        source, told, training = "random weights", "those of the data set", None
        if self.weights == "pretrained":
            module, source, told = self.pretrained(data)
        else:
            self.prepare(data, None)
            module = self.plain(data.fit.channels, len(data.classes), data.fit.size)
        shape = [data.fit.channels, data.fit.size, data.fit.size]
        module = module if self.architecture in VIT else isolate(module, torch.zeros(1, *shape))
        module = module.to(work.hardware.torch_device)
        if self.weights == "scratch":
            folder = self.trained(module, work, data)
            safetensors.torch.load_model(module, folder / "model.safetensors", device=str(work.hardware.torch_device))
            source, training = str(folder), json.loads((folder / "training.json").read_text())["dev"]
        module = module.to(work.hardware.torch_dtype).eval().requires_grad_(False)
        info = {
            "name": self.name,
            "num_parameters": sum(p.numel() for p in module.parameters()),
            "source": source,
            "library": self.library,
            "architecture": self.architecture,
            "stem": self.stem,
            "input": shape,
            "classes": len(data.classes),
            "classes_told": told,
            "maps": [m.site for m in maps_of(module)],
            "dev_after_training": training,
        }
        return Loaded(module, None, info)

    def trained(self, module: nn.Module, work: Work, data) -> Path:
        """The folder of this network trained by `model.train` on data.fit with work.seed; trained first where missing."""
        shape = {
            "architecture": [
                self.library, self.architecture, self.stem, data.fit.channels, data.fit.size, len(data.classes),
            ],
            "train": vars(self.train),
            "data": data.describe()["fit"]["fingerprint"],
            "augment": data.info["augment"],
            "seed": work.seed,
            "machine": machine.machine(),
        }  # fmt: skip

        def judge(module, history) -> dict[str, Any]:
            metrics, _ = quality.classification_quality(module, data.dev, None, work.batch_size)
            return {"dev": {k: metrics[k] for k in ("accuracy", "nll", "ece")}}

        def save(module, folder: Path) -> None:
            content = safetensors.torch.save({k: v.cpu().contiguous() for k, v in module.state_dict().items()})
            files.write_atomic(folder / "model.safetensors", content)

        return from_scratch.trained(
            self, shape, work, lambda: (module, data.fit), judge, save, loss=classification_loss
        )


def first_convolution(module: nn.Module) -> str:
    """The path of the convolution that is registered first, which reads the image in every network of torchvision."""
    return next(name for name, m in module.named_modules() if isinstance(m, nn.Conv2d))


def unknown(name: str | None, networks: tuple[str, ...] | list[str], library: str) -> str:
    """The line about an architecture that its library does not have."""
    if len(networks) <= 10:
        return f"architecture must be one of {', '.join(networks)} for model.library={library}, got {name!r}"
    near = difflib.get_close_matches(str(name), networks, n=3)
    hint = f" (did you mean {', '.join(near)}?)" if near else ""
    return f"architecture must be one of the {len(networks)} networks of {library}{hint}, got {name!r}"
