"""Write docs/experiments/ from the archives in outputs/reference/ (`make docs` calls this).

Pages of experiments that are gone are removed. `--check` writes nothing and fails where a page is not up to date.
"""

import sys
from pathlib import Path

from sparsebench.records import files
from sparsebench.report import experiments

ROOT = Path(__file__).resolve().parents[1]
SOURCE, TARGET = ROOT / "outputs" / "reference", ROOT / "docs" / "experiments"


def main() -> None:
    source = experiments.load(SOURCE)
    texts = experiments.pages(source)
    stale = [
        name for name, text in texts.items() if not (TARGET / name).exists() or (TARGET / name).read_text() != text
    ]
    gone = [file for file in TARGET.glob("*.md") if file.name not in texts]
    if "--check" in sys.argv[1:]:
        sys.exit(f"not up to date: {', '.join([*stale, *(f.name for f in gone)])}" if stale or gone else 0)
    content = {name: text.encode() for name, text in texts.items()} | experiments.pictures(source)
    for file in gone + [file for file in TARGET.glob("*.png") if file.name not in content]:
        file.unlink()
    for name, data in content.items():
        files.write_atomic(TARGET / name, data)
    print(f"{len(content)} files in {TARGET.relative_to(ROOT)}, {len(stale)} pages changed")


if __name__ == "__main__":
    main()
