"""Which files a run reads: those its settings name, those names stand for (a Hub id, Python's library), source code.

A setting says itself what it reads, `setting(file="model")`; KINDS holds the rule of each word. Settings are found in
the source of the classes, and modules by their path: importing a method would import torch, and importing a stranger's
module would run it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from sparsebench import cache
from sparsebench.config import digests
from sparsebench.config.settings import Evaluation

PACKAGE = Path(__file__).resolve().parents[1]
NOT_COMPUTING = ("report", "bench", "assets")  # folders of the package that shape no number of a run
Files = dict[str, Path]  # by a name that does not depend on where they lie


# ---------------------------------------------------------------------------------------------------------------------
# What is read of a file or folder, by kind of setting


def below(root: Path, *patterns: str, skip: Callable[[str], bool] = lambda folder: False) -> Iterator[Path]:
    """Files below a folder whose name fits one of the patterns, without what lies in folders to `skip`."""
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(f for f in folders if not skip(f) and not in_a_circle(Path(folder, f)))
        yield from (Path(folder, n) for n in sorted(names) if any(fnmatch(n, p) for p in patterns))


def in_a_circle(folder: Path) -> bool:
    """Whether a folder is a link to one that holds it."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def model_files(root: Path, node: dict[str, Any]) -> Iterator[Path]:
    """A transformers folder: configuration, tokenizer, its own code, and the weights that are loaded."""
    for name in sorted(p.name for p in root.iterdir() if p.is_file()):
        if any(fnmatch(name, pattern) for pattern in MODEL) and not name.endswith(".safetensors"):
            yield root / name
    index = root / "model.safetensors.index.json"
    if (root / "model.safetensors").is_file():
        yield root / "model.safetensors"
    elif index.is_file():
        yield from sorted(root / name for name in shards(index) if (root / name).is_file())
    else:
        yield from sorted(root.glob("*.safetensors"))


def shards(index: Path) -> set[str]:
    """Names of the weight files that an index lists."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return {name for name in names if isinstance(name, str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()  # the run itself says what is wrong


MODEL = (
    "config.json", "generation_config.json", "*.safetensors.index.json", "*.gguf", "adapter_config.json",
    "tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken",
    "chat_template*", "preprocessor_config.json", "*.py",
)  # fmt: skip
PYTHON_TESTS = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
WIKITEXT = ("train.txt", "valid.txt", "test.txt", "wiki.*.raw", "wiki.*.tokens")
IMAGES = (
    "*.jpg", "*.jpeg", "*.png", "*.ppm", "*.bmp", "*.pgm", "*.tif", "*.tiff", "*.webp", "*-ubyte", "*-ubyte.gz",
    "groups.json",
)  # fmt: skip
TORCHVISION = {  # folder of a set, files that are read
    "MNIST": ("MNIST/raw", "*-ubyte"),
    "FashionMNIST": ("FashionMNIST/raw", "*-ubyte"),
    "CIFAR10": ("cifar-10-batches-py", "*"),
    "CIFAR100": ("cifar-100-python", "*"),
}


def text_files(root: Path, node: dict[str, Any]) -> Iterator[Path]:
    """Of a library of Python its modules, of WikiText its parts; any other folder of text is read whole."""
    if node.get("source") == "pystdlib":
        return below(root, "*.py", skip=PYTHON_TESTS.__contains__)
    if node.get("source") == "wikitext":
        return (p for p in sorted(root.iterdir()) if any(fnmatch(p.name, pattern) for pattern in WIKITEXT))
    return below(root, "*")


def image_files(root: Path, node: dict[str, Any]) -> Iterator[Path]:
    """Images by suffix in either case, idx files, a set in torchvision's layout, the groups of cue-conflict images."""
    if node.get("source") == "torchvision":
        folder, pattern = TORCHVISION.get(str(node.get("torchvision_name")), ("", "*"))
        return below(root / folder, pattern)
    parts = [root / n for n in ("train", "val", "test") if (root / n).is_dir()] if (root / "train").is_dir() else [root]
    return (p for part in parts for p in below(part, "*") if any(fnmatch(p.name.lower(), i) for i in IMAGES))


def task_files(root: Path, node: dict[str, Any]) -> Iterator[Path]:
    """Tasks of lm-eval: YAML, Python, and the local data files that the YAML names, wherever they lie."""
    for path in below(root, "*"):
        if path.suffix in (".yaml", ".yml", ".py"):
            yield path
        if path.suffix in (".yaml", ".yml"):
            yield from named_in(path)


