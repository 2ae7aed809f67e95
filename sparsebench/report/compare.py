"""`sparsebench-report A B --compare`: two sets of records row by row, before and after or machine beside machine.

Runs are the same where their settings are, but for the hardware and where they were kept. What changed beyond noise is
marked: quality by the paired error over the same test pieces, times where each median lies outside the other's p10 to
p90 and neither run is noisy, sparsity and MACs where they moved by more than a tenth of a point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from sparsebench.config.identity import NOT_IDENTITY, digest
from sparsebench.records import files
from sparsebench.records.wording import uncertain
from sparsebench.report import document
from sparsebench.report.equal_terms import SURE, apart, error, evidence, summed
from sparsebench.report.groups import label
from sparsebench.report.page import Page
from sparsebench.report.rows import Collection, Row
from sparsebench.report.tables import DASH, Table, number

MOVED = 1e-3  # of a share that is counted, not sampled: a tenth of a point [choice]
SHARES = (("sparsity", "sparsity"), ("MACs", "macs"), ("bytes", "bytes"))
CHANGED, WITHIN, UNKNOWN = "changed", "within noise", "no error known"


@dataclass
class Change:
    """One figure before and after."""

    name: str
    before: float
    after: float
    shown: str  # the difference in words
    verdict: str


@dataclass
class Pair:
    """One run in both sets."""

    before: Row
    after: Row
    changes: list[Change] = field(default_factory=list)

    @property
    def changed(self) -> list[Change]:
        return [c for c in self.changes if c.verdict == CHANGED]


def identity(row: Row) -> str:
    """What must be equal in both: settings without the hardware, and the test text."""
    settings = {k: v for k, v in row.record["config"].items() if k not in (*NOT_IDENTITY, "hardware")}
    dataset = row.record.get("dataset") or {}
    return digest([settings, row.metric, (dataset.get("test") or {}).get("fingerprint")])


def paired(first: list[Row], second: list[Row]) -> tuple[list[Pair], list[Row], list[Row]]:
    """(runs in both sets, only in the first, only in the second); of several on one side the same machine, then the last."""
    sets: list[dict[str, list[Row]]] = [{}, {}]
    for rows, by_identity in zip((first, second), sets, strict=True):
        for row in sorted(rows, key=lambda r: str(r.record.get("started_at"))):
            by_identity.setdefault(identity(row), []).append(row)
    pairs = []
    for key in [k for k in sets[0] if k in sets[1]]:
        before, after = sets[0].pop(key), sets[1].pop(key)
        here = {r.machine for r in before} & {r.machine for r in after}
        chosen = [next((r for r in reversed(side) if r.machine in here), side[-1]) for side in (before, after)]
        pairs.append(Pair(*chosen))
    left, right = ([row for rows in side.values() for row in rows] for side in sets)
    return pairs, left, right


def compared(pair: Pair) -> Pair:
    """The pair with all its changes."""
    changes = [quality(pair), *(counted(pair, *share) for share in SHARES), time(pair)]
    pair.changes = [c for c in changes if c is not None]
    return pair


def quality(pair: Pair) -> Change | None:
    """The main metric of the sparse model; the error is that of the difference over the same pieces, where both hold them."""
    a, b = pair.before, pair.after
    if a.sparse is None or b.sparse is None or a.metric is None:
        return None
    difference = b.sparse - a.sparse
    scales = [b.sparse, -a.sparse] if a.metric == "perplexity" else [1.0, -1.0]
    joint = summed(scales, [evidence(b), evidence(a)])
    stderr = error(joint, 0.0) if joint else apart(a.sparse_stderr, b.sparse_stderr)
    same = math.isclose(a.sparse, b.sparse, rel_tol=1e-6)
    verdict = WITHIN if same else UNKNOWN if not stderr else CHANGED if abs(difference) > SURE * stderr else WITHIN
    return Change(
        a.metric, a.sparse, b.sparse, "the same" if same else uncertain(difference, stderr, sign="+"), verdict
    )


def counted(pair: Pair, name: str, attribute: str) -> Change | None:
    before, after = (getattr(row, attribute) for row in (pair.before, pair.after))
    if before is None or after is None:
        return None
    verdict = CHANGED if abs(after - before) > MOVED else WITHIN
    return Change(name, before, after, f"{100 * (after - before):+.2f} points", verdict)


def time(pair: Pair) -> Change | None:
    """The sparse model's time."""
    a, b = pair.before.decode, pair.after.decode
    if not a.get("sparse") or not b.get("sparse"):
        return None
    ranges = [(t.get("sparse_p10"), t.get("sparse_p90")) for t in (a, b)]
    shown = f"{b['sparse'] / a['sparse']:.2f}x"
    if pair.before.noisy or pair.after.noisy:
        return Change("ms", a["sparse"], b["sparse"], f"{shown} (noisy)", UNKNOWN)
    if any(None in ends for ends in ranges):
        return Change("ms", a["sparse"], b["sparse"], shown, UNKNOWN)
    inside = [low <= t["sparse"] <= high for t, (low, high) in zip((b, a), ranges, strict=True)]
    return Change("ms", a["sparse"], b["sparse"], shown, WITHIN if any(inside) else CHANGED)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def table(pairs: list[Pair]) -> Table:
    """One line per run: each figure before and after, and what changed beyond noise; changed lines are marked."""
    names = list(dict.fromkeys(c.name for p in pairs for c in p.changes))
    head = ["run", "changed beyond noise", *(word for name in names for word in (name, f"{name}, change"))]
    rows = []
    for pair in pairs:
        by_name = {c.name: c for c in pair.changes}
        cells = [cell for name in names for cell in cells_of(by_name.get(name))]
        rows.append([pair.after.label, ", ".join(c.name for c in pair.changed) or DASH, *cells])
    marked = {i for i, pair in enumerate(pairs) if pair.changed}
    return Table(head, rows, set(range(2, len(head))), marked, runs=[p.after for p in pairs])


