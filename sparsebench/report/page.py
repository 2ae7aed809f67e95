"""`sparsebench-report <folders>`: what the report says, section by section, as one HTML page and as Markdown, with CSV,
Parquet, LaTeX, PNG and SVG beside it.

The page answers first (which method is best at half the work, and is the difference real), then shows every run, then
each protocol with its comparisons at equal terms and its charts. Rows of different protocols never stand in one ranking.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sparsebench.bench import output as bench
from sparsebench.records import archive, files, record
from sparsebench.report import (
    charts,
    claims,
    critical,
    document,
    equal_terms,
    export,
    published,
    sizes,
    step_tables,
    tables,
    vega,
)  # fmt: skip
from sparsebench.report.escape import markdown, marked_down
from sparsebench.report.groups import Group, groups
from sparsebench.report.rows import Collection, Row
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


SORTED = 6  # lines from which a table can be sorted and filtered


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
        items, others = ("".join(f"<li>{escape(line)}</li>" for line in part) for part in (lines, refused))
        folded = (
            f"<details class=fold><summary>Not compared there</summary><ul>{others}</ul></details>" if refused else ""
        )
        self.html.append(f'<div class="answer"><h3><a href="#{anchor}">{escape(title)}</a></h3>'
                         f'<p class="lead">{escape(lead)}</p><ul>{items}</ul>{folded}</div>')  # fmt: skip
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
        body = "".join(self.line(table, i, kinds, rows_named) for i in range(len(table.rows)))
        sort = ' class="sort"' if len(table.rows) >= SORTED else ""
        fixed = " data-order-fixed='[[0,\"asc\"]]'" if order_first else ""
        self.html.append(
            f'<div class="wide"><table{sort}{fixed}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )
        if table.note:
            self.html.append(f'<p class="soft">{escape(table.note)}</p>')
        if written:
            self.markdown.append(export.as_markdown(table, foreign=True) + "\n")
            self.latex.append((self.section, table))

    def line(self, table: Table, number: int, kinds: list[str], named: bool) -> str:
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
            cells.append(f'<td class="{kind}"{order}>{shown}</td>')
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
                f'<figure data-chart="{prefix}/{name}"><img loading="lazy" alt="{alt}" src="data:image/svg+xml;base64,{source}"></figure>'
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


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def build(collection: Collection, title: str, folder: Path | None = None) -> tuple[Page, list[Group]]:
    """The page over the whole collection."""
    page, parts = Page(folder), groups(collection.finished)
    look = vega.styles(list({r.series for r in collection.finished}))
    head(page, collection, parts, title)
    answers(page, parts)
    for anchor, name, text, make in ACROSS:
        made = [(subtitle, table) for subtitle, table in make(collection.finished) if table is not None]
        if made:
            across(page, anchor, name, text, made)
    over_models(page, collection.finished, parts)
    if len(parts) > 1:
        page.open("protocols", "Protocols differ")
        page.text(
            "These records were not all made by the same protocol. Each protocol has its own table and plots below; "
            "figures from two of them must not be ranked against each other.", "flag",
        )  # fmt: skip
        page.table(tables.protocols(parts))
        page.close()
    every_run(page, parts)
    for i, group in enumerate(parts):
        one_group(page, group, i, look)
    if collection.failed or collection.unreadable:
        failures(page, collection)
    for i, (path, content) in enumerate(collection.benches):
        one_bench(page, path, content, i)
    return page, parts


def published_tables(rows: list[Row]) -> list[tuple[str, Table | None]]:
    lines = published.beside(rows)
    return [
        ("", tables.beside(lines)),
        ("Same setting, other model", tables.beside_other_models(lines, same_setting=True)),
        ("Other model and other settings", tables.beside_other_models(lines, same_setting=False)),
    ]


# Sections over all runs, whatever the protocol: anchor, title, text, rows -> [(subtitle, table or None)].
ACROSS: list[tuple[str, str, str, Callable[[list[Row]], list[tuple[str, Table | None]]]]] = [
    ("published", "Published beside measured",
     "A published figure stands beside a run of the same method at the same operating point. Where model, data or "
     "settings are not the published ones, neither reproduces the other: the last column says what differs.",
     published_tables),
    ("claims", "Published claims",
     "What papers claim, decided by these runs: each line is one claim on one model, with the figure measured and its error.",
     lambda rows: [("", claims.table(rows))]),
]  # fmt: skip


def across(page: Page, anchor: str, name: str, text: str, made: list[tuple[str, Table]]) -> None:
    page.open(anchor, name)
    page.text(text)
    for subtitle, table in made:
        if subtitle:
            page.title(subtitle)
        page.table(table)
    page.close()


def over_models(page: Page, rows: list[Row], parts: list[Group]) -> None:
    """What stands for whole models: their critical sparsities, and quality at half against their size."""
    sections = (
        ("critical", "Critical sparsity", critical.TEXT, critical.table(rows), critical.chart(rows), "across"),
        ("sizes", "Quality at half against the model's size", sizes.TEXT, None, sizes.kept_at_half(parts), "sizes"),
    )
    for anchor, name, text, table, specs, prefix in sections:
        if table is not None or specs:
            page.open(anchor, name)
            page.text(text)
            page.table(table)
            if specs:
                page.plots(specs, {}, prefix)
            page.close()


def head(page: Page, collection: Collection, parts: list[Group], title: str) -> None:
    counts = {"finished runs": len(collection.finished), "failed": len(collection.failed), "protocols": len(parts),
              "machines": len({r.machine for r in collection.finished}), "benchmarks": len(collection.benches)}  # fmt: skip
    links = [("answers", "Answers"), ("runs", "All runs")] if parts else []
    links += [(f"group-{i}", f"{i + 1}. {g.title}") for i, g in enumerate(parts)]
    links += [(f"bench-{i}", f"Benchmark {i + 1}") for i in range(len(collection.benches))]
    links += [("failures", "Failures")] if collection.failed or collection.unreadable else []
    page.html.append(f"<h1>{escape(title)}</h1><noscript><p class=soft>{escape(document.NO_SCRIPTS)}</p></noscript>")
    shown = "".join(f"<li><b>{n}</b>{escape(k)}</li>" for k, n in counts.items() if n or k != "benchmarks")
    shown += f"<li><b>{escape(tables.totals(collection.finished))}</b>time of the runs together</li>"
    page.html.append(f'<ul class="facts">{shown}</ul>')
    page.html.append("<nav>" + "".join(f'<a href="#{a}">{escape(t)}</a>' for a, t in links) + "</nav>")
    page.markdown.append(f"# {markdown(title)}\n\n" + ", ".join(f"{n} {k}" for k, n in counts.items()) + ".\n")
    for version, count in sorted(collection.schemas.items()):
        if version != record.SCHEMA_VERSION:
            page.text(
                f"{count} record(s) are of schema {version}; this version writes {record.SCHEMA_VERSION}.", "soft"
            )
    if collection.repeated:
        page.text(f"{collection.repeated} record(s) were found twice (copied folders); each run counts once.", "soft")


def answers(page: Page, parts: list[Group]) -> None:
    """Which method is best at half the work, and whether the difference is one: for each protocol, before all else."""
    if not parts:
        return
    page.open("answers", "Which method is best at half the work, and is the difference real?")
    alone = []
    for i, group in enumerate(parts):
        standing = equal_terms.half_the_work(group)
        if standing is None or len(standing.ranked) < 2:
            alone.append(i)
            continue
        page.answer(f"{i + 1}. {group.title}", f"group-{i}", *tables.answer(group, standing))
    if alone:
        count = f"{len(alone)} of {len(parts)} protocols hold" if len(parts) > 1 else "The records hold"
        page.text(f"{count} fewer than two methods that were measured at a common amount of work, so nothing is ranked "
                  f"there{': ' + ', '.join(str(i + 1) for i in alone) if len(parts) > 1 else ''}.", "soft")  # fmt: skip
    page.text("Half the work: half of the dense model's MACs over the scored tokens, overheads counted. Quality there is "
              "interpolated between measured settings of each method, never beyond them.", "soft")  # fmt: skip
    page.close()


def every_run(page: Page, parts: list[Group]) -> None:
    """All finished runs in one table to sort and filter; sorting stays inside a protocol."""
    if not parts:
        return
    page.open("runs", "All runs", "screen tall")
    page.text("Every run with its figures, to sort and filter by the marks in the heads. Whatever is sorted, protocols stay "
              "apart. A run's name opens its record. report.csv and report.parquet hold all of it unrounded.", "soft")  # fmt: skip
    page.table(tables.every_run(parts), order_first=True, written=False)
    page.close()


def one_group(page: Page, group: Group, number: int, look: dict) -> None:
    """Everything about the rows of one protocol."""
    page.open(f"group-{number}", f"{number + 1}. {group.title}")
    named = ("model", "dataset", "metric", "fingerprint", "test")
    page.facts({k: v for k, v in group.protocol.items() if k not in named and v is not None})
    machines = tables.machines(group)
    if len(machines) > 1:
        page.text("Times in this table come from different machines or settings and can't be compared across them: "
                  + "; ".join(machines) + ".", "flag")  # fmt: skip
    elif machines:
        page.text(f"Times: {machines[0]}.", "soft")
    busy = tables.busy(group)
    if busy:
        page.text(busy, "flag")
    page.table(tables.comparison(group), rows_named=True)
    at_equal_terms(page, group)
    for title, table in (("Further metrics", tables.metrics(group)), ("Over seeds", tables.seeds(group)),
                         ("Where a step's time goes", step_tables.where_time_goes(group)),
                         ("Over the batch", step_tables.batches(group)), ("Estimates", step_tables.estimates(group))):  # fmt: skip
        if table is not None:
            page.title(title)
            page.table(table)
    page.title("Charts")
    page.text("A point is a setting (mean over seeds), bars are one standard deviation over seeds or, with one seed, the paired "
              "standard error; times p10 to p90. Hollow: no kernel skipped work. Star: dense. Grey: the front on that very axis.",
              "soft")  # fmt: skip
    page.plots(*charts.of_group(group, look, page.link), f"group-{number + 1}")
    page.close()


def at_equal_terms(page: Page, group: Group) -> None:
    """Quality of each curve at common sparsity, work, bytes and time, and the comparisons that can be quoted."""
    by_axis: dict[tuple[str, str], list[equal_terms.Standing]] = {}
    for each in equal_terms.standings(group):
        by_axis.setdefault((each.axis.words, each.axis.machine), []).append(each)
    for (words, machine), every in by_axis.items():
        if not any(len(s.ranked) > 1 for s in every):
            continue
        page.title(f"{group.protocol['metric']} at equal shares {words}" if words.startswith("of") else
                   f"{group.protocol['metric']} at equal {words}" )  # fmt: skip
        if machine:
            page.text(machine, "soft")
        page.table(tables.equal_terms(every))
        page.folded("Comparisons that can be quoted", tables.comparisons(every))


def failures(page: Page, collection: Collection) -> None:
    page.open("failures", "Failures")
    if collection.failed:
        page.table(tables.failures(collection.failed))
    for _, content in collection.failed:
        if (content.get("error") or {}).get("traceback"):
            page.details(content["name"], content["error"]["traceback"])
    for path, reason in collection.unreadable:
        page.text(f"{path} was left out: {reason}.", "bad")
    page.close()


def one_bench(page: Page, path: Path, content: dict, number: int) -> None:
    """A benchmark: its plot and its table, as sparsebench-bench makes them."""
    page.open(f"bench-{number}", f"Benchmark: {content['model']}")
    page.text(str(path), "soft")
    name = f"bench-{number + 1}.png"
    try:
        table, page.pictures[name] = bench.table(marked_down(content)), bench.plot(content)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        page.text(f"This is not a whole record of a benchmark ({type(error).__name__}: {error}).", "bad")
        page.close()
        return
    source = base64.b64encode(page.pictures[name]).decode()
    page.html.append(f'<figure><img alt="speed-up over sparsity" src="data:image/png;base64,{source}"></figure>')
    page.details("Table", table)
    page.markdown.append(f"![speed-up over sparsity]({name})\n\n" + table.replace("# ", "### "))
    page.close()


def write(collection: Collection, folder: Path, title: str, latex: bool = False) -> Page:
    """The report in `folder`, each file written atomically. latex: its tables as report.tex, too."""
    page, parts = build(collection, title, folder)
    for name, content in page.pictures.items():
        files.write_atomic(folder / name, content)
    files.write_atomic(folder / "report.csv", export.as_csv(parts).encode(errors="replace"))
    files.write_atomic(folder / "report.parquet", export.as_parquet(parts))
    files.write_atomic(folder / "report.md", "\n".join(page.markdown).encode(errors="replace"))
    if latex:
        files.write_atomic(folder / "report.tex", export.latex_file(page.latex).encode(errors="replace"))
    files.write_atomic(
        folder / "report.html", document.document("".join(page.html), page.charts, title).encode(errors="replace")
    )
    return page
