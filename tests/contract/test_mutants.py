"""`make mutants`: its list fits the code as it is, and its script tells a caught break from anything else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPT, LIST = ROOT / "scripts" / "mutants.py", ROOT / "tests" / "mutants.yaml"
ENTRIES = yaml.safe_load(LIST.read_text())
FEWEST = 55


def mutants(*arguments, root=ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, "--root", root, "--jobs", "1", "--bare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_every_pattern_occurs_once():
    process = mutants("--check")
    assert process.returncode == 0, process.stdout
    assert len(ENTRIES) >= FEWEST


def test_every_test_named_is_there():
    """By its function's name; the file of no entry is a test."""
    for entry in ENTRIES:
        file, _, name = entry["test"].partition("::")
        functions = {n.name for n in ast.parse((ROOT / file).read_text()).body if isinstance(n, ast.FunctionDef)}
        assert name.partition("[")[0] in functions, entry["test"]
        assert entry["file"].startswith("sparsebench/"), entry["name"]


CODE = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n\n\nLIMIT = 3\n"
TESTS = """
import pytest
from sparsebench import LIMIT, double, half

@pytest.fixture
def four():
    return 8 // int(double(1))

def test_double(): assert double(2) == 4
def test_half(): assert half(0) == 0
def test_four(four): assert four == 4
def test_skipped(): pytest.skip("not here")
"""
MADE = (  # name, old, new, test, what is said
    ("right", "2 * x", "3 * x", "test_double", "caught"),
    ("weak", "x / 2", "x / 3", "test_half", "survived"),
    ("gone", "4 * x", "5 * x", "test_double", "no match"),
    ("twice", "return", "print", "test_double", "no match"),
    ("unreadable", "2 * x", "2 * (x", "test_double", "no match"),
    ("unnamed", "2 * x", "2 * y", "test_double", "error"),
    ("uncollected", "LIMIT = 3", "MOST = 3", "test_double", "error"),
    ("fixture", "2 * x", "0 * x", "test_four", "error"),
    ("skipped", "2 * x", "3 * x", "test_skipped", "error"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkout of three files, and what the script says of it."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "sparsebench").mkdir()
    (root / "conf").mkdir()
    (root / "tests").mkdir()
    (root / "sparsebench" / "__init__.py").write_text(CODE)
    (root / "tests" / "test_made.py").write_text(TESTS)
    entries = [
        {"name": name, "file": "sparsebench/__init__.py", "old": old, "new": new, "test": f"tests/test_made.py::{test}",
         "why": "made up"} for name, old, new, test, _ in MADE
    ]  # fmt: skip
    (root / "tests" / "mutants.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))
    return root, mutants(root=root)


def test_only_a_failing_test_counts_as_caught(made):
    root, process = made
    assert process.returncode == 1, process.stderr
    assert "1 of 9 caught" in process.stdout and (root / "sparsebench" / "__init__.py").read_text() == CODE
    said = {line.split(":")[0]: line for line in process.stdout.splitlines() if ": " in line}
    for name, *_, word in MADE:
        assert (name in said) == (word != "caught")
        if word != "caught":
            assert said[name].startswith(f"{name}: {word}"), said[name]
    assert "occurs 0 times in sparsebench/__init__.py" in said["gone"] and "occurs 2 times" in said["twice"]


def test_a_list_that_is_caught_ends_well(made):
    root, _ = made
    process = mutants("--only", "right", root=root)
    assert process.returncode == 0 and "1 of 1 caught" in process.stdout
