"""What a fit leaves behind: tensors and facts, kept as safetensors under a key of everything that shaped them.

A state is all that `apply` needs beside the model, so a sweep over operating points fits once, and a state written by
one process rebuilds the identical sparse model in another. It carries the SHA-256 of its content and the name it was
written under: one flipped byte, or the state of another fit under this name, is noticed and made again.
"""

from __future__ import annotations

import fcntl
import hashlib
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
from sparsebench.config.identity import contents, digest
from sparsebench.config.settings import Settings
from sparsebench.records import files

log = logging.getLogger(__name__)
FILE = "state.safetensors"  # in a run's folder
FICLONE = 0x40049409  # Linux: share the blocks of another file until one of the two is written


class Damaged(ValueError):
    """A file that is not the state it should be; the message says why."""


@dataclass
class State:
    """tensors: contiguous, on the CPU. info: JSON-ready facts (also shown in the record under `fit`)."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)


def checksum(tensors: dict[str, torch.Tensor], info: str) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of contiguous CPU tensors in the order of their names, and `info`."""
    whole = hashlib.sha256(info.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        whole.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def write(state: State, path: Path) -> str:
    """Write a state at `path` and return its checksum."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    info = json.dumps(files.scrubbed(files.plain(state.info)))
    digest = checksum(tensors, info)
    files.write_atomic(path, save(tensors, metadata={"info": info, "sha256": digest, "name": path.stem}))
    return digest


def load(path: Path) -> tuple[State, str, str]:
    """(the state at `path`, its checksum, the name it was written under). Raises FileNotFoundError and Damaged."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            state = State(tensors, json.loads(metadata["info"]))
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(state.info, dict):
        raise Damaged("its facts are no JSON object")
    digest = checksum(tensors, metadata["info"])
    if digest != metadata.get("sha256"):
        raise Damaged(f"its SHA-256 is {digest[:10]}, not {str(metadata.get('sha256'))[:10]} as it was written")
    return state, digest, metadata.get("name", "")


def read(path: Path) -> State | None:
    """The state at `path`, or None where there is none, where it is damaged or was written under another name."""
    try:
        state, _, name = load(path)
        if name != path.stem and path.name != FILE:
            raise Damaged(f"it is that of {name or 'nothing'}")
    except FileNotFoundError:
        return None
    except Damaged as error:
        log.warning("cached state %s is damaged (%s): fitting again", path.name, error)
        return None
    return state


def keep(path: Path, folder: Path) -> None:
    """Copy the state at `path` into a run's folder, so that the folder alone rebuilds the sparse model.

    A copy of its own, so that no damage reaches both; the file system shares blocks where it can (btrfs, XFS).
    """
    target, partial = folder / FILE, folder / f".{FILE}.partial"
    partial.unlink(missing_ok=True)
    with path.open("rb") as source, partial.open("wb") as copy:
        try:
            fcntl.ioctl(copy.fileno(), FICLONE, source.fileno())
        except OSError:
            shutil.copyfileobj(source, copy, 1 << 20)
        copy.flush()
        os.fsync(copy.fileno())
    os.replace(partial, target)


def cached(path: Path, fit: Callable[[], State]) -> tuple[State, dict[str, Any]]:
    """The state at `path`, fitted and written first where need be; one process fits, others wait for it.

    Returns the state and {seconds, cached, state_sha256}.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with ranks.locked(path.with_suffix(".lock")):
        state = read(path) if ranks.first() else None
        if ranks.agreed(state is not None):
            state = state or load(path)[0]
            seconds = state.info.get("fit_seconds", 0.0)
            return state, {"seconds": seconds, "cached": True, "state_sha256": recorded(path)}
        start = time.perf_counter()
        state = fit()
        state.info["fit_seconds"] = time.perf_counter() - start
        sha256 = write(state, path) if ranks.first() else None
    return state, {"seconds": state.info["fit_seconds"], "cached": False, "state_sha256": sha256}


def check_quantisation(state: State, model: dict[str, Any]) -> None:
    """Raise ValueError where a state was fitted on weights stored in another way; model: the record's model section."""
    fitted, present = state.info.get("quantisation"), model.get("quantisation")
    if files.plain(fitted) != files.plain(present):
        raise ValueError(
            f"method: thresholds of {in_words(fitted)} don't serve {in_words(present)}: what is run must be what was "
            "calibrated (fit again)"
        )


def in_words(quantisation: dict[str, Any] | None) -> str:
    if quantisation is None:
        return "unquantised weights"
    group = quantisation.get("group")
    return f"int{quantisation['bits']} weights" + (f" in groups of {group} ({quantisation['axis']})" if group else "")


def recorded(path: Path) -> str:
    """The checksum that a state carries."""
    with safetensors.safe_open(path, framework="pt") as file:
        return str(file.metadata()["sha256"])


def key(settings: Settings, configuration: dict[str, Any], machine: dict[str, Any]) -> str:
    """Hash of what shapes a fit: all but evaluation, measuring, kernel and the method's operating point."""
    method = {k: v for k, v in configuration["method"].items() if k not in settings.method.operating_point}
    hardware = settings.hardware.read_back()
    parts = {
        "method": method,
        "model": configuration["model"],
        "dataset": configuration["dataset"],
        "seed": configuration["seed"],
        "contents": contents({k: configuration[k] for k in ("model", "dataset", "method")}),
        "device": hardware["device"],
        "dtype": hardware["dtype"],
        "versions": machine["versions"],
    }
    if hardware["devices"] > 1:  # random weights are drawn by each device
        parts["devices"] = hardware["devices"]
    return digest(parts)[:16]
