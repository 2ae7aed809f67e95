"""What names a run: a hash of everything that affects its numbers. No torch here (`--help` and cached answers stay instant).

Which settings name files is read from the source of the classes, where `setting(file=True)` says so: importing a method
would import torch.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsebench.config.settings import Evaluation

# Keys that say where and whether to write, not what is computed: they are no part of a run's identity.
NOT_IDENTITY = ("output_dir", "force", "fail_fast", "sweep", "wandb")


def canonical(value: Any) -> Any:
    """The same for values that mean the same: 1 and 1.0, key order."""
    if isinstance(value, dict):
        return {str(k): canonical(value[k]) for k in sorted(value, key=str)}
    if isinstance(value, (list, tuple)):
        return [canonical(v) for v in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def digest(content: Any) -> str:
    """SHA-256 of any JSON-like content in canonical form."""
    return hashlib.sha256(json.dumps(canonical(content), sort_keys=True).encode()).hexdigest()


@functools.cache
def file_fields(target: str) -> frozenset[str]:
    """Names of the fields that `setting(file=True)` marks in the class at a dotted path, without importing it."""
    module, _, name = target.rpartition(".")
    try:
        spec = importlib.util.find_spec(module)
        tree = ast.parse(Path(str(spec.origin)).read_text(encoding="utf-8")) if spec else None
    except (ImportError, OSError, SyntaxError, ValueError, AttributeError):
        return frozenset()
    for node in tree.body if tree else ():
        if isinstance(node, ast.ClassDef) and node.name == name:
            return frozenset(marked(node))
        if isinstance(node, ast.ImportFrom) and node.module and any(a.name == name for a in node.names):
            return file_fields(f"{node.module}.{name}")
    return frozenset()


def marked(node: ast.ClassDef) -> Iterator[str]:
    """The fields of a class statement whose `setting` says file=True."""
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(line.value, ast.Call):
            for keyword in line.value.keywords:
                if keyword.arg == "file" and isinstance(keyword.value, ast.Constant) and keyword.value.value:
                    yield line.target.id


def named_files(config: dict[str, Any]) -> Iterator[str]:
    """The values of all settings of a configuration that may name a file or folder."""
    for group, node in config.items():
        if isinstance(node, dict) and "_target_" in node:
            yield from (node[f] for f in sorted(file_fields(str(node["_target_"]))) if isinstance(node.get(f), str))
        elif group == "eval" and isinstance(node, dict):
            for part, values in node.items():
                target = f"{Evaluation.__module__}.{Evaluation.__annotations__.get(part)}"
                yield from (values[f] for f in sorted(file_fields(target)) if isinstance(values.get(f), str))


def local_files(config: dict[str, Any]) -> dict[str, list[list[Any]]]:
    """Size and modification time of the files that settings point to: other content, other run."""
    found = {}
    for value in named_files(config):
        root = Path(value)
        if root.exists():
            files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
            found[value] = [[str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    return found


def identity_of(config: dict[str, Any], machine: dict[str, Any]) -> str:
    """The hash that names a run: everything that affects its numbers, nothing that does not.

    `machine` is `machine.machine()`: the device and the versions of the packages that compute. Machine and local input
    files are part of it, since a number measured elsewhere or on other data is another number.
    """
    content = {k: v for k, v in config.items() if k not in NOT_IDENTITY}
    return digest({"config": content, "machine": machine, "files": local_files(content)})
