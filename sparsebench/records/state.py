"""What a fit leaves behind: tensors and facts, kept as safetensors under a key of everything that shaped them.

A state is all that `apply` needs beside the model, so a sweep over operating points fits once, and a state written by
one process rebuilds the identical sparse model in another.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save

from sparsebench import ranks
from sparsebench.config.identity import digest, local_files
from sparsebench.config.settings import Settings
from sparsebench.records import files

log = logging.getLogger(__name__)
FILE = "state.safetensors"  # in a run's folder


@dataclass
class State:
    """tensors: contiguous, on the CPU. info: JSON-ready facts (also shown in the record under `fit`)."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)


def write(state: State, path: Path) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    files.write_atomic(path, save(tensors, metadata={"info": json.dumps(files.plain(state.info))}))


def read(path: Path) -> State | None:
    """The state at `path`, or None where there is none or where the file is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return State({k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["info"]))  # noqa: SIM118
    except FileNotFoundError:
        return None
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("cached state %s is damaged (%s): fitting again", path.name, error)
        return None


def keep(path: Path, folder: Path) -> None:
    """Put the state at `path` into a run's folder, so that the folder alone rebuilds the sparse model.

    A hard link where the file system has them (no second copy on the disk; a later refit replaces the cached file, not
    this one), a copy otherwise.
    """
    target, partial = folder / FILE, folder / f".{FILE}.partial"
    partial.unlink(missing_ok=True)
    try:
        os.link(path, partial)
    except OSError:
        shutil.copyfile(path, partial)
    os.replace(partial, target)
    partial.unlink(missing_ok=True)  # replacing a link to the same file leaves both


def cached(path: Path, fit: Callable[[], State]) -> tuple[State, dict[str, Any]]:
    """The state at `path`, fitted and written first where need be; one process fits, others wait for it.

    Returns the state and {seconds, cached}.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with ranks.locked(path.with_suffix(".lock")):
        state = read(path) if ranks.first() else None
        if ranks.agreed(state is not None):
            state = state or read(path)
            if state is None:
                raise OSError(f"{path}: a state that another process has read can't be read here")
            return state, {"seconds": state.info.get("fit_seconds", 0.0), "cached": True}
        start = time.perf_counter()
        state = fit()
        state.info["fit_seconds"] = time.perf_counter() - start
        if ranks.first():
            write(state, path)
    return state, {"seconds": state.info["fit_seconds"], "cached": False}


def key(settings: Settings, configuration: dict[str, Any], machine: dict[str, Any]) -> str:
    """Hash of what shapes a fit: all but evaluation, measuring, kernel and the method's operating point."""
    method = {k: v for k, v in configuration["method"].items() if k not in settings.method.operating_point}
    hardware = settings.hardware.read_back()
    parts = {
        "method": method,
        "model": configuration["model"],
        "dataset": configuration["dataset"],
        "seed": configuration["seed"],
        "files": local_files({k: configuration[k] for k in ("model", "dataset", "method")}),
        "device": hardware["device"],
        "dtype": hardware["dtype"],
        "versions": machine["versions"],
    }
    return digest(parts)[:16]
