"""The report while it grows: the same content as HTML and as Markdown, with its charts, pictures and tables for LaTeX."""

from __future__ import annotations

import base64
import os
import re
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sparsebench.records import archive
from sparsebench.report import export, vega
from sparsebench.report.escape import markdown
from sparsebench.report.rows import Row
from sparsebench.report.tables import Table

FIGURE = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")  # the number that a cell is sorted by
PICK = (
    "method",
    "model",
    "data",
    "machine",
    "kernel",
    "metric",
    "front",
    "verdict",
)  # columns filtered by a list of their values


SORTED, LONG = (
    6,
    25,
)  # lines from which a table can be sorted and filtered, and from which it scrolls in a window of its own
MOST_BESIDE = 3  # columns of text that a narrow screen can hold
FEW = 3  # comparisons of an answer that stand open


@dataclass
class Page:
    """The report while it grows: the same content as HTML and as Markdown, the pictures by file name, tables for LaTeX."""

    folder: Path | None = None  # where it will be written; None: records can't be linked
    html: list[str] = field(default_factory=list)
    markdown: list[str] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)
    latex: list[tuple[str, Table]] = field(default_factory=list)
    charts: dict[str, Any] = field(default_factory=dict)
    section: str = ""

    def open(self, anchor: str, title: str, kind: str = "") -> None:
        self.section = title
        self.html.append(f'<section id="{anchor}" class="{kind}"><h2>{escape(title)}</h2>')
        self.markdown.append(f"\n## {markdown(title)}\n")

    def close(self) -> None:
        self.html.append("</section>")

    def title(self, text: str) -> None:
        self.html.append(f"<h3>{escape(text)}</h3>")
        self.markdown.append(f"\n### {markdown(text)}\n")

    def text(self, text: str, kind: str = "") -> None:
        self.html.append(f'<p class="{kind}">{escape(text)}</p>')
        self.markdown.append(f"{markdown(text)}\n")

    def answer(self, title: str, anchor: str, lead: str, lines: list[str], refused: list[str]) -> None:
        """What can be concluded about one protocol, and which curves nothing can be concluded about."""
        shown = {"": lines[:FEW], f"{len(lines) - FEW} more to quote": lines[FEW:], "Not compared there": refused}
        parts = []
        for summary, part in shown.items():
            items = "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in part) + "</ul>"
            if part:
                parts.append(f"<details class=fold><summary>{summary}</summary>{items}</details>" if summary else items)
        self.html.append(f'<div class="answer"><h3><a href="#{anchor}">{escape(title)}</a></h3>'
                         f'<p class="lead">{escape(lead)}</p>{"".join(parts)}</div>')  # fmt: skip
        every = [*lines, *(f"not compared: {line}" for line in refused)]
        self.markdown.append("\n".join([f"**{title}**: {lead}\n", *(f"- {line}" for line in every), ""]))

    def link(self, row: Row) -> str | None:
        """Where a run's record is found: its file or, of an archive, its line on this page."""
        if self.folder is not None and row.path.is_file():
            return quote(os.path.relpath(row.path.resolve(), self.folder.resolve()))
        return f"#{anchor_of(row)}"

    def table(
        self, table: Table | None, rows_named: bool = False, order_first: bool = False, written: bool = True
    ) -> None:
        """rows_named: lines can be linked to; order_first: whatever is sorted, the first column comes before it."""
        if table is None:
            return
        kinds = [
            " ".join(filter(None, ("n" * (i in table.numeric), "f" * (i == int(order_first)), "pick" * (name in PICK))))
            for i, name in enumerate(table.head)
        ]
        head = "".join(f'<th class="{k}">{escape(c)}</th>' for k, c in zip(kinds, table.head, strict=True))
        prose = not table.numeric and len(table.head) > MOST_BESIDE
        body = "".join(self.line(table, i, kinds, rows_named, prose) for i in range(len(table.rows)))
        classes = " ".join(filter(None, ("sort" * (len(table.rows) >= SORTED), "prose" * prose)))
        fixed = " data-order-fixed='[[0,\"asc\"]]'" if order_first else ""
        kind = "wide tall" if len(table.rows) > LONG else "wide"
        self.html.append(
            f'<div class="{kind}"><table class="{classes}"{fixed}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )
        if table.note:
            self.html.append(f'<p class="soft">{escape(table.note)}</p>')
        if written:
            self.markdown.append(export.as_markdown(table, foreign=True) + "\n")
            self.latex.append((self.section, table))

    def line(self, table: Table, number: int, kinds: list[str], named: bool, prose: bool) -> str:
        """prose: on a narrow screen its cells stand one below the other, each with its head."""
        row = table.runs[number] if table.runs else None
        cells = []
        for i, (kind, text) in enumerate(zip(kinds, table.rows[number], strict=True)):
            shown = escape(text)
            if row is not None and table.head[i] == "run":
                where = self.link(row)
                if where and not where.startswith("#"):
                    shown = f'<a href="{escape(where)}">{shown}</a>'
            value = FIGURE.search(text) if i in table.numeric else None
            order = f' data-order="{value[0] if value else ""}"' if i in table.numeric else ""
            head = f' data-head="{escape(table.head[i])}"' if prose else ""
            cells.append(f'<td class="{kind}"{order}{head}>{shown}</td>')
        name = f' id="{anchor_of(row)}"' if named and row is not None else ""
        return f"<tr{name}{' class=m' if number in table.marked else ''}>{''.join(cells)}</tr>"

    def facts(self, values: dict) -> None:
        pairs = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in values.items())
        self.html.append(f"<dl>{pairs}</dl>")
        self.markdown.append(markdown(", ".join(f"{k} {v}" for k, v in values.items())) + "\n")

    def plots(self, specs: dict[str, Any], datasets: dict[str, Any], prefix: str) -> None:
        """Charts: still ones as SVG and PNG, which the page's script makes live."""
        self.charts[prefix] = {"charts": specs, "datasets": datasets}
        shown = []
        for name, spec in specs.items():
            still = vega.as_svg({**spec, "datasets": datasets})
            self.pictures |= {f"{prefix}-{name}.svg": still.encode(), f"{prefix}-{name}.png": vega.as_png(still)}
            source, alt = base64.b64encode(still.encode()).decode(), escape(spec["title"])
            shown.append(
                f'<figure data-chart="{prefix}/{name}"><img decoding="async" alt="{alt}" src="data:image/svg+xml;base64,{source}"></figure>'
            )
            self.markdown.append(f"![{markdown(alt)}]({prefix}-{name}.png)\n")
        self.html.append(f'<div class="plots">{"".join(shown)}</div>')

    def details(self, summary: str, content: str) -> None:
        self.html.append(f"<details><summary>{escape(summary)}</summary><pre>{escape(content)}</pre></details>")

    def folded(self, summary: str, table: Table | None) -> None:
        """A table behind a line that opens it; open in print."""
        if table is not None:
            self.html.append(f"<details class=fold><summary>{escape(summary)}</summary>")
            self.table(table)
            self.html.append("</details>")


def anchor_of(row: Row) -> str:
    return f"run-{archive.key(row.record)[:16]}"
