"""Tables marked as figures of a file in outputs/reference/ hold nothing that the file does not."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"<!-- figures: (\S+) -->\n((?:\|.*\n)+)")
TABLES = [
    (page.name, file, table) for page in (ROOT / "docs").rglob("*.md") for file, table in MARK.findall(page.read_text())
]


def numbers(content) -> list[float]:
    """All numbers of nested lists and dicts."""
    if isinstance(content, dict):
        return [n for value in content.values() for n in numbers(value)]
    if isinstance(content, list):
        return [n for value in content for n in numbers(value)]
    return [float(content)] if isinstance(content, int | float) else []


@pytest.mark.parametrize("page, file, table", TABLES, ids=lambda value: value if len(str(value)) < 40 else "table")
def test_every_figure_stands_in_the_file(page, file, table):
    known = numbers([json.loads(line) for line in (ROOT / "outputs" / "reference" / file).read_text().splitlines()])
    cells = re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", table)
    assert cells
    for cell in cells:
        places = len(cell.partition(".")[2])
        assert any(abs(value - float(cell)) <= 0.501 * 10**-places for value in known), f"{page}: {cell}"


def test_there_are_such_tables():
    assert {page for page, _, _ in TABLES} >= {"hardware-and-kernels.md", "quantisation.md"}
