"""Write docs/experiments/ and docs/claims.md from the archives in outputs/reference/ (`make docs` calls this).

Pages of experiments that are gone are removed. `--check` writes nothing and fails where a page is not up to date.
"""

import sys
from pathlib import Path

from sparsebench.records import files
from sparsebench.report import claims, experiments

ROOT = Path(__file__).resolve().parents[1]
SOURCE, TARGET = ROOT / "outputs" / "reference", ROOT / "docs" / "experiments"


def main() -> None:
    source = experiments.load(SOURCE)
    texts = {TARGET / name: text for name, text in experiments.pages(source).items()}
    texts[TARGET.parent / "claims.md"] = claims.page([row for each in source for row in each.runs])
    stale = [file for file, text in texts.items() if not file.exists() or file.read_text() != text]
    gone = [file for file in TARGET.glob("*.md") if file not in texts]
    if "--check" in sys.argv[1:]:
        sys.exit(f"not up to date: {', '.join(file.name for file in [*stale, *gone])}" if stale or gone else 0)
    content = {file: text.encode() for file, text in texts.items()}
    content |= {TARGET / name: data for name, data in experiments.pictures(source).items()}
    for file in gone + [file for file in TARGET.glob("*.png") if file not in content]:
        file.unlink()
    for file, data in content.items():
        files.write_atomic(file, data)
    print(f"{len(content)} files in {TARGET.parent.relative_to(ROOT)}, {len(stale)} pages changed")


if __name__ == "__main__":
    main()
