"""Shared fixtures: tiny models made on the spot, a text file, the installed command. No test reaches a network."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsebench import config
from sparsebench.compose import compose_all
from sparsebench.kernels import cuda_gather

os.environ.setdefault("WANDB_MODE", "offline")
COMMAND = Path(sys.executable).with_name("sparsebench")
SHARED = Path(os.environ.get("SPARSEBENCH_DATA", Path(__file__).parents[2] / "shared" / "data"))


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
            source = Path(__file__).with_name("cuda_on_cpu.cpp")
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


def record_of(process: subprocess.CompletedProcess, folder: Path) -> dict:
    """The record that a finished command names in its last line."""
    line = json.loads(process.stdout.strip().splitlines()[-1])
    return json.loads((folder / line["record"]).read_text())


TEXT = "\n\n".join(
    f"Paragraph {i}. " + " ".join(f"word{(i * 7 + j * 3) % 91} of {(i + j) % 13}" for j in range(40))
    for i in range(120)
)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text(TEXT)
    return file


SHAPES = {
    "llama": {"num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4},
    "mistral": {"num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4},
    "qwen2": {"num_key_value_heads": 1, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4},
    "phi3": {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "pad_token_id": 0},
    "gpt2": {"n_embd": 64, "n_head": 4},
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 160, "num_attention_heads": 4},
}


def tiny_tokenizer():
    from sparsebench.models.scratch import byte_bpe

    return byte_bpe([TEXT], 320)


def built(group: str, /, *overrides: str, **changes):
    """The object of one group of the configuration, e.g. `method`, with these keys changed."""
    problems: list[str] = []
    found = config.build({**compose_all(list(overrides))[0][group], **changes}, group, problems)
    assert not problems, problems
    return found


def tiny_model(kind: str = "llama", layers: int = 2, seed: int = 0, **changes):
    """A small random causal LM of transformers, float32, eval mode."""
    import transformers

    torch.manual_seed(seed)
    depth = {"n_layer": layers} if kind == "gpt2" else {"num_hidden_layers": layers}
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=320, bos_token_id=0, eos_token_id=0, **{**SHAPES[kind], **depth, **changes}
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # larger than the default initialisation, so that activations differ between channels
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model.eval().requires_grad_(False)


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


class Rows:
    """A split of fixed windows."""

    def __init__(self, rows: torch.Tensor):
        self.rows, self.sequence_length = rows, rows.shape[1]

    def sequences(self, limit=None):
        return self.rows[:limit]


@pytest.fixture
def data():
    """Fit, dev and test windows of 32 tokens for the tiny models."""
    ids = torch.tensor(tiny_tokenizer()(TEXT)["input_ids"])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)

    class Data:
        fit, dev, test = Rows(windows[:64]), Rows(windows[64:80]), Rows(windows[80:120])

    return Data


@pytest.fixture
def shared_data():
    """The folder of real inputs; tests that need it are skipped, visibly, where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the data folder {SHARED} (set SPARSEBENCH_DATA)")
    return SHARED
