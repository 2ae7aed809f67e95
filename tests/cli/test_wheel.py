"""The wheel: built, installed in an environment of its own, run from another folder with its own conf and assets."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_wheel_holds_what_runs(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("conf/config.yaml", "conf/method/teal.yaml", "kernels/decode.cu", "records/record.schema.json"):
        assert f"sparsebench/{name}" in names
    assert (
        "sparsebench/assets/llama-tiny/model.safetensors" in names
        and "sparsebench/assets/llama-tiny/training.json" in names
    )
    assert not any(name.startswith(("tests/", "outputs/")) for name in names)
    assert wheel.stat().st_size < 12e6


@pytest.fixture(scope="module")
def site(wheel):
    """The wheel in a folder of its own that stands before the source tree, whose packages it borrows; read by anybody."""
    base = Path(tempfile.mkdtemp(prefix="sparsebench-wheel-"))
    base.chmod(0o755)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*install, str(base / "site"), str(wheel)], check=True, capture_output=True)
    yield base / "site"
    shutil.rmtree(base)


def check_default(command, folder, environment):
    """Run the installed package's default in `folder`; returns the finished process."""
    code = "import sparsebench, sys; sys.exit(0 if sparsebench.__file__.startswith(sys.argv[1]) else 3)"
    where = environment["PYTHONPATH"]
    subprocess.run([*command, sys.executable, "-c", code, where], check=True, cwd=folder, env=environment)
    process = subprocess.run(
        [*command, sys.executable, "-m", "sparsebench"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    line = json.loads(process.stdout.splitlines()[-1])
    assert line["status"] == "finished" and (folder / line["record"]).exists()
    return process


@pytest.mark.slow
def test_wheel_runs_the_default_elsewhere(site, tmp_path):
    check_default([], tmp_path, {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_wheel_runs_the_default_for_another_user_without_a_home(site):
    """A site-packages that can't be written, an unknown uid, no HOME, an environment with nothing in it.

    Before: `no locator available`, `Could not determine home directory`, a folder called `~`.
    """
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv, to become another user")
    user = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups"]
    folder = site.parent / "elsewhere"
    folder.mkdir()
    os.chown(folder, 54321, 54321)
    own = Path(tempfile.gettempdir(), "sparsebench-54321")
    shutil.rmtree(own, ignore_errors=True)
    before = set(Path(tempfile.gettempdir()).iterdir())
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    process = check_default(user, folder, environment)
    assert "Traceback" not in process.stderr and "W&B" not in process.stderr
    assert [p.name for p in folder.iterdir()] == ["outputs"]
    assert list((own / "numba").rglob("*.nbc")) and list(folder.rglob("offline-run-*/*.wandb"))
    assert not any(
        p.exists() and p.stat().st_uid == 54321 for p in set(Path(tempfile.gettempdir()).iterdir()) - before - {own}
    )
    shutil.rmtree(own)
