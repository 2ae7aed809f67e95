"""Shared fixtures: tiny models made on the spot, a text file, the installed command. No test reaches a network."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from sparsebench.kernels import cuda_gather
from tests.helpers import COMMAND, SHARED, TEXT, Rows, tiny_model, tiny_tokenizer

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("SPARSEBENCH_CACHE", str(Path(tempfile.gettempdir(), f"sparsebench-tests-{os.getuid()}")))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any attempt to connect to another host fails at once."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"network is off in tests: {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """A function (dtype, group, splits) -> library with decode.cu's kernels for the CPU."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to build the CUDA kernels for the CPU")
    folder, built = tmp_path_factory.mktemp("cuda"), {}

    def build(**defines):
        key = tuple(sorted(defines.items()))
        if key not in built:
            target = folder / f"{len(built)}.so"
            source = Path(__file__).with_name("kernels") / "cuda_on_cpu.cpp"
            flags = [f"-D{k}={v}" for k, v in defines.items()] + [f'-DDECODE_CU="{cuda_gather.SOURCE}"']
            subprocess.run(
                [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", *flags, source, "-o", target],
                check=True,
            )
            built[key] = ctypes.CDLL(str(target))
        return built[key]

    return build


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def sparsebench(tmp_path):
    """Run the installed command in an empty folder; returns the finished process."""

    def call(*arguments: str, timeout: int = 300, env: dict | None = None, **kwargs) -> subprocess.CompletedProcess:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})}
        return subprocess.run(
            [COMMAND, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            **kwargs,
        )

    return call


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A function kind -> folder with a tiny model and tokenizer saved by transformers."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            tiny_model(kind).save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
            made[kind] = folder
        return made[kind]

    return make


@pytest.fixture
def data():
    """Fit, dev and test windows of 32 tokens for the tiny models."""
    ids = torch.tensor(tiny_tokenizer()(TEXT)["input_ids"])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)

    class Data:
        fit, dev, test = Rows(windows[:64]), Rows(windows[64:80]), Rows(windows[80:120])

    return Data


@pytest.fixture
def real_models():
    """The folder that scripts/get_real_models.py fills; tests that need it are skipped, visibly, where it is absent."""
    folder = os.environ.get("SPARSEBENCH_MODELS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real models: scripts/get_real_models.py FOLDER, then SPARSEBENCH_MODELS=FOLDER")
    return Path(folder)


@pytest.fixture
def shared_data():
    """The folder of real inputs; tests that need it are skipped, visibly, where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the data folder {SHARED} (set SPARSEBENCH_DATA)")
    return SHARED