def named_in(path: Path) -> Iterator[Path]:
    """Existing files that a YAML file names, `!function` and other tags left aside."""
    try:
        events = list(yaml.parse(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError):
        return
    for value in sorted({e.value for e in events if isinstance(e, yaml.ScalarEvent)}):
        for place in (Path(value), path.parent / value):
            if "/" in value or "." in value:
                try:
                    if place.is_file():
                        yield place
                        break
                except (OSError, ValueError):
                    break


KINDS: dict[str, Callable[[Path, dict[str, Any]], Iterator[Path]]] = {
    "model": model_files,
    "text": text_files,
    "images": image_files,
    "tasks": task_files,
    "histograms": lambda root, node: below(root, "*.pt", "results.csv"),
    "any": lambda root, node: below(root, "*"),
}


def read_files(value: str, kind: str, node: dict[str, Any]) -> Files:
    """The files that are read where a setting of this kind has this value; none where the path is not there."""
    root = PACKAGE / "assets" / value.removeprefix("builtin:") if value.startswith("builtin:") else Path(value)
    if root.is_file():
        return {"": root}
    if not root.is_dir():
        return {}
    try:
        paths = [p for p in KINDS[kind](root, node) if p.is_file()]
    except (OSError, ValueError):  # a folder that may not be listed, a name that is none: the run itself says so
        return {}
    return {os.path.relpath(p, root) if p.is_relative_to(root) else str(p): p for p in paths}


# ---------------------------------------------------------------------------------------------------------------------
# Settings that name files


def module_file(module: str) -> Path | None:
    """The source file of a module on Python's path, found without importing it or its packages."""
    top, *inner = module.split(".")
    try:
        spec = find_spec(top)  # of an outermost module: nothing is imported
        for i in range(len(inner)):
            search = spec.submodule_search_locations if spec else None
            spec = PathFinder.find_spec(".".join([top, *inner[: i + 1]]), search) if search else None
    except (ImportError, OSError, ValueError, AttributeError):
        return None
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None


@functools.lru_cache(maxsize=256)
def parsed(path: Path, stamp: str) -> ast.Module | None:
    """The syntax tree of a source file in the state `stamp` stands for; None where it is no Python."""
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None


def tree_of(path: Path) -> ast.Module | None:
    return parsed(path, digests.stamp(path))


def file_fields(target: str) -> dict[str, str]:
    """Fields that name files in the class at a dotted path, by what is read of them, e.g. {"path": "model"}."""
    module, _, name = target.rpartition(".")
    path = module_file(module) if module else None
    tree = tree_of(path) if path else None
    for node in tree.body if tree else ():
        if isinstance(node, ast.ClassDef) and node.name == name:
            return dict(marked(node))
        if isinstance(node, ast.ImportFrom) and node.module and any(a.name == name for a in node.names):
            return file_fields(f"{node.module}.{name}")
    return {}


def marked(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """The fields of a class statement whose `setting` says file=..., and what it says."""
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(line.value, ast.Call):
            for keyword in line.value.keywords:
                if keyword.arg == "file" and isinstance(keyword.value, ast.Constant) and keyword.value.value in KINDS:
                    yield line.target.id, keyword.value.value


def named(config: dict[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(key, value, kind, node) of every setting of a configuration that names files."""
    for group, node in config.items():
        if not isinstance(node, dict):
            continue
        parts = {group: (str(node["_target_"]), node)} if "_target_" in node else {}
        if group == "eval":
            classes = Evaluation.__annotations__
            parts = {f"eval.{p}": (f"{Evaluation.__module__}.{classes.get(p)}", n) for p, n in node.items()}
        for key, (target, values) in parts.items():
            for name, kind in file_fields(target).items():
                chosen = values.get(name) if isinstance(values, dict) else None
                for value in chosen if isinstance(chosen, list) else [chosen]:
                    if isinstance(value, str):
                        yield f"{key}.{name}", value, kind, values


# ---------------------------------------------------------------------------------------------------------------------
# What a name stands for


def hub_files(repository: str, revision: str | None, kind: str) -> tuple[str | None, Files]:
    """(commit that a Hub repository stands for here, those of its cached files that are not as the Hub keeps them).

    The commit alone says what all files hold, be they downloaded yet or not: a run is the same before and after its first
    download. It is None where the local cache has never heard of the repository.
    """
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    folder = Path(os.path.expanduser(hub)) / f"{kind}s--{repository.replace('/', '--')}"
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    if not re.fullmatch("[0-9a-f]{40}", str(commit)):
        return None, {}
    snapshot = folder / "snapshots" / str(commit)
    paths = model_files(snapshot, {}) if kind == "model" else below(snapshot, "*")
    files = [p for p in paths if p.is_file()] if snapshot.is_dir() else []
    return commit, {os.path.relpath(p, snapshot): p for p in files if not as_named(p)}


def as_named(path: Path) -> bool:
    """Whether a file of the Hub's cache is what the name of its blob says: its SHA-256, or Git's digest of a small one."""
    name = path.resolve().name
    if len(name) == 40:
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == name
    return digests.of_files([path]) == [name]


def implied(config: dict[str, Any]) -> Iterator[tuple[str, Files, str | None]]:
    """(key, files, commit) of inputs that no path names: Hub ids, Python's library, what torchvision keeps."""
    model, dataset = (config[g] if isinstance(config.get(g), dict) else {} for g in ("model", "dataset"))
    path = model.get("path")
    if isinstance(path, str) and not path.startswith("builtin:") and not Path(path).exists():
        commit, files = hub_files(path, model.get("revision"), "model")
        yield "model.path", files, commit
    if model.get("weights") == "pretrained" and path is None and isinstance(model.get("architecture"), str):
        yield "model.architecture", torchvision_weights(model["architecture"]), None
    if dataset.get("path") is None:
        source = dataset.get("source")
        if source == "pystdlib":
            yield "dataset.source", read_files(sysconfig.get_path("stdlib"), "text", dataset), None
        elif source == "torchvision":
            yield "dataset.source", read_files(str(cache.folder()), "images", dataset), None
        elif isinstance(dataset.get("hub_id"), str):
            commit, files = hub_files(dataset["hub_id"], dataset.get("revision"), "dataset")
            yield "dataset.hub_id", files, commit


def torchvision_weights(architecture: str) -> Files:
    """The published weights in torch's cache, where they differ from the digest that their file name carries."""
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torch")
    files = {}
    for path in sorted(Path(os.path.expanduser(home), "hub", "checkpoints").glob(f"{architecture}-*.pth")):
        stated = re.search(r"-([0-9a-f]{8,})\.pth$", path.name)
        if not stated or not digests.of_files([path])[0].startswith(stated[1]):
            files[path.name] = path
    return files


# ---------------------------------------------------------------------------------------------------------------------
# Source code


def package_source() -> Files:
    """Everything of this package that computes; the options in conf/ stand in the configuration itself."""
    skip = (*NOT_COMPUTING, "conf", "__pycache__")
    return {os.path.relpath(p, PACKAGE): p for p in below(PACKAGE, "*.py", "*.cu", skip=skip.__contains__)}


def own_source(config: dict[str, Any]) -> Files:
    """Source of the modules outside this package that a `_target_` names, and of what they import from beside them."""
    files: Files = {}
    for node in config.values():
        if isinstance(node, dict) and "_target_" in node:
            module = str(node["_target_"]).rpartition(".")[0]
            if module and module.split(".")[0] != PACKAGE.name:
                follow(module, files)
    return files


def follow(module: str, files: Files) -> None:
    """Add a module's source to `files`, that of its packages, and that of every module it imports from the same place.

    The same place is the folder that holds the module's outermost package; in Python's own folders and among installed
    packages only that package itself. Imports are read, not run: a module that is imported by a computed name is missed.
    """
    top = module.partition(".")[0]
    first = module_file(top)
    place = first and (first.parents[1] if first.name == "__init__.py" else first.parent)
    installed = place and (place.name in PYTHON_TESTS or place == Path(sysconfig.get_path("stdlib")))
    waiting = [module]
    while waiting:
        name = waiting.pop()
        names = [name.rsplit(".", i)[0] for i in range(name.count(".") + 1)]
        for each in names:
            path = module_file(each)
            if path is None or each in files or path.suffix != ".py":
                continue
            if each.split(".")[0] != top and (installed or not path.is_relative_to(place or path)):
                continue
            files[each] = path
            waiting += imports(path, each)


def imports(path: Path, module: str) -> Iterator[str]:
    """Dotted names that a source file may import, relative ones resolved; of `from a import b` both a and a.b."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree_of(path) or ast.Module([], [])):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            outer = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, (outer, node.module)))
            yield from filter(None, [base, *(f"{base}.{a.name}".strip(".") for a in node.names)])
