"""Text classifiers with BERT-style encoders of transformers: from a folder or the Hub, as they are or with a new head
fine-tuned here, random, or trained here from scratch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from sparsebench.config import NAME_PATTERN, inputs, setting
from sparsebench.config.identity import by_name
from sparsebench.data import hub
from sparsebench.measure import quality
from sparsebench.models import Loaded, positions
from sparsebench.models.checkpoint import load_whole
from sparsebench.models.classes import align, names_of
from sparsebench.records import machine
from sparsebench.sites import find_blocks
from sparsebench.training import from_scratch
from sparsebench.training.loop import Training, classification_loss
from sparsebench.training.work import Work

AUTO = transformers.AutoModelForSequenceClassification
TRAINED = ("finetuned", "scratch")  # weights that are made here


@dataclass(kw_only=True)
class Encoder:
    """An encoder with a classification head; the number of classes comes from the data set."""

    name: str = setting(**NAME_PATTERN)
    path: str | None = setting(file="model")
    revision: str | None
    weights: str = setting(choices=("pretrained", "finetuned", "scratch", "random"))
    architecture: dict | None
    train: Training | None
    kind = "classification"

    def __post_init__(self):
        if self.starts_from_path and self.path is None:
            raise ValueError(f"path must be a folder or a Hub id with weights={self.weights}, got null")
        if not self.starts_from_path and self.architecture is None:
            raise ValueError(f"architecture must describe the encoder with weights={self.weights}, got null")
        if self.weights in TRAINED and self.train is None:
            raise ValueError(f"weights={self.weights} needs model.train, got null")

    @property
    def starts_from_path(self) -> bool:
        return self.weights in ("pretrained", "finetuned")

    def problems(self, settings: Any) -> list[str]:
        pretrained = self.starts_from_path
        problem = hub.model_problem(self.path, "model.path", self.revision) if pretrained else None
        if problem:
            return [problem]
        config = positions.known_config(self.path if pretrained else "", None if pretrained else self.architecture)
        return positions.problems(self.name, config, {"dataset.max_tokens": getattr(settings.dataset, "max_tokens", 0)})

    def load(self, work: Work, data) -> Loaded:
        """The classifier on the target's device in its dtype; `data` gets its tokenizer.

        Raises ValueError where its classes are not those of the data, or its structure is unknown.
        """
        hardware = work.hardware
        torch.manual_seed(work.seed)
        start, origin, dev, told = None, self.path, None, "those of the data set"
        if self.weights == "pretrained":
            with hub.answering("model.path", str(self.path), self.revision):
                module = load_whole(AUTO, self.path, dtype=hardware.torch_dtype, use_safetensors=True, **self.source())
            told = align(data, module.config.num_labels, names_of(module.config.id2label), self.name)
        if self.starts_from_path:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.path, **self.source())
        else:
            tokenizer = from_scratch.byte_bpe(data.fit.texts, self.architecture["vocab_size"])
            start, origin = tokenizer.bos_token_id, "random weights"
        data.set_tokenizer(tokenizer, start)
        if self.weights == "random":
            module = self.plain(data)
        if self.weights in TRAINED:
            folder = self.trained(tokenizer, work, data)
            module = load_whole(AUTO, str(folder), dtype=torch.float32)
            origin, dev = str(folder), json.loads((folder / "training.json").read_text())["dev"]
        module = module.to(hardware.torch_device, hardware.torch_dtype).eval().requires_grad_(False)
        info = {
            "name": self.name, "num_parameters": sum(p.numel() for p in module.parameters()), "source": origin,
            "architecture": type(module).__name__, "num_layers": len(find_blocks(module)), "classes": len(data.classes),
            "classes_told": told, "dev_after_training": dev,
        }  # fmt: skip
        return Loaded(module, tokenizer, info)

    def source(self) -> dict[str, Any]:
        """Which state of a Hub id is loaded."""
        return {"revision": hub.commit(self.path, self.revision), "local_files_only": not hub.reachable()}

    def begun(self, data) -> torch.nn.Module:
        """The classifier before training, float32: random weights, or those in `path` under a new head."""
        if self.weights == "scratch":
            return self.plain(data)
        options = {"dtype": torch.float32, "use_safetensors": True, "num_labels": len(data.classes), **self.source()}
        return load_whole(AUTO, self.path, new_head=True, **options)

    def plain(self, data) -> torch.nn.Module:
        """The encoder with random weights, float32."""
        fields = {"num_labels": len(data.classes), **self.architecture}
        kind = fields.pop("model_type")
        # padding is masked, so it needs no token of its own; RoBERTa counts positions from one, the start token's
        settings = transformers.AutoConfig.for_model(kind, pad_token_id=0 if kind == "roberta" else None, **fields)
        return transformers.AutoModelForSequenceClassification.from_config(settings, dtype=torch.float32)

    def trained(self, tokenizer, work: Work, data) -> Path:
        """The folder of this encoder trained on data.fit with work.seed; trained first where it is missing."""
        shape = {
            "architecture": self.architecture, "train": vars(self.train), "seed": work.seed, "machine": machine.machine(),
            "data": data.describe()["fit"]["fingerprint"], "max_tokens": data.fit.max_tokens,
        }  # fmt: skip
        if self.weights == "finetuned":
            commit, files = inputs.hub_files(self.path, self.revision, "model")
            files = inputs.read_files(self.path, "model", {}) or files
            shape |= {"architecture": None, "start": by_name(files) | ({"commit": commit} if commit else {})}

        def judge(module, history) -> dict[str, Any]:
            metrics, _ = quality.classification_quality(module, data.dev, None, 64)
            return {"dev": {k: metrics[k] for k in ("accuracy", "nll")}}

        def save(module, folder: Path) -> None:
            module.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        return from_scratch.trained(
            self, shape, work, lambda: (self.begun(data), data.fit), judge, save, loss=classification_loss
        )
