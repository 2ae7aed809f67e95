"""Write docs/families.md: every family of transformers that was tried times every training-free method. Takes minutes.

Run from the repository's root: python scripts/make_families.py
"""

from __future__ import annotations

import logging
import re
import sys
import tempfile
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from sparsebench.sites import find_blocks  # noqa: E402
from tests.families import KNOWN, METHODS, UNKNOWN, family, outcome  # noqa: E402

HEAD = """# Families of models

Made by `scripts/make_families.py` with transformers {version}; do not edit. Each family is a tiny random model of
transformers' own code. `yes`: with nothing dropped the method's model gives the dense model's logits, and at its operating
point those of a masked reference (hooks on the dense model that zero what the rules drop). A number is the line with which
the program refuses the method, below. Nothing else occurs: `tests/contract/test_families.py`.

A family with the structure of one of these works as well, whatever its name; one that only looks like it is refused by
the same comparison when the method is applied.
"""


def general(line: str) -> str:
    """A refusal without the names of one model, so that equal reasons are one."""
    line = re.sub(r"(?<![\w.])[a-z_]+(\.[a-z_]+)*\.\d+(\.[\w.]+)?", "<block>", line)
    line = re.sub(r"^method=\w+ takes", "it takes", line)
    return re.sub(r"method=\w+ does not fit \w+: (.*) by [\d.e+]+ .*", r"\1", line)


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.INFO)
    reasons: dict[str, int] = {}
    rows = [f"| family | {' | '.join(METHODS)} |", f"|---|{'---|' * len(METHODS)}"]
    with tempfile.TemporaryDirectory() as folder:
        for kind in KNOWN:
            lines = [outcome(kind, name, Path(folder)) for name in METHODS]
            cells = ["yes" if x == "equal" else str(reasons.setdefault(general(x), len(reasons) + 1)) for x in lines]
            rows.append(f"| {kind} | {' | '.join(cells)} |")
            sys.stderr.write(f"{rows[-1]}\n")
    refused = [f"{number}. {line}" for line, number in reasons.items()]
    unknown = []
    for kind in UNKNOWN:
        try:
            find_blocks(family(kind))
        except ValueError as error:
            unknown.append(f"| {kind} | {str(error).partition('its linear maps: ')[2].partition(';')[0]} |")
    text = "\n".join(
        [HEAD.format(version=transformers.__version__), *rows, "", "## Refusals", "", *refused, "", "## Unknown structures",
         "", "Refused when the model is loaded, with the block's linear maps:", "", "| family | linear maps |", "|---|---|",
         *unknown, ""]
    )  # fmt: skip
    (ROOT / "docs" / "families.md").write_text(text)


if __name__ == "__main__":
    main()
