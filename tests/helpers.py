"""What tests share: the command, tiny models and data of every kind, made-up records. No test imports another test."""

from __future__ import annotations

import copy
import ctypes
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from torch import nn

from sparsebench import config, engines, kernels
from sparsebench.config.compose import compose_all
from sparsebench.config.identity import digest
from sparsebench.data.image_sources import Memory
from sparsebench.data.images import Images, ImageSplit
from sparsebench.data.labelled import LabelledData
from sparsebench.data.text import Document, Split, TextData
from sparsebench.hardware import Hardware
from sparsebench.measure import macs, quality, sparsity, uncertainty
from sparsebench.methods.base import Work
from sparsebench.models import Loaded
from sparsebench.modules import rotated_norm
from sparsebench.modules.activation_map import isolate
from sparsebench.modules.gate_sparse import swap_ffn
from sparsebench.modules.input_sparse import swap
from sparsebench.records import record
from sparsebench.sites import find_blocks
from sparsebench.training.loop import Training

COMMAND = Path(sys.executable).with_name("sparsebench")
SHARED = Path(os.environ.get("SPARSEBENCH_DATA", Path(__file__).parents[2] / "shared" / "data"))


def record_of(process: subprocess.CompletedProcess, folder: Path) -> dict:
    """The record that a finished command names in its last line."""
    line = json.loads(process.stdout.strip().splitlines()[-1])
    return json.loads((folder / line["record"]).read_text())


TEXT = "\n\n".join(
    f"Paragraph {i}. " + " ".join(f"word{(i * 7 + j * 3) % 91} of {(i + j) % 13}" for j in range(40))
    for i in range(120)
)
SHAPES = {
    "llama": {"num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4},
    "mistral": {"num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4},
    "qwen2": {"num_key_value_heads": 1, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4},
    "phi3": {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "pad_token_id": 0},
    "gpt2": {"n_embd": 64, "n_head": 4},
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 160, "num_attention_heads": 4},
}


def tiny_tokenizer():
    from sparsebench.training.from_scratch import byte_bpe

    return byte_bpe([TEXT], 320)


def built(group: str, /, *overrides: str, **changes):
    """The object of one group of the configuration, e.g. `method`, with these keys changed."""
    problems: list[str] = []
    actual = config.build({**compose_all(list(overrides))[0][group], **changes}, group, problems)
    assert not problems, problems
    return actual


def tiny_model(kind: str = "llama", layers: int = 2, seed: int = 0, **changes):
    """A small random causal LM of transformers, float32, eval mode."""

    torch.manual_seed(seed)
    depth = {"n_layer": layers} if kind == "gpt2" else {"num_hidden_layers": layers}
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=320, bos_token_id=0, eos_token_id=0, **{**SHAPES[kind], **depth, **changes}
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # larger than the default initialisation, so that activations differ between channels
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model.eval().requires_grad_(False)


def emulate(library):
    """A function that runs one launch of a fused CUDA step in a library of its kernels built for the CPU."""

    def run(launch):
        arguments = launch.arguments if launch.name == "embed" else [ctypes.byref(launch.arguments[0])]
        getattr(library, f"run_{launch.name}")(*launch.grid, launch.shared_bytes, *arguments)

    return run


def special_model(kind: str, dtype=torch.float32, share: float = 0.5, **changes) -> nn.Module:
    """A model with `rotated` norms (then the largest k as LaRoSA has them, or thresholds), with `cats`, or both."""
    model = tiny_model(**changes).to(dtype)
    blocks = find_blocks(model)
    if "rotated" in kind:
        size, generator = model.config.hidden_size, torch.Generator().manual_seed(1)
        keys = [(b.index, group) for b in blocks for group in rotated_norm.GROUPS]
        bases = {key: torch.linalg.qr(torch.randn(size, size, generator=generator).double())[0] for key in keys}
        rotated_norm.rotate(model, blocks, bases)
        for site in (s for b in blocks for s in b.sites.values() if not ("cats" in kind and s.role in ("up", "down"))):
            n = model.get_submodule(site.path).weight.shape[1]
            rule = {} if "thresholds" in kind else {"top_k": round(n * share)}
            swap(model, site, 0.0 if rule else 0.4, **rule)
    if "cats" in kind:
        for block in blocks:
            swap_ffn(model, block, 0.02)
    engines.channel_major(model)
    return model


def sparse_copy(threshold=0.3, kernel="cpu_numba", model=None):
    """The tiny Llama (or a model given) with every block map input-sparse at one threshold."""
    model = tiny_model() if model is None else model
    for block in find_blocks(model):
        for site in block.sites.values():
            swap(model, site, threshold, kernel=kernel)
    return model


GGUF_KINDS = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3_text",
    "phi2": "phi",
    "phi3": "phi3",
}


