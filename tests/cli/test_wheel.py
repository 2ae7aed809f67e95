"""The wheel: built, installed in an environment of its own, run from another folder with its own conf and assets."""

import json
import os
import subprocess
import sys
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
    for name in ("conf/config.yaml", "conf/method/teal.yaml", "kernels/decode.cu", "record.schema.json"):
        assert f"sparsebench/{name}" in names
    assert (
        "sparsebench/assets/llama-tiny/model.safetensors" in names
        and "sparsebench/assets/llama-tiny/training.json" in names
    )
    assert not any(name.startswith(("tests/", "outputs/")) for name in names)
    assert wheel.stat().st_size < 12e6


@pytest.mark.slow
def test_wheel_runs_the_default_elsewhere(wheel, tmp_path):
    """Installed into a folder of its own that stands before the source tree, whose packages it borrows."""
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    (tmp_path / "elsewhere").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    code = "import sparsebench, sys; sys.exit(0 if sparsebench.__file__.startswith(sys.argv[1]) else 3)"
    subprocess.run([sys.executable, "-c", code, str(site)], check=True, cwd=tmp_path / "elsewhere", env=environment)
    process = subprocess.run(
        [sys.executable, "-m", "sparsebench"],
        cwd=tmp_path / "elsewhere",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    line = json.loads(process.stdout.splitlines()[-1])
    assert line["status"] == "finished" and (tmp_path / "elsewhere" / line["record"]).exists()