def cells_of(change: Change | None) -> list[str]:
    if change is None:
        return [DASH, DASH]
    form = ".1%" if change.name in dict(SHARES) else ".4g"
    mark = {CHANGED: " ◆", UNKNOWN: " ?"}.get(change.verdict, "")
    return [f"{number(change.before, form)} → {number(change.after, form)}", change.shown + mark]


def surroundings(first: list[Row], second: list[Row]) -> Table:
    """What the two sets were made with."""

    def values(rows: list[Row], take: Any) -> str:
        return ", ".join(sorted({str(take(r)) for r in rows}))

    facts = {
        "machine": lambda r: r.machine, "commit": lambda r: (r.record.get("env") or {}).get("git_commit"),
        "sparsebench": lambda r: ((r.record.get("env") or {}).get("versions") or {}).get("sparsebench"),
    }  # fmt: skip
    rows = [[name, values(first, take), values(second, take)] for name, take in facts.items()]
    marked = {i for i, row in enumerate(rows) if row[1] != row[2]}
    return Table(["", "first", "second"], rows, set(), marked)


def build(first: Collection, second: Collection, title: str, folder: Path | None = None) -> tuple[Page, list[Pair]]:
    """The page over both sets."""
    label([*first.finished, *second.finished])
    pairs, left, right = paired(first.finished, second.finished)
    pairs = sorted(map(compared, pairs), key=lambda p: (-len(p.changed), p.after.label))
    page = Page(folder)
    page.html.append(f"<h1>{escape(title)}</h1>")
    page.markdown.append(f"# {title}\n")
    page.open("rows", "What changed")
    changed = sum(bool(p.changed) for p in pairs)
    page.text(f"{len(pairs)} runs are in both sets; {changed} of them changed beyond noise.", "lead")
    page.table(surroundings(first.finished, second.finished))
    if pairs:
        page.table(table(pairs))
        page.text("◆ changed beyond noise: quality by more than two (paired) standard errors, shares by more than a tenth of "
                  "a point, times where each median lies outside the other's p10 to p90. ? can't be told: no error known, "
                  "or a noisy run.", "soft")  # fmt: skip
    page.close()
    for anchor, name, rows in (("first", "Only in the first set", left), ("second", "Only in the second set", right)):
        if rows:
            page.open(anchor, name)
            page.table(Table(["run", "machine"], [[r.label, r.machine] for r in rows], set(), set(), runs=rows))
            page.close()
    return page, pairs


def write(first: Collection, second: Collection, folder: Path, title: str) -> dict[str, Any]:
    """compare.html and compare.md in `folder`; returns what the command says of them."""
    page, pairs = build(first, second, title, folder)
    files.write_atomic(folder / "compare.md", "\n".join(page.markdown).encode())
    files.write_atomic(folder / "compare.html", document.document("".join(page.html), {}, title).encode())
    only = {f"only in {name}": len(c.finished) - len(pairs) for name, c in (("first", first), ("second", second))}
    changed = [p.after.label for p in pairs if p.changed]
    return {"compared": str(folder / "compare.html"), "pairs": len(pairs), "changed": changed, **only}