def write_gguf(
    path: Path,
    model,
    architecture: str,
    kind: str | dict = "F32",
    tokenizer=None,
    change=lambda tensors: tensors,
    **fields,
):
    """A model of transformers as llama.cpp's converter writes it: rows of a Llama's q and k in pairs, Gemma's norms + 1.

    kind: how matrices are stored, all or by name. tokenizer: a byte-level BPE. change: of the tensors, float32 by name. fields: metadata
    beside, or instead of (None = left out) those of the model; `__` stands for a dot.
    """
    settings = model.config
    number = next(k for k, v in gguf.constants.MODEL_ARCH_NAMES.items() if v == architecture)
    names = gguf.get_tensor_name_map(number, settings.num_hidden_layers)
    heads, groups = settings.num_attention_heads, settings.num_key_value_heads
    head_dim = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    tensors = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            count = heads if ".q_proj." in name else groups
            values = values.reshape(count, 2, len(values) // count // 2, -1).swapaxes(1, 2).reshape(values.shape)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            values = values + 1
        tensors[names.get_name(name, (".weight", ".bias"))] = values
    rope = settings.rope_parameters
    model_fields = {
        "block_count": settings.num_hidden_layers, "context_length": settings.max_position_embeddings,
        "embedding_length": settings.hidden_size, "feed_forward_length": settings.intermediate_size,
        "attention.head_count": heads, "attention.head_count_kv": groups, "attention.key_length": head_dim,
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "attention.sliding_window": getattr(settings, "sliding_window", None),
        "attention.layer_norm_rms_epsilon": getattr(settings, "rms_norm_eps", None),
        "attention.layer_norm_epsilon": getattr(settings, "layer_norm_eps", None),
    }  # fmt: skip
    every = {f"{architecture}.{k}": v for k, v in model_fields.items()} | tokenizer_fields(
        tokenizer or tiny_tokenizer()
    )
    every |= {key.replace("__", "."): value for key, value in fields.items()}
    writer = gguf.GGUFWriter(path, every.pop("general.architecture", architecture))
    for key, value in every.items():
        if value is not None:
            add_field(writer, key, value)
    for name, values in change(tensors).items():
        chosen = kind if isinstance(kind, str) else kind.get(name, "F32")
        stored = gguf.GGMLQuantizationType[chosen if values.ndim == 2 and values.shape[1] % 32 == 0 else "F32"]
        data = gguf.quants.quantize(np.ascontiguousarray(values, dtype=np.float32), stored)
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokenizer_fields(tokenizer) -> dict:
    """A byte-level BPE of transformers as the fields of a GGUF file."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    special = {t["content"] for t in content["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in special else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(m) for m in content["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id, "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip


def add_field(writer, key: str, value) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


class Rows:
    """A split of fixed windows."""

    def __init__(self, rows: torch.Tensor):
        self.rows, self.sequence_length = rows, rows.shape[1]

    def sequences(self, limit=None):
        return self.rows[:limit]

    def scored_documents(self, count):
        return torch.arange(count)[:, None].expand(count, self.sequence_length - 1)


class TinyCNN(nn.Module):
    """Three products behind ReLUs: stride, padding, groups, one ReLU module called twice and one function."""

    def __init__(self, classes: int = 3):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.conv3 = nn.Conv2d(8, 8, 1)
        self.relu, self.head = nn.ReLU(), nn.Linear(8 * 4, classes)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.conv2(x))
        x = torch.relu(self.conv3(x) + x)
        return self.head(nn.functional.max_pool2d(x, 2).flatten(1))


def tiny_cnn(seed: int = 0, classes: int = 3) -> nn.Module:
    """Traced, float32, eval mode, frozen."""
    torch.manual_seed(seed)
    return isolate(TinyCNN(classes), torch.zeros(1, 1, 8, 8)).eval().requires_grad_(False)


def tiny_vit(seed: int = 0) -> nn.Module:
    """A vision transformer for the 8 x 8 images, float32, eval mode, frozen."""

    torch.manual_seed(seed)
    shape = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=4,
        num_channels=1, num_labels=3, initializer_range=0.2,
    )  # fmt: skip
    return transformers.ViTForImageClassification(shape).eval().requires_grad_(False)


def image_settings(**changes) -> Images:
    return built("dataset", "dataset=digits", **{"size": None, "augment": "none", **changes})


def tiny_images(count: int = 96, **changes) -> LabelledData:
    """8 x 8 images of three classes: a bright upper half, lower half or left half, on noise."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 120, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    images[labels == 0, :, :4] += 120
    images[labels == 1, :, 4:] += 120
    images[labels == 2, :, :, :4] += 120
    store, settings, third = Memory(images, labels), image_settings(**changes), count // 3
    rows = {n: torch.arange(i * third, (i + 1) * third) for i, n in enumerate(("fit", "dev", "test"))}
    splits = {n: ImageSplit(n, store, r, 3, settings) for n, r in rows.items()}
    return LabelledData(**splits, classes=["up", "down", "left"], info={"augment": "none"}, kind="vision")


def work(tmp_path) -> Work:
    hardware: Hardware = built("hardware", "hardware=cpu", "hardware.kernel=masked_dense", "hardware.threads=1")
    hardware.prepare()
    return Work(0, hardware, tmp_path, tmp_path, 4, lambda row: None)


def logits(model, rows):
    with torch.no_grad():
        return model(input_ids=rows, use_cache=False).logits


CPU_KERNELS = [
    n for n in kernels.names() if kernels.device_of(n) != "cuda" and hasattr(kernels.load(n), "neuron_sparse_ffn")
]


class Language:
    """A tiny model and data of the kind `language`."""

    default_model = "llama-tiny"

    def loaded(self):
        return Loaded(tiny_model(), tiny_tokenizer(), {})

    def data(self):
        documents = [Document(str(i), part) for i, part in enumerate(TEXT.split("\n\n"))]
        cuts = {"fit": documents[:80], "dev": documents[80:100], "test": documents[100:]}
        actual = TextData(**{n: Split(n, d, 32, "none", 0) for n, d in cuts.items()}, info={})
        actual.set_tokenizer(tiny_tokenizer())
        return actual

    def inputs(self, count):
        return self.data().test.sequences(count)

    def logits(self, model, rows):
        with torch.no_grad():
            return model(input_ids=rows, use_cache=False).logits

    def measured(self, model):
        _, counters = quality.language_quality(model, self.data().test, None, 4)
        actual = sparsity.summarise(model, counters)
        weights = {site: share.weight for site, share in actual.items()}
        return sparsity.model_wide({site: share.sparsity for site, share in actual.items()}, weights)


class Vision:
    """The same for the kind `vision`."""

    default_model = "lenet5"

    def loaded(self):
        return Loaded(tiny_cnn(), None, {})

    def data(self):
        return tiny_images()

    def inputs(self, count):
        return next(self.data().test.batches(count, count, "cpu")).inputs

    def logits(self, model, rows):
        with torch.no_grad():
            return model(rows)


class VisionTransformer(Vision):
    """The same for methods that need transformer blocks."""

    default_model = "vit-tiny"

    def loaded(self):
        return Loaded(tiny_vit(), None, {})

    def logits(self, model, rows):
        with torch.no_grad():
            return model(rows).logits

    def measured(self, model):
        _, counters = quality.classification_quality(model, self.data().test, None, 8)
        actual = sparsity.summarise(model, counters)
        return sparsity.model_wide({s: f.sparsity for s, f in actual.items()}, {s: f.weight for s, f in actual.items()})


KINDS = {"language": Language(), "vision": Vision()}
PROTOCOL = {"split": "test", "window": 512, "stride": 512, "bos": "document", "prompt_policy": "all", "tokens": 100}


def made(method="teal", sparsity=0.5, perplexity=12.0, speedup=1.3, seed=0, policy="all", **changes) -> dict:
    """A finished language record, as the program writes them."""
    settings = {
        "seed": seed, "output_dir": "outputs", "model": {"name": "llama-tiny", "weights": "pretrained", "num_layers": None},
        "method": {"name": method, **({} if method == "dense" else {"sparsity": sparsity, "prompt": policy})},
        "dataset": {"name": "pystdlib", "sequence_length": 512}, "hardware": {"name": "auto", "requires": None},
    }  # fmt: skip
    decode = {"dense": {"median_ms": 1.0}, "sparse": {"median_ms": 1 / (speedup or 1)}, "context": 128}
    content = {
        "schema_version": record.SCHEMA_VERSION, "status": "finished", "error": None,
        "started_at": "2026-01-01T00:00:00+00:00", "seconds": 9.0,
        "config_hash": "", "name": f"llama-tiny/{method}", "config": settings, "extra": {}, "fit": {"seconds": 1.0},
        "env": {"cpu": "Test CPU", "hardware": {"device": "cpu", "dtype": "float32", "threads": 1}, "threads": 1},
        "model": {"source": "builtin"}, "dataset": {"test": {"fingerprint": "f" * 64}},
        "quality": {
            "perplexity": {"dense": 10.0, "sparse": perplexity, "higher_is_better": False,
                           "protocol": {**PROTOCOL, "prompt_policy": policy}},
            "nll": {"dense": 2.3, "sparse": 2.4, "higher_is_better": False, "protocol": "as perplexity"},
        },
        "sparsity": {"requested": sparsity, "model_wide": sparsity,
                     "per_site": {f"{i}.q": {"sparsity": sparsity, "weight": 10} for i in range(3)}},
        "macs": {"dense": 100, "sparse": 100 * (1 - sparsity), "executed": 100 * (1 - sparsity)},
        "bytes": {"dense": 400, "sparse": 400 * (1 - sparsity)},
        "latency": {"kernel": "cpu_numba", "device": "cpu", "decode": decode},
    }  # fmt: skip
    if speedup:
        decode["speedup"] = speedup
    content.update(changes)
    content["config_hash"] = digest([settings, content["env"], content["quality"], content["status"]])
    return content


def vision(accuracy=0.95, method="dstf") -> dict:
    """A record without perplexity and without a decode step."""
    record = made(method, speedup=None)
    record["config"]["model"] = {"name": "lenet5"}
    record["config"]["dataset"] = {"name": "digits"}
    quality = {
        "dense": 0.96,
        "sparse": accuracy,
        "higher_is_better": True,
        "protocol": {"split": "test", "images": 360},
    }
    ece = {"dense": 0.01, "sparse": 0.02, "higher_is_better": False, "protocol": "as accuracy"}
    record["quality"] = {"accuracy": quality, "ece": ece}
    pair = {"dense": {"median_ms": 2.0}, "sparse": {"median_ms": 2.1}}
    record["latency"] = {"kernel": None, "device": "cpu", "forward": {"batch 1": pair, "batch 64": pair}}
    record["sparsity"]["per_site"] = {"conv1": {"sparsity": 0.3, "weight": 5}, "conv2": {"sparsity": 0.6, "weight": 5}}
    record["bytes"] = record["macs"] = None
    record["config_hash"] = digest(record)
    return record


def with_losses(content: dict, dense, sparse, tokens: int = 100) -> dict:
    """A record of `made` whose perplexities are those of these losses [P]: NLL of pieces, one document to a window."""
    place = np.arange(len(dense))
    both = [
        uncertainty.Pieces(place, place, np.full(len(place), tokens), np.asarray(nll) * tokens)
        for nll in (dense, sparse)
    ]
    sides = dict(zip(("dense", "sparse"), (math.exp(each.mean) for each in both), strict=True))
    content["quality"]["perplexity"] |= sides | uncertainty.perplexities(*both) | {"losses": uncertainty.kept(*both)}
    content["config_hash"] = digest([content["config_hash"], content["quality"]["perplexity"]["losses"]])
    return content


def made_bench(**changes) -> dict:
    """A record of sparsebench-bench with the neuron-sparse FFN and the step of one context."""

    def pair(dense, sparse):
        times = ({f"{name}_us": value for name in ("median", "p10", "p90")} for value in (dense, sparse))
        return dict(zip(("dense", "sparse"), times, strict=True)) | {"speedup": dense / sparse}

    step = {"context": 128, "dense": "dense/fused", "dense_engines": {"dense/fused": {"median_ms": 4.0}},
            "dense_tokens_per_s": 250.0}  # fmt: skip
    return {
        "schema_version": 1, "kind": "bench", "model": "llama-tiny", "weights": "random", "config": {"seed": 0},
        "input": "normal distribution", "read_bandwidth_gbs": 10.0,
        "env": {"cpu": "Test CPU", "threads": 1, "argv": ["__main__.py", "parts=[ffn, step]"], "git_commit": "c" * 40 + "+",
                "versions": {"torch": "2.0"}, "hardware": {"device": "cpu", "dtype": "float32", "threads": 1}},
        "ffn": [{"sparsity": 0.5, "of_read_bandwidth": 0.8, **pair(80.0, 40.0)}],
        "step": [{**step, "sparsity": 0.5, "tokens_per_s": 400.0, "speedup": 1.6, "sparse": {"p10_ms": 2.5, "p90_ms": 2.5}}],
        **changes,
    }  # fmt: skip


def failed(message="out of memory", trace="Traceback ...") -> dict:
    sections = dict.fromkeys(("quality", "latency", "macs", "bytes", "sparsity"))
    error = {"type": "MemoryError", "message": message, "traceback": trace}
    return {**made(), "status": "failed", "error": error, "config_hash": "0" * 64, **sections}


def laid(folder, *records):
    """Write records as a sweep leaves them; returns the folder."""
    for i, content in enumerate(records):
        file = folder / f"m{i}" / "method" / "hash" / "result.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(content))
    return folder


QUICK_RUN = (
    "dataset=text", "dataset.sequence_length=32", "method.calibration_tokens=256", "eval.text.test_sequences=4",
    "measure.samples=30", "measure.warmup=3", "measure.context=16", "measure.prompt=16", "hardware.threads=1",
    "wandb.mode=disabled", "eval.text.prompt=",
)  # fmt: skip
QUICK_TRAINING = {"batch_size": 8, "micro_batch": 8, "warmup": 1}
BASE = {
    "steps": 12, "batch_size": 4, "micro_batch": 2, "optimizer": "adamw", "lr": 1e-3, "min_lr": 1e-4,
    "schedule": "cosine", "warmup": 2, "betas": [0.9, 0.95], "momentum": 0.0, "weight_decay": 0.1, "clip": 1.0,
    "dropout": 0.1, "precision": "no", "compile": False, "checkpoint_every": 4, "log_every": 3,
}  # fmt: skip


def training_settings(**changes) -> Training:
    return Training(**{**BASE, **changes})


def accounted(dense, model, measured, context, skips):
    """The record's macs and bytes sections of a sparse model as if the measured tokens had been timed, too.

    dense: costs by site before the method was applied.
    """
    sparse, outside = dense | macs.site_costs(model, measured), macs.outside_blocks(model, context)
    section, traffic = macs.account(dense, sparse, outside, context)
    return section | {"executed": macs.executed(dense, sparse, outside, skips)}, traffic


EVIL_TEXT = (
    "", "x" * 3000, "<script>alert(1)</script>", "[/x]", "[red]", ":smile:", "/data/$a^$/h", "$\\frac{$", "=1+1", "@SUM(A1)", "-2+3",
    "a|b", "`code`", "](http://x)", "line\nline", "\x00\x1b]0;title\x07", "\ud800", "\u202eabc", "../../../etc/passwd", "1e5",
    "\U0001f600", "%s %(a)s {0}", "null",
)  # fmt: skip
EVIL_VALUES = (
    None, True, False, 0, -1, 1, 0.5, 7.5, -0.5, 2**63, 10**400, 1e308, -1e308, 5e-324, float("nan"), float("inf"), -float("inf"),
    [], {}, [[]], [None], {"": None}, {"a": {"b": []}}, *EVIL_TEXT,
)  # fmt: skip


def variants(content: dict, count: int, seed: int = 0, depth: int = 5) -> Iterator[tuple[str, bytes]]:
    """`count` (what was done, file content) of damaged JSON: a key gone, renamed or of a foreign value, now and then two of
    them; bytes flipped, cut off, doubled; brackets without end. The same for the same seed."""
    chance = random.Random(seed)
    for _ in range(count):
        damaged, said = copy.deepcopy(content), []
        for _ in range(chance.choice((1, 1, 1, 2))):
            said.append(damage(damaged, chance, depth))
        text = json.dumps(damaged).encode("utf-8", "surrogatepass")
        if chance.random() < 0.15:
            at = chance.randrange(len(text))
            how = chance.randrange(7)
            text = (
                text[:at], text[:at] + bytes([text[at] ^ 1 << chance.randrange(8)]) + text[at + 1 :], text + text,
                text[:at] + b"[" * 200_000, b"\xef\xbb\xbf" + text, b'{"a":' * 5000 + text + b"}" * 5000, b"\xff\xfe" + text,
            )[how]  # fmt: skip
            said.append(f"text {how} at {at}")
        yield "; ".join(said), text


def damage(content: dict, chance: random.Random, depth: int) -> str:
    """Change one place of a JSON object, and say what was done."""
    node, path = content, []
    while True:
        key = chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
        path.append(str(key)[:20])
        inner = node[key]
        if isinstance(inner, (dict, list)) and inner and len(path) < depth and chance.random() < 0.8:
            node = inner
            continue
        break
    how = chance.choice(("gone", "renamed", "value", "value", "value"))
    if how == "value":
        node[key] = chance.choice(EVIL_VALUES)
    elif isinstance(node, list):
        node.append(chance.choice(EVIL_VALUES))
    else:
        value = node.pop(key)
        if how == "renamed":
            node[chance.choice(EVIL_TEXT)] = value
    return f"{'.'.join(path)} {how} {str(node[key])[:30] if how == 'value' else ''}"


def check_against_the_model(model: nn.Module, fused, ids: torch.Tensor, places: range, tolerance: float) -> None:
    """Steps of a fused decoder over ids [1, T] at `places` give the logits of the model's own eager decode."""
    reference = engines.Decoder(model, ids[:, : places.start], len(places), compiled=False)
    for i in places:
        expected, actual = reference.step(ids[:, i : i + 1]), fused.step(ids[:, i : i + 1])
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
