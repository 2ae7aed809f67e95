"""Causal language models of transformers: shipped, from a folder, from the Hub, out of a GGUF file, random for timing, or
trained here."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers

from sparsebench.config import NAME_PATTERN, setting
from sparsebench.data import hub
from sparsebench.measure import quality
from sparsebench.models import Loaded, devices, gguf, kept, positions, quantised, structure
from sparsebench.models.checkpoint import load_whole
from sparsebench.records import machine, shared
from sparsebench.sites import find_blocks
from sparsebench.training import from_scratch
from sparsebench.training.loop import Training
from sparsebench.training.work import Work

if not sys.stderr.isatty():
    transformers.utils.logging.disable_progress_bar()

log = logging.getLogger(__name__)
ASSETS = Path(str(files("sparsebench") / "assets"))


@dataclass(kw_only=True)
class CausalLM:
    """A decoder of transformers whose blocks have a known structure (sites.py)."""

    name: str = setting(**NAME_PATTERN)
    path: str | None = setting(file="model")
    revision: str | None
    weights: str = setting(choices=("pretrained", "random", "scratch"))
    num_layers: int | None = setting(gt=0)
    trust_remote_code: bool
    architecture: dict | None
    train: Training | None
    quantize: str = setting(choices=("none", "int8", "int4", "keep"), default="none")
    quantize_group: int = setting(gt=0, le=65536, default=128)  # rows are padded to whole groups
    quantize_axis: str = setting(choices=("input", "output"), default="input")
    kind = "language"

    @property
    def location(self) -> str:
        """Folder, Hub id or GGUF file; `builtin:<name>` is a folder shipped with the package."""
        if self.path is None:
            return ""
        return str(ASSETS / self.path.removeprefix("builtin:")) if self.path.startswith("builtin:") else self.path

    def problems(self, settings: Any) -> list[str]:
        if self.weights == "scratch" and (self.train is None or self.architecture is None):
            return [f"model.weights=scratch needs model.train and model.architecture, which {self.name} leaves null"]
        method = getattr(settings, "method", None)
        if self.quantize != "none" and method is not None and not getattr(method, "quantised", False):
            return [
                f"method={method.name} does not run on quantised weights: model.quantize must be none, got {self.quantize}"
            ]
        several = getattr(getattr(settings, "hardware", None), "devices", 1)
        if several > 1 and self.trust_remote_code:
            return [f"hardware.devices must be 1 with model.trust_remote_code=true, got {several}"]
        from_architecture = self.weights != "pretrained" and self.architecture is not None
        if from_architecture and self.path is not None:
            location_problem(self.location, self.revision)  # of the tokenizer, whose commit names the run
        if self.quantize == "keep" and from_architecture:
            return ["model.quantize=keep needs weights that are stored in 8 or 4 bits, got weights that are made here"]
        if not from_architecture:
            if self.path is None:
                return ["model.path must be a folder, a Hub id or a GGUF file, got null"]
            problem = location_problem(self.location, self.revision)
            if problem is None and Path(self.location).is_dir() and not self.trust_remote_code:
                problem = structure.config_problem(self.location, "model.path")
            if problem is None:
                problem = self.storage_problem()
            if problem:
                return [problem]
        if is_gguf(self.location) and not from_architecture:
            config = gguf.config(self.location)
        else:
            config = positions.known_config("" if from_architecture else self.location, self.architecture)
        if config is None:
            return []
        problem = structure.depth_problem(self.name, config, self.num_layers)
        problem = problem or structure.causal_problem(self.name, config)
        return [problem] if problem else positions.problems(self.name, config, lengths_of(settings))

    def storage_problem(self) -> str | None:
        """What is wrong with how the weights at `path` are stored, for what `quantize` asks, or None."""
        if self.quantize == "keep":
            problem = kept.problem(self.location)
            return problem and f"model.quantize=keep: {problem}"
        if self.quantize != "none" and kept.method_of(self.location):
            return (
                f"model.quantize must be none or keep for a checkpoint that is in {kept.method_of(self.location)} already, "
                f"got {self.quantize}"
            )
        return kept.package_problem(self.location)

    @property
    def tokens_from(self) -> str:
        """Folder or Hub id of the tokenizer: random weights without one borrow it, since timing needs ids, not meaning."""
        borrowed = self.weights == "random" and location_problem(self.location) is not None
        return str(ASSETS / "llama-tiny") if borrowed else self.location

    def config(self) -> transformers.PretrainedConfig:
        """The architecture, cut to `num_layers` blocks where asked."""
        if self.weights != "pretrained" and self.architecture is not None:
            config = structure.of_fields(self.architecture)
        elif is_gguf(self.location):
            config = gguf.config(self.location)
        else:
            with hub.answering("model.path", self.location, self.revision):
                config = transformers.AutoConfig.from_pretrained(self.location, **self.source())
        if self.num_layers:
            problem = structure.depth_problem(self.name, config, self.num_layers)
            if problem:
                raise ValueError(problem)
            config.num_hidden_layers = self.num_layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[: self.num_layers]
        return config

    def source(self) -> dict:
        return {
            "revision": hub.commit(self.path, self.revision),
            "trust_remote_code": self.trust_remote_code,
            "local_files_only": not hub.reachable(),
        }

    def tokenizer(self, location: str, config: Any, data) -> Any:
        """The tokenizer of a location. Raises ValueError where it is missing or is not one for model and data."""
        try:
            if is_gguf(location):
                tokenizer = gguf.tokens(location)
            else:
                with hub.answering("model.path", location, self.revision):
                    tokenizer = transformers.AutoTokenizer.from_pretrained(location, **self.source())
        except (OSError, ValueError, KeyError) as error:
            line = str(error).strip().splitlines()[0]
            raise ValueError(f"model: the tokenizer of {location} can't be loaded: {line}") from error
        outside = {i for i in tokenizer.get_vocab().values() if i >= config.vocab_size}
        if outside - set(tokenizer.added_tokens_decoder):  # tokens added beside the text's own vocabulary never occur
            raise ValueError(
                f"model: the tokenizer of {location} has {len(tokenizer)} tokens, the model {config.vocab_size}"
            )
        bos = getattr(getattr(data, "fit", None), "bos", "none")
        if bos != "none" and tokenizer.bos_token_id is None:
            raise ValueError(
                f"dataset.bos must be none for the tokenizer of {location}, which has no BOS token, got {bos}"
            )
        return tokenizer

    def load(self, work: Work, data) -> Loaded:
        """The model on the target's device in its dtype; `data` gets its tokenizer. Raises ValueError where its structure is unknown."""
        hardware, config, location = work.hardware, self.config(), self.location
        if self.weights == "scratch":
            location = str(self.trained(config, work, data))
        tokens_from = location if self.weights == "scratch" else self.tokens_from
        tokenizer = self.tokenizer(tokens_from, config, data)
        several = hardware.torch_devices if len(hardware.torch_devices) > 1 else None
        if self.quantize != "keep" and not self.trust_remote_code:
            devices.check_room(config, hardware.torch_dtype, hardware.torch_devices)
        if self.weights == "random":
            module = devices.made_random(config, hardware.torch_dtype, hardware.torch_devices, work.seed)
        elif is_gguf(location):
            module = devices.moved_to(gguf.load(location, config, hardware.torch_dtype), hardware.torch_devices)
        elif self.quantize == "keep":
            module = devices.moved_to(kept.load(location, config, hardware.torch_dtype), hardware.torch_devices)
        else:
            there = {"device_map": devices.map_of(config, hardware.torch_dtype, several)} if several else {}
            with hub.answering("model.path", location, self.revision):
                module = load_whole(
                    transformers.AutoModelForCausalLM, location, self.num_layers,
                    config=config, dtype=hardware.torch_dtype, use_safetensors=True, **self.source(), **there,
                )  # fmt: skip
            module = devices.moved_to(module, hardware.torch_devices)
        module.eval().requires_grad_(False)
        parameters, blocks = sum(p.numel() for p in module.parameters()), find_blocks(module)
        sources = {"pretrained": self.path, "random": "random weights", "scratch": location}
        info = {
            "name": self.name,
            "num_parameters": parameters,
            "source": sources[self.weights],
            "revision": self.revision,
            "architecture": type(module).__name__,
            "num_layers": len(blocks),
            "sites": list(blocks[0].sites),
            "tokenizer": "llama-tiny (stand-in)" if tokens_from != location else "its own",
            "trust_remote_code": self.trust_remote_code,
            "positions": positions.limit(config),
            "cautions": [],
        }
        if several:
            info["devices"] = devices.blocks_on(module)
        with_experts = [b.experts for b in blocks if b.experts]
        if with_experts:
            one = with_experts[0]
            info["experts"] = {"layers": len(with_experts), "count": one.num_experts, "per_token": one.per_token}
        if data is not None:
            info["cautions"] += positions.cautions(config, data.test.sequence_length) + start_cautions(tokenizer, data)
        if is_gguf(location) and self.weights == "pretrained":
            info["gguf"], caution = gguf.describe(location, config, hardware.torch_dtype, self.quantize)
            info["cautions"].append(caution)
        if self.quantize in quantised.BITS:
            info["quantisation"] = quantised.quantise(
                module, self.quantize, self.quantize_group, self.quantize_axis, hardware.kernel_name
            )
        elif self.quantize == "keep":
            info["quantisation"] = kept.keep(module, location, config, hardware.kernel_name)
        for caution in info["cautions"]:
            log.warning("model=%s: %s", self.name, caution)
        if data is not None:
            data.set_tokenizer(tokenizer, shared)
        return Loaded(module, tokenizer, info)

    def trained(self, config: transformers.PretrainedConfig, work: Work, data) -> Path:
        """The folder of this model and its tokenizer trained on data.fit with work.seed; trained first where missing."""
        shape = {
            "architecture": self.architecture,
            "num_layers": self.num_layers,
            "train": vars(self.train),
            "data": data.fit.describe()["fingerprint"],
            "sequence_length": data.fit.sequence_length,
            "seed": work.seed,
        }

        def begin() -> tuple[torch.nn.Module, torch.Tensor]:
            tokenizer = from_scratch.byte_bpe((d.text for d in data.fit.documents), config.vocab_size)
            config.bos_token_id = config.eos_token_id = tokenizer.bos_token_id
            data.set_tokenizer(tokenizer)
            torch.manual_seed(work.seed)
            module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            return module, data.fit.sequences()

        def judge(module, history) -> dict[str, Any]:
            splits = (data.dev, data.test)
            return {
                "tokens": history.steps * self.train.batch_size * data.fit.sequence_length,
                "tokens_in_fit": data.fit.sequences().numel(),
                "dataset": data.describe(),
                "quality": {s.name: quality.perplexity(module, s.sequences(), work.batch_size) for s in splits},
                "precision": "bfloat16 weights as saved; quality measured in float32 before rounding",
                "machine": machine.describe(work.hardware.torch_device.type),
                "seconds_of_last_process": history.seconds,
            }

        def save(module, folder: Path) -> None:
            module.to(torch.bfloat16).save_pretrained(folder)
            data.fit.tokenizer.save_pretrained(folder)

        return from_scratch.trained(self, shape, work, begin, judge, save)


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def is_gguf(location: str) -> bool:
    """Whether a location is read as a GGUF file: every file is, since folders and Hub ids are none."""
    return Path(location).is_file()


