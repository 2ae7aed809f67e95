"""Print the oldest versions that pyproject.toml allows, as constraints for pip: what `make test-oldest` installs.

python scripts/oldest.py > constraints.txt
python -m pip install -c constraints.txt -e '.[test,docs]'
"""

import re
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
TOOLS = ("ruff", "mypy", "pre-commit", "build", "setuptools", "mkdocs")  # they check or build, they don't run


def constraints(text: str) -> list[str]:
    """`name==version` for every requirement of pyproject.toml with a lower bound, tools left out."""
    bounds = dict(re.findall(r'"([A-Za-z0-9_.-]+)>=([0-9.]+)[^"]*"', text.partition("[project.scripts]")[0]))
    return sorted(f"{name}=={version}" for name, version in bounds.items() if not name.startswith(TOOLS))


if __name__ == "__main__":
    print("\n".join(constraints(PROJECT.read_text(encoding="utf-8"))))
