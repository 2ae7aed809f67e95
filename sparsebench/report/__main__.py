"""The command `sparsebench-report` (also `python -m sparsebench.report`).

Exit codes: 0 written; 1 nothing to report or the folder can't be written; 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sparsebench import __version__


def main() -> None:
    """Entry point of the console script."""
    parser = argparse.ArgumentParser(
        prog="sparsebench-report", description="Many records on one page: HTML, Markdown, CSV, PNG.",
        epilog="e.g. sparsebench-report outputs. Records are made by sparsebench, kernel timings by sparsebench-bench.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"sparsebench-report {__version__}")
    parser.add_argument("paths", nargs="+", type=Path, help="folders with records, or result.json files")
    parser.add_argument("--output", type=Path, help="folder for the report; default: report/ in the first folder given")
    parser.add_argument("--title", default="sparsebench report")
    parser.add_argument("--wandb", action="store_true", help="also send the records and the report to Weights & Biases")
    parser.add_argument("--project", default="sparsebench", help="W&B project (with --wandb)")
    arguments = parser.parse_args()
    missing = [str(p) for p in arguments.paths if not p.exists()]
    if missing:
        parser.error(f"no such file or folder: {', '.join(missing)}")

    from sparsebench.report import page
    from sparsebench.report.rows import collect

    found = collect(arguments.paths)
    if not len(found):
        print(f"error: no records below {', '.join(map(str, arguments.paths))}", file=sys.stderr)
        sys.exit(1)
    first = arguments.paths[0]
    folder = arguments.output or (first if first.is_dir() else first.parent) / "report"
    try:
        written = page.write(found, folder, arguments.title)
    except OSError as error:
        print(f"error: {folder} can't be written: {error}", file=sys.stderr)
        sys.exit(1)
    uploaded = None
    if arguments.wandb:
        from sparsebench.report import upload

        uploaded = upload.send(found, folder, arguments.project)
    print(
        f"{len(found.finished)} finished, {len(found.failed)} failed, {len(found.unreadable)} unreadable",
        file=sys.stderr,
    )
    summary = {"report": str(folder / "report.html"), "finished": len(found.finished), "failed": len(found.failed),
               "unreadable": len(found.unreadable), "plots": sorted(written.pictures), "uploaded": uploaded}  # fmt: skip
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
