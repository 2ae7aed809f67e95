"""What names a run: a hash of everything that affects its numbers. No torch here (`--help` and cached answers stay instant).

That is the configuration, the machine with its versions, and the content of everything that is read (inputs.py): of
files, not their names or times.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sparsebench.config import digests, inputs

# Keys that say where and whether to write, not what is computed: they are no part of a run's identity.
NOT_IDENTITY = ("output_dir", "force", "share", "fail_fast", "sweep", "wandb")


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


def contents(config: dict[str, Any]) -> dict[str, Any]:
    """Digests of what is read beside the configuration: files that settings name, what names stand for, source code."""
    files_of: dict[str, Any] = {}
    for key, value, kind, node in inputs.named(config):
        files_of.setdefault(key, []).append(by_name(inputs.read_files(value, kind, node)))
    for key, files, commit in inputs.implied(config):
        files_of[f"{key} stands for"] = [commit, by_name(files)]
    return {k: v for k, v in files_of.items() if v not in ([{}], [None, {}])} | {
        "package": package(), "own source": by_name(inputs.own_source(config)),
    }  # fmt: skip


def by_name(files: inputs.Files) -> dict[str, str]:
    """name -> SHA-256 of the content."""
    return dict(zip(files, digests.of_files(files.values()), strict=True))


def package() -> str:
    """Digest of this package's source: another one under the same version number computes something else."""
    return digest(by_name(inputs.package_source()))


def identity_of(config: dict[str, Any], machine: dict[str, Any]) -> str:
    """The hash that names a run: everything that affects its numbers, nothing that does not.

    `machine` is `machine.machine()`: devices, cores and the versions of the packages that compute. Machine and inputs
    are part of it, since a number measured elsewhere or on other data is another number.
    """
    settings = {k: v for k, v in config.items() if k not in NOT_IDENTITY}
    return digest({"config": settings, "machine": machine, "contents": contents(config)})
