"""The Hugging Face Hub, asked politely: is it there, is it cached, before any library starts to retry for minutes."""

from __future__ import annotations

import functools
import socket
import urllib.parse
import urllib.request
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from sparsebench.config.inputs import hub_files


@functools.cache
def reachable() -> bool:
    """Whether the Hub's host name resolves (or a proxy will resolve it) and offline mode is off."""
    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urllib.parse.urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def model_problem(path: str, key: str) -> str | None:
    """Why a model can't be loaded from `path` (a folder or a Hub id), in one line, or None."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            return f"{key} must be a folder with config.json and *.safetensors, got {path!r} without config.json"
        if not any(folder.glob("*.safetensors")):
            pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
            instead = (
                f"{', '.join(pickles)} (pickle files are not opened: they can run code)" if pickles else "no weights"
            )
            return f"{key} must be a folder with *.safetensors, got {path!r} with {instead}"
        return None
    if folder.is_absolute() or path.startswith((".", "~")) or folder.exists():
        return f"{key} must be an existing folder or a Hub id, got {path!r}"
    try:
        cached = isinstance(try_to_load_from_cache(path, "config.json"), str)
    except HFValidationError:
        return f"{key} must be an existing folder or a Hub id like owner/name, got {path!r}"
    if not cached and not reachable():
        return (
            f"{key}={path} is neither a folder nor in the local Hub cache, and the Hub can't be reached: "
            f"set {key}=<folder with config.json, *.safetensors and tokenizer files>, or model.weights=random for timing"
        )
    return None


def commit(path: str | None, revision: str | None) -> str | None:
    """The commit that a model's Hub id stands for in the local cache, else `revision`.

    The run's identity holds that commit, so it must be the one that is loaded, whatever the Hub has by now.
    """
    return (hub_files(path, revision, "model")[0] if path else None) or revision


def dataset_ready(hub_id: str) -> bool:
    """Whether a data set can be had: the Hub answers, or `datasets` has it in its cache."""
    if reachable():
        return True
    from datasets import config

    return (Path(config.HF_DATASETS_CACHE) / hub_id.replace("/", "___").lower()).exists()


def dataset_splits(source) -> list[str]:
    """Names of the splits a Hub data set has."""
    from datasets import get_dataset_split_names

    return get_dataset_split_names(source.hub_id, source.hub_config, revision=source.revision)


def dataset_rows(source, split: str, limit: int | None = None) -> list[str]:
    """The text field of the first `limit` rows of a split of the Hub data set `source` (a data.text.Text)."""
    from datasets import load_dataset

    files = {split: source.hub_files.format(split=split)} if source.hub_files else None
    rows = load_dataset(
        source.hub_id,
        source.hub_config,
        split=split,
        revision=source.revision,
        data_files=files,
        streaming=limit is not None,
    )
    return [row[source.text_field] for row in (rows.take(limit) if limit is not None else rows)]
