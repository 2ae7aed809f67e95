"""The cache folder: where it lies, a home for libraries where there is none, and compiled code that was damaged."""

import fcntl
import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import numba
import pytest

from sparsebench import cache, config

FUNCTION = "from numba import njit\n@njit(cache=True)\ndef twice(x):\n    return 2 * x\n"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A cache folder of the test's own, unused so far."""
    monkeypatch.setenv("SPARSEBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache.Users, "lock", None)
    monkeypatch.setattr("atexit.register", lambda do: None)
    for variable in cache.COMPILERS:
        monkeypatch.delenv(variable, raising=False)
    yield cache.folder()
    if cache.Users.lock is not None:
        cache.Users.lock.close()


def unused():
    """As a new process."""
    if cache.Users.lock is not None:
        cache.Users.lock.close()
    cache.Users.lock = None


def test_compilers_keep_their_code_in_the_folder_unless_told_otherwise(own, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    cache.provide_compilers()
    assert os.environ["NUMBA_CACHE_DIR"] == numba.config.CACHE_DIR == str(own / "numba")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(own / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"


@pytest.mark.parametrize("end", [".nbi", ".nbc"])
def test_a_truncated_numba_file_fails_every_start_until_it_is_healed(own, tmp_path, monkeypatch, end):
    """Before: EOFError or UnpicklingError at every start."""
    (tmp_path / "doubled.py").write_text(FUNCTION)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(own / "numba"))
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(own / "numba"))

    def start():
        spec = importlib.util.spec_from_file_location("doubled", tmp_path / "doubled.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.twice(4)

    cache.check_compiled()
    assert start() == 8
    cache.seal_compiled()
    kept = {p: p.read_bytes() for p in own.rglob("*.nb?")}
    unused()
    cache.check_compiled()
    assert {p: p.read_bytes() for p in own.rglob("*.nb?")} == kept  # nothing is wrong with these
    (file,) = own.rglob(f"*{end}")
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(Exception):  # noqa: B017 - whatever pickle raises
        start()
    unused()
    cache.check_compiled()
    assert not file.exists() and start() == 8


@pytest.mark.parametrize("name", ["numba", "triton", "inductor"])
def test_what_is_not_as_a_run_left_it_is_removed(own, name):
    whole, flipped, empty, unsealed = (own / name / "ab" / f"{i}.so" for i in range(4))
    whole.parent.mkdir(parents=True)
    for file in (whole, flipped, empty):
        file.write_bytes(b"machine code")
    cache.check_compiled()
    assert not whole.exists()  # nobody knows where it came from
    for file in (whole, flipped, empty):
        file.write_bytes(b"machine code")
    cache.seal_compiled()
    flipped.write_bytes(b"machine c0de")
    empty.write_bytes(b"")
    unsealed.write_bytes(b"half")
    cache.check_compiled()  # this process uses them already
    assert unsealed.exists()
    unused()
    with open(own / f"{cache.SEALS}.lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # another process uses them now
        cache.check_compiled()
        assert unsealed.exists()
    unused()
    cache.check_compiled()
    assert [p.exists() for p in (whole, flipped, empty, unsealed)] == [True, False, False, False]


def test_damaged_seals_only_cost_compiling_again(own):
    (own / "numba").mkdir()
    for seals in ("[]", "{", "\udcff"):
        (own / cache.SEALS).write_bytes(seals.encode("utf-8", "surrogateescape"))
        (own / "numba" / "a.nbc").write_bytes(b"x")
        unused()
        cache.check_compiled()
        assert not (own / "numba" / "a.nbc").exists()


def test_triton_makes_a_truncated_file_again(own, monkeypatch):
    """Triton's own manager takes a file of any length for what it once wrote."""
    runtime = pytest.importorskip("triton.runtime.cache", reason="needs triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(own / "triton"))
    manager = runtime.FileCacheManager("KEY")
    manager.put(b"cubin" * 100, "kernel.cubin")
    cache.check_compiled()
    path = manager.put(b"cubin" * 100, "kernel.cubin")
    cache.seal_compiled()
    with open(path, "r+b") as file:
        file.truncate(20)
    assert manager.get_file("kernel.cubin") == path
    unused()
    cache.check_compiled()
    assert manager.get_file("kernel.cubin") is None


@pytest.mark.slow
def test_torch_compiles_again_what_was_truncated(tmp_path):
    """Before: SyntaxError or InductorError at every start."""
    code = (
        "from sparsebench import cache, hardware; import torch, sys; 'check' in sys.argv and cache.check_compiled();"
        "print(float(torch.compile(lambda x: (torch.relu(x) @ x).sin().sum())(torch.eye(8))))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in cache.COMPILERS}
    environment["SPARSEBENCH_CACHE"] = str(tmp_path)

    def start(*given):
        command = [sys.executable, "-c", code, *given]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    first = start("check")
    if first.returncode:
        pytest.skip(f"torch.compile does not work here: {first.stderr.strip().splitlines()[-1]}")
    for file in (tmp_path / "inductor").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert start().returncode != 0
    assert start("check").stdout == first.stdout


def unknown(*arguments):
    raise KeyError("uid not found")


@pytest.mark.parametrize("home", [None, "/nonexistent", "a file", "~"])
def test_a_home_for_libraries_where_there_is_none(own, tmp_path, monkeypatch, home):
    """HOME unset for an unknown uid, wrong, or no folder. Before: `Could not determine home directory`, a folder `~`."""
    (tmp_path / "a file").write_text("")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv(
        "HOME", str(tmp_path / home) if home == "a file" else home
    )
    cache.provide_home()
    assert os.environ["HOME"] == str(own / "home") == os.path.expanduser("~") and (own / "home").is_dir()
    assert not (tmp_path / "~").exists()


def test_a_home_that_can_only_be_read_stays(own, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MPLCONFIGDIR", raising=False)
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    cache.provide_home()
    assert os.environ["HOME"] == str(tmp_path) and os.environ["MPLCONFIGDIR"] == str(own / "matplotlib")


def test_a_full_disk_is_as_good_as_none(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("SPARSEBENCH_CACHE", str(tmp_path / "full"))
    cache.writable.cache_clear()
    assert cache.folder().name.startswith("sparsebench-") and cache.folder().parent == tmp_path
    cache.writable.cache_clear()


def test_torch_is_told_its_folder_before_it_is_imported(monkeypatch):
    """Before: importing torch._dynamo made /tmp/torchinductor_<user> and told itself to compile there, unchecked."""
    for variable in cache.COMPILERS:
        monkeypatch.setenv(variable, "")  # so that it is put back as it was
        monkeypatch.delenv(variable)
    with pytest.raises(config.ConfigError):
        config.build_settings({})
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache.folder() / "inductor")
