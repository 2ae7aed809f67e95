"""The README's examples run as they stand: a method and a hardware target added from outside the package, the Python API."""

import os
import re
from pathlib import Path

import pytest

from tests.conftest import record_of

README = Path(__file__).parents[1] / "README.md"
SMALL = ("dataset.sequence_length=32", "eval.test_sequences=8", "measure.latency=false", "wandb.mode=disabled",
         "hardware.threads=1")  # fmt: skip


@pytest.fixture(scope="module")
def blocks():
    """Code blocks of the README by the file name in their first line, `# path/to/file`."""
    if not README.exists():
        pytest.skip("there is no README.md")
    found = re.findall(r"```(?:python|yaml)\n# (\S+\.(?:py|yaml))[^\n]*\n(.*?)```", README.read_text(), re.DOTALL)
    return {name: f"# {name}\n{content}" for name, content in found}


def lay(blocks, folder, *names):
    for name in names:
        if name not in blocks:
            pytest.skip(f"README.md has no example block that starts with '# {name}'")
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(blocks[name])


def test_adding_a_method(blocks, sparsebench, model_folder, text_file, tmp_path, monkeypatch):
    lay(blocks, tmp_path, "halves.py", "myconf/method/halves.yaml")
    monkeypatch.syspath_prepend(tmp_path)

    process = sparsebench(
        "--config-dir", "myconf", "method=halves", "method.drop=first", "model=hf", f"model.path={model_folder('llama')}",
        "dataset=text", f"dataset.path={text_file}", "hardware=cpu", *SMALL,
        env={"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    found = record_of(process, tmp_path)
    down = {name: site["sparsity"] for name, site in found["sparsity"]["per_site"].items()}
    assert all(share == 0.5 for name, share in down.items() if name.endswith("down"))
    assert found["sparsity"]["model_wide"] < 0.5 and found["macs"]["sparse"] < found["macs"]["dense"]
    wrong = sparsebench("--config-dir", "myconf", "method=halves", "method.drop=middle",
                        env={"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"})  # fmt: skip
    assert wrong.returncode == 2
    assert wrong.stderr.strip() == "error: method.drop must be one of first, last, got 'middle'"


def test_adding_a_hardware_target(blocks, sparsebench, tmp_path):
    lay(blocks, tmp_path, "myconf/hardware/mybox.yaml")
    process = sparsebench("--config-dir", "myconf", "hardware=mybox", "--cfg", "job")
    assert process.returncode == 0 and "name: mybox" in process.stdout
