"""Image classifiers of transformers, from a folder or the Hub: vision transformers and convolutional networks.

Vision transformers whose blocks are known (sites.py) take the methods for experts; networks with ReLUs those for maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from sparsebench.config import NAME_PATTERN, setting
from sparsebench.data import hub
from sparsebench.data.images import use_recipe
from sparsebench.measure import shape_bias
from sparsebench.models import Loaded, recipes
from sparsebench.models.checkpoint import load_whole
from sparsebench.models.classes import align, names_of
from sparsebench.modules.activation_map import in_place, maps_of
from sparsebench.training.work import Work


@dataclass(kw_only=True)
class ImageClassifier:
    """An image classifier by its folder or Hub id; its classes and the preparation of images are its own."""

    name: str = setting(**NAME_PATTERN)
    path: str | None = setting(file="model")
    revision: str | None
    recipe: str = setting(choices=("weights", "dataset"))
    kind = "vision"

    def __post_init__(self):
        if self.path is None:
            raise ValueError("path must be a folder with config.json and *.safetensors, or a Hub id, got null")

    def problems(self, settings: Any) -> list[str]:
        cues = settings.eval.classifier.cue_conflict
        wrong = cues is not None and shape_bias.problem(cues)
        lines = [f"eval.classifier.cue_conflict must be a folder of cue-conflict images: {wrong}"] if wrong else []
        problem = hub.model_problem(self.path, "model.path")
        return [*lines, problem] if problem else lines

    def load(self, work: Work, data) -> Loaded:
        """The classifier on the target's device in its dtype. Raises ValueError where classes or images don't fit it."""
        torch.manual_seed(work.seed)
        source = {"revision": hub.commit(self.path, self.revision), "local_files_only": not hub.reachable()}
        auto = transformers.AutoModelForImageClassification
        module = load_whole(auto, self.path, dtype=torch.float32, use_safetensors=True, **source)
        if self.recipe == "weights":
            self.prepare(data, source)
        told = align(data, module.config.num_labels, names_of(module.config.id2label), self.name)
        shape = [data.fit.channels, data.fit.size, data.fit.size]
        wanted = getattr(module.config, "num_channels", shape[0])
        if wanted != shape[0]:
            raise ValueError(f"model: {self.path} reads {wanted} channels, dataset.channels is {shape[0]}")
        module = in_place(module.eval(), torch.zeros(1, *shape))
        module = module.to(work.hardware.torch_device, work.hardware.torch_dtype).eval().requires_grad_(False)
        info = {
            "name": self.name, "num_parameters": sum(p.numel() for p in module.parameters()), "source": self.path,
            "architecture": type(module).__name__, "input": shape, "classes": len(data.classes), "classes_told": told,
            "maps": [m.site for m in maps_of(module)], "dev_after_training": None,
        }  # fmt: skip
        return Loaded(module, None, info)

    def prepare(self, data, source: dict[str, Any]) -> None:
        """Images of `data` as the model's image processor would prepare them."""
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(self.path, **source)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"model: {self.path} has no image processor that can be read ({reason}): set model.recipe=dataset"
            ) from error
        recipe = recipes.of_processor(processor, self.path)
        use_recipe(data, recipe.at(data.fit.fixed_size or recipe.size))
