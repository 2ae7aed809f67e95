"""The command `sparsebench-report` (also `python -m sparsebench.report`).

Exit codes: 0 written; 1 nothing to report or the folder can't be written; 2 wrong arguments, or a file that is no archive;
130 interrupted by Ctrl-C; 143 by SIGTERM or SIGHUP.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NoReturn

from sparsebench import __version__, cache
from sparsebench.records import files, stopping

FAILED, WRONG = 1, 2
NAMED = 5  # records left out that the terminal names


def main() -> None:
    """Entry point of the console script."""
    files.speak_utf8()
    stopping.listen()
    cache.provide_home()
    try:
        body()
    except KeyboardInterrupt:
        print(f"interrupted: {stopping.reason()}", file=sys.stderr, flush=True)
        sys.exit(stopping.exit_code())


def body() -> None:
    """What the command does."""
    arguments, parser = parse()
    missing = [str(p) for p in arguments.paths if not p.exists()]
    if missing:
        parser.error(f"no such file or folder: {', '.join(missing)}")

    from sparsebench.records.archive import ArchiveError

    try:
        if arguments.archive is not None:
            summary = archived(arguments.paths, arguments.archive)
        elif arguments.extract is not None:
            summary = extracted(arguments.paths, arguments.extract[0], Path(arguments.extract[1]))
        elif arguments.compare:
            if len(arguments.paths) != 2:
                parser.error(f"--compare needs two sets of records, got {len(arguments.paths)}")
            summary = compared(arguments)
        else:
            summary = reported(arguments)
    except ArchiveError as error:
        stop(str(error), WRONG)
    print(json.dumps(summary))


def parse() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(
        prog="sparsebench-report",
        description="Many records on one page (HTML, Markdown, CSV, Parquet, PNG, SVG) or in one archive; two sets compared.",
        epilog="e.g. sparsebench-report outputs, or sparsebench-report before after --compare. "
        "Records are made by sparsebench, kernel timings by sparsebench-bench.",
    )
    parser.add_argument("--version", action="version", version=f"sparsebench-report {__version__}")
    parser.add_argument(
        "paths", nargs="+", type=Path, help="archives (.parquet), folders with records, result.json files"
    )
    parser.add_argument("--output", type=Path, help="folder for the report; default: report/ in the first folder given")
    parser.add_argument("--title", default="sparsebench report")
    parser.add_argument("--latex", action="store_true", help="also write the tables as report.tex (booktabs)")
    parser.add_argument("--wandb", action="store_true", help="also send the records and the report to Weights & Biases")
    parser.add_argument("--project", default="sparsebench", help="W&B project (with --wandb)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--compare", action="store_true", help="no report: compare two sets of records row by row (before and "
                         "after, two machines) and mark what changed beyond noise")  # fmt: skip
    instead.add_argument("--archive", type=Path, metavar="FILE", help="no report: write all records into one archive")
    instead.add_argument("--extract", nargs=2, metavar=("HASH", "FOLDER"),
                         help="no report: write the records whose hash begins so as FOLDER/<hash>/result.json")  # fmt: skip
    return parser.parse_args(), parser


def stop(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def reported(arguments: argparse.Namespace) -> dict:
    """Write the report; returns the line of JSON."""
    from sparsebench.report import page
    from sparsebench.report.rows import collect

    folder = writable(folder_of(arguments))
    collection = collect(arguments.paths)
    if not len(collection):
        name_unreadable(collection.unreadable, "")
        stop(f"no records below {', '.join(map(str, arguments.paths))}", FAILED)
    try:
        written = page.write(collection, folder, arguments.title, arguments.latex)
    except OSError as error:
        stop(f"{folder} can't be written: {error}", FAILED)
    uploaded = None
    if arguments.wandb:
        from sparsebench.report import upload

        uploaded = upload.send(collection, folder, arguments.project)
    name_unreadable(collection.unreadable, f"{folder / 'report.html'}, under Failures")
    print(
        f"{len(collection.finished)} finished, {len(collection.failed)} failed, {len(collection.unreadable)} unreadable",
        file=sys.stderr,
    )
    return {"report": str(folder / "report.html"), "finished": len(collection.finished), "failed": len(collection.failed),
            "unreadable": len(collection.unreadable), "plots": sorted(written.pictures), "uploaded": uploaded}  # fmt: skip


def writable(folder: Path) -> Path:
    """The folder itself, where it is one that can be written or made; said before anything is read."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        stop(f"{folder} can't be written: {there} is no folder that can be written to", FAILED)
    return folder


def name_unreadable(unreadable: list[tuple[Path, str]], rest: str) -> None:
    """Say which records were left out and why: the first few, and where the others are listed. rest: where; "": all of them here."""
    shown = unreadable[:NAMED] if rest else unreadable
    for path, reason in shown:
        print(f"{path} was left out: {reason}", file=sys.stderr)
    if len(shown) < len(unreadable):
        print(f"{len(unreadable) - len(shown)} more were left out; all are listed in {rest}", file=sys.stderr)


def folder_of(arguments: argparse.Namespace) -> Path:
    """Where the report is written."""
    first = arguments.paths[0]
    return arguments.output or (first if first.is_dir() else first.parent) / "report"


def compared(arguments: argparse.Namespace) -> dict:
    """Compare the two sets of records; returns the line of JSON."""
    from sparsebench.report import compare
    from sparsebench.report.rows import collect

    folder = writable(folder_of(arguments))
    sets = [collect([path]) for path in arguments.paths]
    for path, collection in zip(arguments.paths, sets, strict=True):
        name_unreadable(collection.unreadable, "")
        if not collection.finished:
            stop(f"no finished records below {path}", FAILED)
    try:
        return compare.write(*sets, folder, arguments.title)
    except OSError as error:
        stop(f"{folder} can't be written: {error}", FAILED)


def readable(paths: list[Path]) -> list[dict]:
    """All records below `paths`, copies included; what can't be read is said on stderr."""
    from sparsebench.report.sources import contents

    records = []
    for where, content, reason in contents(paths):
        if reason:
            print(f"{where} was left out: {reason}", file=sys.stderr)
        else:
            records.append(content)
    if not records:
        stop(f"no records below {', '.join(map(str, paths))}", FAILED)
    return records


def archived(paths: list[Path], file: Path) -> dict:
    """Write the records below `paths` as one archive."""
    from sparsebench.records import archive

    if file.suffix != archive.SUFFIX:
        stop(f"--archive {file}: the name of an archive ends in {archive.SUFFIX}", WRONG)
    records = readable(paths)
    try:
        archive.write(file, records)
    except OSError as error:
        stop(f"{file} can't be written: {error}", FAILED)
    return {"archive": str(file), "records": len(archive.read(file)), "bytes": file.stat().st_size}


def extracted(paths: list[Path], prefix: str, folder: Path) -> dict:
    """Write records whose hash begins with `prefix` as files again; records of one hash are numbered."""
    from sparsebench.records import archive

    records = [each for each in readable(paths) if archive.key(each).startswith(prefix)]
    if not records:
        stop(f"--extract {prefix}: no record has such a hash", FAILED)
    written: list[str] = []
    for each in records:
        name = archive.key(each)[:10]
        taken = sum(Path(file).parent.name.split("-")[0] == name for file in written)
        path = folder / (f"{name}-{taken + 1}" if taken else name) / "result.json"
        try:
            files.write_atomic(path, json.dumps(each, indent=1).encode())
        except OSError as error:
            stop(f"{path} can't be written: {error}", FAILED)
        written.append(str(path))
    return {"records": written}


if __name__ == "__main__":
    main()
