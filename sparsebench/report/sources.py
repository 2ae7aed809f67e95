"""Records from wherever they lie: archives, folders, single files. Nothing read here is trusted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparsebench.records import archive, files, record


def contents(paths: Iterable[Path]) -> list[tuple[Path, Any, str | None]]:
    """(where it stands, content, why it can't be compared or None) of every record below `paths`.

    paths: archives, result.json files, folders with either. A file named as `paths` that is no archive though its name
    ends so raises ArchiveError; inside a folder it may be anybody's (a data set) and is left out. What a record says
    has no control characters any more.
    """
    contents: dict[Path, list[tuple[Path, Any, str | None]]] = {}
    for path in paths:
        named = [path] if path.is_file() else sorted([*path.rglob("result.json"), *path.rglob(f"*{archive.SUFFIX}")])
        for file in named:
            if file.suffix == archive.SUFFIX and file.is_file():
                try:
                    inside = archive.read(file)
                except archive.ArchiveError:
                    if file == path:
                        raise
                    continue
                contents[real(file)] = [
                    (Path(f"{file}#{str(archive.key(each))[:10]}"), *checked(each)) for each in inside
                ]
            else:
                contents[real(file)] = [(file, *parsed(file))]
    return [each for inside in contents.values() for each in inside]


def real(file: Path) -> Path:
    """The file itself, whatever links lead to it; links in a circle stand for themselves."""
    try:
        return file.resolve()
    except (OSError, RuntimeError):
        return file.absolute()


def parsed(file: Path) -> tuple[Any, str | None]:
    """(content, problem) of a file with one record."""
    try:
        return checked(record.parsed(record.file_text(file)))
    except (OSError, ValueError) as error:
        return None, f"not a record ({' '.join(str(error).split())[:120]})"


def checked(content: Any) -> tuple[Any, str | None]:
    return files.printable(content), record.refusal(content)
