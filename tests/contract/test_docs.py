"""What the README says is what the program does."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from sparsebench.records.record import SCHEMA_FILE
from tests.helpers import QUICK_RUN, record_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def block(first_line: str) -> str:
    """The fenced block that begins with this line."""
    return next(b for b in re.findall(r"```\w*\n(.*?)```", README, re.S) if b.startswith(first_line))


def test_the_added_method_runs(model_folder, text_file, tmp_path):
    (tmp_path / "fixed.py").write_text(block("# fixed.py"))
    (tmp_path / "extra" / "method").mkdir(parents=True)
    (tmp_path / "extra" / "method" / "fixed.yaml").write_text(block("# extra/method/fixed.yaml"))
    given = [a for a in QUICK_RUN if not a.startswith("method.")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", *filter(None, [os.environ.get("PYTHONPATH")])])}
    process = subprocess.run(
        [sys.executable, "-m", "sparsebench", "--config-dir", "extra", "method=fixed", "model=hf",
         f"model.path={model_folder('llama')}", f"dataset.path={text_file}", *given],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    found = record_of(process, tmp_path)
    assert found["sparsity"]["requested"] is None and 0 < found["sparsity"]["model_wide"] < 1
    assert found["latency"]["decode"]["speedup"] > 0


def test_every_record_key_is_explained():
    table = README[README.index("## What each number means") : README.index("**Exit codes**")]
    for key in json.loads(SCHEMA_FILE.read_text())["properties"]:
        assert key in table, key


def test_every_option_is_named():
    for group in ("model", "dataset", "method", "hardware"):
        for file in (ROOT / "conf" / group).glob("*.yaml"):
            assert f"`{file.stem}`" in README, f"{group}={file.stem}"


def test_every_dependency_has_a_word():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        name = re.match(r"[\w.-]+", requirement).group()
        assert name in README[README.index("## Dependencies") :], name


def test_every_make_target_is_named():
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
    for target in targets:
        assert target in README or target in ("help", "clean"), target
