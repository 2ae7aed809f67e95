"""What names a run: a hash of everything that affects its numbers. No torch here (config.py says why)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

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


def local_files(config: Any) -> dict[str, list]:
    """Size and modification time of the files that `path`, `histograms` and `rho_file` keys point to: other content, other run."""
    found = {}
    if isinstance(config, dict):
        for key, value in config.items():
            if key in ("path", "histograms", "rho_file") and isinstance(value, str) and Path(value).exists():
                root = Path(value)
                files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
                found[value] = [[str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
            else:
                found.update(local_files(value))
    return found


def identity_of(config: dict, machine: dict) -> str:
    """The hash that names a run: everything that affects its numbers, nothing that does not.

    `machine` is `env.machine()`: the device and the versions of the packages that compute. Machine and local input
    files are part of it, since a number measured elsewhere or on other data is another number.
    """
    content = {k: v for k, v in config.items() if k not in NOT_IDENTITY}
    return digest({"config": content, "machine": machine, "files": local_files(content)})
