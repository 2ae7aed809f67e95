"""The oldest versions that pyproject.toml allows can be listed: every dependency states a lower bound."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("oldest", ROOT / "scripts" / "oldest.py")
oldest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oldest)


def test_every_dependency_has_a_lower_bound():
    text = (ROOT / "pyproject.toml").read_text()
    needed = re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)[1]
    names = re.findall(r'^ *"([A-Za-z0-9_.-]+)', needed, re.M)
    listed = dict(line.split("==") for line in oldest.constraints(text))
    assert len(names) > 15 and set(names) <= listed.keys()
    assert all(re.fullmatch(r"[0-9]+(\.[0-9]+)*", version) for version in listed.values())


def test_bounds_are_read_as_they_stand():
    text = 'dependencies = [\n "a>=1.2,<2",\n "b[x]>=3", "ruff>=1", "c-d>=0.4.9",\n]\n[project.scripts]\n"e>=5"'
    assert oldest.constraints(text) == ["a==1.2", "c-d==0.4.9"]