def location_problem(location: str, revision: str | None = None) -> str | None:
    """Why `model.path` names no language model that can be loaded, in one line, or None."""
    if is_gguf(location):
        return gguf.problem(location, "model.path")
    inside = sorted(Path(location).glob("*.gguf")) if Path(location).is_dir() else []
    if inside and not Path(location, "config.json").exists():
        return f"model.path must name the GGUF file itself, e.g. {str(inside[0])!r}, got its folder {location!r}"
    if location.endswith(".gguf") and not inside:
        return f"model.path must be an existing GGUF file, a folder or a Hub id, got {location!r}"
    return hub.model_problem(location, "model.path", revision) or tokenizer_problem(location)


def start_cautions(tokenizer: Any, data: Any) -> list[str]:
    """What the record says where a tokenizer puts a BOS before every text, and the data set leaves it out."""
    start, bos = tokenizer.bos_token_id, data.test.bos
    if bos != "none" or start is None or tokenizer("a")["input_ids"][:1] != [start]:
        return []
    return [
        f"the tokenizer starts every text with {tokenizer.bos_token}, dataset.bos=none leaves it out: the model may be far "
        "worse than it is made to be (dataset.bos=window puts it before every window)"
    ]


def tokenizer_problem(location: str) -> str | None:
    """The line about a folder without a tokenizer, or None."""
    folder = Path(location)
    if not folder.is_dir() or any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    return f"model.path must be a folder with a tokenizer (e.g. tokenizer.json), got {location!r} without one"


def lengths_of(settings: Any) -> dict[str, int]:
    """The longest positions that a run asks of a language model, by key."""
    measured = settings.measure if settings.measure.latency else None
    lengths = {"dataset.sequence_length": getattr(settings.dataset, "sequence_length", 0)}
    if measured is not None:
        lengths |= {
            "measure.context plus the 8 steps after it": measured.context + 8,
            "measure.prompt": measured.prompt,
        }
    return lengths
