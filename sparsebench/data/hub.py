"""The Hugging Face Hub, asked politely: is it there, is it cached, before any library starts to retry for minutes."""

from __future__ import annotations

import functools
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RemoteEntryNotFoundError

from sparsebench.config.inputs import hub_files
from sparsebench.data.documents import Budget, check_fields, text_of


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


def model_problem(path: str, key: str, revision: str | None = None) -> str | None:
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
        cached = isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str)
    except HFValidationError:
        return f"{key} must be an existing folder or a Hub id like owner/name, got {path!r}"
    if not cached and not reachable():
        return (
            f"{key}={path} is neither a folder nor in the local Hub cache, and the Hub can't be reached: "
            f"set {key}=<folder with config.json, *.safetensors and tokenizer files>, or model.weights=random for timing"
        )
    return None if cached else unheard_of(path, revision, "model", key)


def unheard_of(repository: str, revision: str | None, kind: str, key: str) -> str | None:
    """Let the local cache hear which commit a repository of the Hub stands for, which names the run: the line about why it
    can't, or None."""
    name = {"model": "config.json", "dataset": "README.md"}[kind]
    try:
        with answering(key, repository, revision), suppress(RemoteEntryNotFoundError):  # heard even so
            hf_hub_download(repository, name, revision=revision, repo_type=kind)
    except ValueError as error:
        return str(error)
    return None


def commit(path: str | None, revision: str | None, kind: str = "model") -> str | None:
    """The commit that a Hub id stands for in the local cache, else `revision`.

    The run's identity holds that commit, so it must be the one that is loaded, whatever the Hub has by now.
    """
    return (hub_files(path, revision, kind)[0] if path else None) or revision


@contextmanager
def answering(key: str, name: str, revision: str | None = None) -> Iterator[None]:
    """Give what the Hub answers to requests in the block, as a ValueError of one line with what to do about it.

    key: the setting that names the repository, e.g. model.path. Other errors pass.
    """
    try:
        yield
    except Exception as error:
        line = refusal(error, f"{key}={name}", f"{key.partition('.')[0]}.revision={revision}")
        if line is None:
            raise
        raise ValueError(line) from error


def refusal(error: BaseException | None, what: str, revision: str) -> str | None:
    """The line about an error that a request to the Hub ended in, somewhere in its chain of causes; None for another.

    Errors are known by the names of their classes: libraries change the package that sends their requests.
    """
    name, later = what.partition("=")[2], "the same command goes on where it can"
    lines = {
        "GatedRepoError": f"{what} is gated: accept its terms on the Hub and set HF_TOKEN",
        "RevisionNotFoundError": f"{revision} does not exist in {name}",
        "RepositoryNotFoundError": f"{what} does not exist on the Hub, or is private: check its name, or set HF_TOKEN",
        "DatasetNotFoundError": f"{what} does not exist on the Hub, or can't be read: check its name, or set HF_TOKEN",
        "OfflineModeIsEnabled": f"{what} is not whole in the local Hub cache, and the Hub can't be reached",
        "TimeoutException": f"{what}: the Hub did not answer in time; {later}",
        "TransportError": f"{what}: the connection to the Hub broke; {later}",
        "ConnectionError": f"{what}: the connection to the Hub broke; {later}",
    }
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    known = {base.__name__ for each in chain for base in type(each).__mro__}
    answers = [getattr(each.response, "status_code", None) for each in chain if isinstance(each, HfHubHTTPError)]
    status = next((code for code in answers if code), None)
    if status is not None:
        lines["HfHubHTTPError"] = f"{what}: the Hub answered with status {status}; {later}"
    lines["LocalEntryNotFoundError"] = f"{what}: the Hub can't be reached, and the local cache does not hold all of it"
    return next((line for kind, line in lines.items() if kind in known), None)


@contextmanager
def offline() -> Iterator[None]:
    """Let no library try the Hub, which each would do for minutes."""
    import datasets

    places = [(constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, True)
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def dataset_problem(source: Any) -> str | None:
    """Why the Hub data set `source` (a data.text.Text) can't be had, or None. Without the Hub, `datasets` itself is asked
    what it can load from its cache."""
    if reachable():
        heard = hub_files(source.hub_id, source.revision, "dataset")[0]
        return None if heard else unheard_of(source.hub_id, source.revision, "dataset", "dataset.hub_id")
    from datasets import load_dataset_builder

    try:
        with offline():
            builder = load_dataset_builder(source.hub_id, source.hub_config)
    except Exception:  # whatever a library says about a set that it has not
        return f"{source.hub_id} is not in the local cache of datasets and the Hub can't be reached"
    wanted = commit(source.hub_id, source.revision, "dataset")
    if source.revision is not None and builder.hash != wanted:
        return f"dataset.revision={source.revision} is not in the local cache of datasets, which holds {builder.hash}"
    return None


def dataset_splits(source: Any) -> list[str]:
    """Names of the splits a Hub data set has."""
    from datasets import get_dataset_split_names

    with asking(source):
        revision = commit(source.hub_id, source.revision, "dataset")
        return get_dataset_split_names(source.hub_id, source.hub_config, revision=revision)


@contextmanager
def asking(source: Any) -> Iterator[None]:
    """Requests about a data set, to its cache alone where the Hub can't be reached."""
    with answering("dataset.hub_id", source.hub_id, source.revision), nullcontext() if reachable() else offline():
        yield


def dataset_rows(source: Any, split: str, limit: int | None = None) -> list[str]:
    """The text field of the first `limit` rows of a split of the Hub data set `source` (a data.text.Text)."""
    from datasets import load_dataset

    patterns = {split: source.hub_files.format(split=split)} if source.hub_files else None
    with asking(source):
        rows = load_dataset(
            source.hub_id,
            source.hub_config,
            split=split,
            revision=commit(source.hub_id, source.revision, "dataset"),
            data_files=patterns,
            streaming=limit is not None,
        )
        budget, texts = Budget(), []
        for number, row in enumerate(rows.take(limit) if limit is not None else rows):
            if source.text_field not in row:
                check_fields({"text_field": source.text_field}, list(row))
            if row[source.text_field] is None:
                continue
            text = text_of(
                row[source.text_field], f"dataset.text_field={source.text_field}", f"row {number} of {split}"
            )
            budget.take(len(text), Path(source.hub_id))
            texts.append(text)
    return texts
