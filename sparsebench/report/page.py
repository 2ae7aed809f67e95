"""`sparsebench-report <folders>`: what the report says, section by section, as one HTML page and as Markdown, with CSV,
Parquet, LaTeX, PNG and SVG beside it.

The page answers first (which method is best at half the work, and is the difference real; which published claims hold), then
shows every run, then each protocol with its charts, its comparisons at equal terms and its rows, then published figures.
Rows of different protocols never stand in one ranking.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

from sparsebench.bench import output as bench
from sparsebench.records import files, record
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
from sparsebench.report.content import Page
from sparsebench.report.escape import markdown, marked_down
from sparsebench.report.groups import Group, groups, worded
from sparsebench.report.rows import Collection, Row
from sparsebench.report.tables import Table

PICTURE = re.compile(r"(group-\d+|across|bench)-[a-z\d-]+\.(png|svg)")  # files that a report writes beside its page


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def build(collection: Collection, title: str, folder: Path | None = None) -> tuple[Page, list[Group]]:
    """The page over the whole collection."""
    page, parts, beside = Page(folder), groups(collection.finished), published.tables(collection.finished)
    look = vega.styles(list({r.series for r in collection.finished}))
    head(page, collection, parts, title, any(table for _, table in beside))
    answers(page, parts)
    claimed(page, collection.finished)
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
    published_figures(page, [(title, table) for title, table in beside if table is not None])
    if collection.failed or collection.unreadable:
        failures(page, collection)
    for i, (path, content) in enumerate(collection.benches):
        one_bench(page, path, content, i)
    return page, parts


def claimed(page: Page, rows: list[Row]) -> None:
    """The verdicts on what papers claim."""
    lines = claims.tested(rows)
    if not lines:
        return
    page.open("claims", "Published claims")
    page.text(claims.counted(lines), "lead")
    page.text("What papers claim, decided by these runs: each line is one claim on one model, with the figure measured and its "
              "error.", "soft")  # fmt: skip
    page.table(claims.table(lines))
    page.close()


def published_figures(page: Page, made: list[tuple[str, Table]]) -> None:
    """Published figures of the methods at the operating points of these runs: (title, table)."""
    if not made:
        return
    page.open("published", "Published beside measured")
    page.text("A published figure stands beside the runs of the same method at the same operating point. Where model, data or "
              "settings are not the published ones, neither reproduces the other: the last column says what differs.")  # fmt: skip
    for title, table in made:
        if title:
            page.title(title)
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


def head(page: Page, collection: Collection, parts: list[Group], title: str, beside: bool) -> None:
    """What there is, in numbers and as links. beside: whether there are published figures."""
    counts = {"finished runs": len(collection.finished), "failed": len(collection.failed), "protocols": len(parts),
              "machines": len({r.machine for r in collection.finished}), "benchmarks": len(collection.benches)}  # fmt: skip
    links = [("answers", "Answers"), ("runs", "All runs")] if parts else []
    links += [(f"group-{i}", f"{i + 1}. {g.title}") for i, g in enumerate(parts)]
    links += [("published", "Published figures")] if beside else []
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
    page.open("runs", "All runs", "screen")
    page.text("Every run with its figures, to sort and filter by the marks in the heads. Whatever is sorted, protocols stay "
              "apart. A run's name opens its record. report.csv and report.parquet hold all of it unrounded.", "soft")  # fmt: skip
    page.table(tables.every_run(parts), order_first=True, written=False)
    page.close()


def one_group(page: Page, group: Group, number: int, look: dict) -> None:
    """Everything about the rows of one protocol."""
    page.open(f"group-{number}", f"{number + 1}. {group.title}")
    named = ("model", "dataset", "metric", "fingerprint", "test")
    page.facts({worded(k): v for k, v in group.protocol.items() if k not in named and v is not None})
    machines = tables.machines(group)
    if len(machines) > 1:
        page.text("Times in this table come from different machines or settings and can't be compared across them: "
                  + "; ".join(machines) + ".", "flag")  # fmt: skip
    elif machines:
        page.text(f"Times: {machines[0]}.", "soft")
    busy = tables.busy(group)
    if busy:
        page.text(busy, "flag")
    if group.random:
        page.text("Random weights: their quality says nothing, so it is neither drawn nor compared.", "flag")
    drawn = charts.of_group(group, look, page.link)
    if drawn[0]:
        page.text("A point is a setting (mean over seeds), bars are one standard deviation over seeds or, with one seed, the paired "
                  "standard error; times p10 to p90. Hollow: no kernel skipped work. Star: dense. Grey: the front on that very axis.",
                  "soft")  # fmt: skip
        page.plots(*drawn, f"group-{number + 1}")
    at_equal_terms(page, group)
    page.title("Runs")
    page.table(tables.comparison(group), rows_named=True)
    for title, table in (("Further metrics", tables.metrics(group)), ("Over seeds", tables.seeds(group)),
                         ("Where a step's time goes", step_tables.where_time_goes(group)),
                         ("Over the batch", step_tables.batches(group)), ("Estimates", step_tables.estimates(group))):  # fmt: skip
        if table is not None:
            page.title(title)
            page.table(table)
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
    """The report in `folder`, each file written atomically. latex: its tables as report.tex, too.

    What an earlier report left there and this one does not have (charts, tables for LaTeX) is removed.
    """
    page, parts = build(collection, title, folder)
    for file in stale(folder, page.pictures, latex):
        file.unlink()
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


def stale(folder: Path, pictures: Iterable[str], latex: bool) -> list[Path]:
    """Files of an earlier report that would stand beside this one as if they were of it."""
    old = [f for f in folder.glob("*.*") if f.is_file() and PICTURE.fullmatch(f.name) and f.name not in pictures]
    tables_of = folder / "report.tex"
    if not latex and tables_of.is_file() and tables_of.read_bytes().startswith(export.LATEX_HEAD.encode()):
        old.append(tables_of)
    return old
