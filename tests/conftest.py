"""Shared fixtures: tiny models made on the spot, a text file, the installed command. No test reaches a network."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from sparsebench import cache, cli
from sparsebench.kernels import cuda_gather
from sparsebench.records import stopping
from tests import forks
from tests.helpers import COMMAND, SHARED, TEXT, Rows, tiny_model, tiny_tokenizer

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("SPARSEBENCH_CACHE", str(Path(tempfile.gettempdir(), f"sparsebench-tests-{os.getuid()}")))
for variable in cache.COMPILERS:  # set when the kernels were imported above
    os.environ.pop(variable, None)
cache.provide_compilers()


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
def emulated():
    """A function (source=decode.cu, **defines) -> library with the kernels of a CUDA file for the CPU.

    A library lies in the tests' cache under the digest of everything it is made of: other processes and later sessions
    take it from there.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to build the CUDA kernels for the CPU")
    folder = Path(os.environ["SPARSEBENCH_CACHE"], "cuda-on-cpu")
    folder.mkdir(parents=True, exist_ok=True)
    beside = Path(__file__).with_name("kernels")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout

    @functools.cache
    def library(cuda: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
        main = beside / ("cuda_on_cpu.cpp" if cuda == cuda_gather.SOURCE else cuda.with_suffix("").name + "_on_cpu.cpp")
        files = (main, beside / "cuda_on_cpu.h", *sorted(cuda_gather.SOURCE.parent.glob("*.cu")))
        made_of = [version, *(path.read_bytes() for path in files), *(flag.encode() for flag in flags)]
        content = hashlib.sha256(b"\0".join(made_of)).hexdigest()
        target = folder / f"{content}.so"
        with FileLock(target.with_suffix(".lock")):
            if not target.exists():
                partial = target.with_suffix(".partial")
                fixed = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread"]
                sources = [f'-DDECODE_CU="{cuda}"', f'-DCUDA_SOURCE="{cuda}"', main]
                subprocess.run([compiler, *fixed, *flags, *sources, "-o", partial], check=True)
                partial.rename(target)
        return ctypes.CDLL(str(target))

    return lambda source=cuda_gather.SOURCE, **defines: library(
        source, tuple(f"-D{k}={v}" for k, v in sorted(defines.items()))
    )


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
def warm() -> dict[str, str]:
    """A process that has imported everything, for what is in forks.py; the environment of its commands."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_HUB_OFFLINE", "1")
        forks.serve()
        return dict(os.environ)


@pytest.fixture
def forked(warm, tmp_path):
    """As `sparsebench`, in a fork of a process that has imported everything: for whole runs.

    folder: where, if not there. main: of another command.
    """

    def call(*arguments: str, folder: Path = tmp_path, timeout: int = 300, env: dict | None = None, main=cli.main):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})}
        return forks.run(arguments, folder, environment, timeout, main)

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


@pytest.fixture
def listening():
    """Signals are heard as in the command, also those that nohup or a job in the background ignores; the tests' own
    handlers come back."""
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    stopping.listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    stopping.told = stopping.Told()
