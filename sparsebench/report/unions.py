"""Charts of what several tokens skip together: unions over a batch of texts, and over chunks of consecutive tokens."""

from __future__ import annotations

import altair as alt

from sparsebench.report.rows import Row
from sparsebench.report.vega import Spec, lines_over

MOST_LINES = 24  # more can't be read
SKIPPED = alt.Axis(format="%")


def size(text: str) -> bool:
    """Whether a key is the size of a group."""
    return text.isdecimal() and 0 < len(text) < 7


def over_batch(rows: list[Row], look: dict[str, tuple[str, str]]) -> Spec | None:
    """Share that no row of a batch keeps, by kind of unit (channels, neurons, heads). A dropped head saves its own
    sequence's cache whatever the batch: its line at batch 1 is the one that counts."""
    cells = [
        {"series": row.series, "run": f"{row.label} {kind}", "unit": kind, "batch": int(batch), "skipped": share}
        for row in rows[:MOST_LINES]
        for batch, figures in (((row.record.get("extra") or {}).get("union") or {}).get("by_size") or {}).items()
        if size(batch)
        for kind, share in (figures.get("kinds") or {}).items()
    ]
    x = alt.X("batch:Q", title="rows of the batch, different texts", scale=alt.Scale(type="log", base=2))
    y = alt.Y("skipped:Q", title="share that no row keeps", axis=SKIPPED)
    return lines_over(cells, x, y, "What a batch still skips", look, dash="unit")


def over_chunk(rows: list[Row], look: dict[str, tuple[str, str]]) -> Spec | None:
    """Share of the weights that no token of a chunk needs, measured, and what independent tokens would leave."""
    cells = []
    for row in rows[:MOST_LINES]:
        chunk = ((row.record.get("extra") or {}).get("chunk") or {}).get("sparse") or {}
        for length, figures in (chunk.get("lengths") or {}).items():
            if (
                not size(length) or "sparsity" not in figures or "tokens" not in figures
            ):  # of a record that is not whole
                continue
            values = {"measured": figures["sparsity"], "were they independent": figures["tokens"] ** int(length)}
            cells += [
                {
                    "series": row.series,
                    "run": f"{row.label} {what}",
                    "what": what,
                    "tokens": int(length),
                    "skipped": share,
                }
                for what, share in values.items()
            ]
    x = alt.X("tokens:Q", title="consecutive tokens of a chunk", scale=alt.Scale(type="log", base=2))
    y = alt.Y("skipped:Q", title="share of the weights skipped", axis=SKIPPED)
    return lines_over(cells, x, y, "What a chunk still skips", look, dash="what")
