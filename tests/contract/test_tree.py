"""The tree: places that import downwards, no circle, tests that mirror sources, files that say what they are for."""

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, TESTS = ROOT / "sparsebench", ROOT / "tests"
MOST_PLACES, MOST_LINES = 24, 400
LONGER = {"sparsebench/kernels/decode.cu": 650}  # one translation unit: a whole decode step in CUDA
ENTRANCES = {"api", "cli", "runner"}  # what a user calls, and the one page that a run reads as
# place -> places that it must not import; "*" is every place, but those with a minus
MUST_NOT_IMPORT = {
    "cache": {"*"},
    "config": {"*", "-cache"},
    "records": {"*", "-cache", "-config", "-ranks"},
    "ranks": {"*"},
    "sites": {"*"},
    "kernels": {"*"},
    "data": {"*", "-cache", "-config"},
    "modules": {"*", "-kernels", "-sites"},
    "engines": {"methods", "models", "tasks", "measure", "training", "runner", "cli"},
    "measure": {"methods", "models", "tasks", "training", "experts", "calibration", "runner", "cli"},
    "training": {"methods", "models", "tasks", "experts", "runner", "cli"},
    "models": {"methods", "tasks", "experts", "calibration", "engines", "runner", "cli"},
    "experts": {"methods", "tasks", "runner", "cli"},
    "calibration": {"methods", "tasks", "runner", "cli"},
    "tasks": {"methods", "training", "experts", "calibration", "runner", "cli"},
    "methods": {"tasks", "runner", "cli", "api", "bench", "report", "sweep"},
}
NO_SOURCE_FOLDER = {"cli", "contract", "gpu"}  # tests of more than one source folder


def sources() -> list[Path]:
    """Python files of the package; conf/ may be linked into it in a checkout."""
    return sorted(p for p in PACKAGE.rglob("*.py") if "conf" not in p.relative_to(PACKAGE).parts)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {module_of(p): p for p in sources()}


def place(module: str) -> str:
    """The folder or flat module right under sparsebench/ that a module lies in; "" for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    """Modules of the package that a file imports anywhere: at its top, in functions, for types only.

    A module's own `__getattr__` (a name of the package handed on when it is first asked for) is no import of it.
    """
    nodes = [n for top in tree.body if getattr(top, "name", "") != "__getattr__" for n in ast.walk(top)]
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = (f"{node.module}.{a.name}" for a in node.names)
            names += [name if name in known else node.module for name in whole]
    return {name for name in names if name.split(".")[0] == "sparsebench"}


@cache
def graph() -> dict[str, dict[str, list[str]]]:
    """place -> places it imports -> the modules that do so."""
    arrows: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for module, path in modules().items():
        for target in imports(ast.parse(path.read_text(encoding="utf-8")), set(modules())):
            if place(target) != place(module) and target != "sparsebench":  # the package itself holds its version alone
                arrows[place(module)][place(target)].append(module)
    return arrows


def circle(arrows: dict[str, dict[str, list[str]]]) -> list[str]:
    """Places on a circle of imports, in order, or nothing."""

    def walk(path: list[str], done: set[str]) -> list[str]:
        for target in arrows.get(path[-1], {}):
            if target in path:
                return [*path[path.index(target) :], target]
            if target not in done and (closed := walk([*path, target], done)):
                return closed
        done.add(path[-1])
        return []

    done: set[str] = set()
    return next((closed for start in list(arrows) if (closed := walk([start], done))), [])


def test_no_import_circle_between_places():
    assert circle(graph()) == []


def test_a_circle_would_be_seen():
    assert circle({"a": {"b": []}, "b": {"c": []}, "c": {"b": []}}) == ["b", "c", "b"]
    tree = ast.parse("def f():\n    from sparsebench import sweep\n\ndef __getattr__(n):\n    import sparsebench.api\n")
    assert imports(tree, {"sparsebench.sweep"}) == {"sparsebench.sweep"}


@pytest.mark.parametrize("name", MUST_NOT_IMPORT)
def test_imports_point_down(name):
    rule = MUST_NOT_IMPORT[name]
    assert name in {place(m) for m in modules()}
    for target, by in graph().get(name, {}).items():
        allowed = f"-{target}" in rule if "*" in rule else target not in rule
        assert allowed, f"{name} must not import {target}: {', '.join(by)}"


def test_few_places():
    places = {place(m) for m in modules()} - {"", "__main__"} | {"assets"}
    assert len(places) <= MOST_PLACES, sorted(places)


def configured() -> set[str]:
    """Places whose classes conf/ names."""
    contents = (yaml.safe_load(file.read_text(encoding="utf-8")) or {} for file in (ROOT / "conf").rglob("*.yaml"))
    return {place(str(content.get("_target_", ""))) for content in contents}


def test_no_flat_module_serves_one_place_alone():
    for path in sorted(PACKAGE.glob("*.py")):
        if path.stem in ENTRANCES or path.stem.startswith("__"):
            continue
        users = {name for name, targets in graph().items() if path.stem in targets}
        users |= {"conf"} if path.stem in configured() else set()
        assert len(users) > 1, f"{path.name} is used by {users or 'nothing'} alone: move it there"


def mirrored(test: Path) -> bool:
    """Whether tests/a/test_b.py has its source: a/b.py, a/b/, a method's own a/*/b.py; test_a.py is about a as a whole."""
    folder, name = PACKAGE / test.relative_to(TESTS).parent, test.stem.removeprefix("test_")
    if name == folder.name:
        return folder.is_dir()
    return (folder / name).is_dir() or any(folder.glob(f"{name}.py")) or any(folder.glob(f"*/{name}.py"))


@pytest.mark.parametrize("test", sorted(TESTS.rglob("test_*.py")), ids=lambda p: str(p.relative_to(TESTS)))
def test_tests_mirror_sources(test):
    elsewhere = test.relative_to(TESTS).parts[0] in NO_SOURCE_FOLDER
    assert elsewhere or mirrored(test), f"no source file or folder for {test.relative_to(ROOT)}"


@pytest.mark.parametrize("test", sorted(TESTS.rglob("*.py")), ids=lambda p: str(p.relative_to(TESTS)))
def test_no_test_imports_a_test(test):
    for node in ast.walk(ast.parse(test.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" for a in node.names]
        assert not [n for n in names if "test_" in n.replace("sparsebench", "")], names


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_a_module_says_what_it_is_for(path):
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert len(said.split()) >= 4, f"{path.relative_to(ROOT)} has no docstring that says what it is for"


def test_no_file_is_long():
    for path in [*sources(), *PACKAGE.rglob("*.cu")]:
        name = str(path.relative_to(ROOT))
        count = len(path.read_text(encoding="utf-8").splitlines())
        assert count <= LONGER.get(name, MOST_LINES), f"{name} has {count} lines"
