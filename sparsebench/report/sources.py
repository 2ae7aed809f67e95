"""Records from wherever they lie: archives, folders, single files. Nothing read here is trusted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparsebench.records import archive


def contents(paths: Iterable[Path]) -> list[tuple[Path, Any]]:
    """(where it stands, JSON content) of every record below `paths`; the content of what can't be read is None.

    paths: archives, result.json files, folders with either. A file named as `paths` that is no archive though its name
    ends so raises ArchiveError; inside a folder it may be anybody's (a data set) and is left out.
    """
    contents: dict[Path, list[tuple[Path, Any]]] = {}
    for path in paths:
        named = [path] if path.is_file() else sorted([*path.rglob("result.json"), *path.rglob(f"*{archive.SUFFIX}")])
        for file in named:
            if file.suffix == archive.SUFFIX:
                try:
                    inside = archive.read(file)
                except archive.ArchiveError:
                    if file == path:
                        raise
                    continue
                contents[file.resolve()] = [(Path(f"{file}#{archive.key(each)[:10]}"), each) for each in inside]
            else:
                contents[file.resolve()] = [(file, parsed(file))]
    return [each for inside in contents.values() for each in inside]


def parsed(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def is_bench(content: Any) -> bool:
    """Whether this is a record of sparsebench-bench."""
    return isinstance(content, dict) and content.get("kind") == "bench" and {"model", "env"} <= content.keys()
