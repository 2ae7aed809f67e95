"""`sparsebench-report <folders>`: one self-contained HTML page, and the same as Markdown, CSV and PNG beside it.

The page holds its style and its pictures (as SVG) and needs no network; everything that comes from a record is escaped.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from matplotlib import pyplot

from sparsebench.bench import output as bench
from sparsebench.records import files, record
from sparsebench.report import claims, plots, published, tables
from sparsebench.report.escape import markdown, marked_down
from sparsebench.report.rows import Collection, Group, groups
from sparsebench.report.tables import Table

STYLE = """
:root{--ink:#1c2430;--soft:#5b6675;--line:#dfe4ea;--back:#f5f7f9;--mark:#fff6dc;--bad:#a3262a;--accent:#1f5fa8}
*{box-sizing:border-box}
body{margin:0;color:var(--ink);background:var(--back);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1240px;margin:0 auto;padding:20px 24px 60px}
h1{font-size:26px;margin:8px 0 2px}h2{font-size:20px;margin:0 0 4px}h3{font-size:16px;margin:22px 0 6px}
p{margin:6px 0;max-width:80ch}.soft{color:var(--soft);font-size:13px}
section{background:#fff;border:1px solid var(--line);border-radius:10px;padding:18px 20px;margin:18px 0}
.facts{display:flex;flex-wrap:wrap;gap:8px 26px;margin:10px 0 0;padding:0;list-style:none}
.facts b{font-size:19px;display:block;line-height:1.2}.facts li{color:var(--soft);font-size:13px}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin-top:12px;font-size:14px}a{color:var(--accent)}
.wide{overflow-x:auto;margin:10px -4px;padding:0 4px}
table{border-collapse:collapse;font-size:13px;min-width:100%}
th,td{padding:5px 7px;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th{font-weight:600;color:var(--soft);border-bottom:2px solid var(--line);white-space:nowrap}
td.n,th.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
th:first-child,td:first-child{position:sticky;left:0;background:#fff;min-width:11em;max-width:24em;overflow-wrap:anywhere}
tr.m td{background:var(--mark)}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:14px;margin-top:12px}
figure{margin:0}figure img{display:block;width:100%;height:auto}
dl{display:flex;flex-wrap:wrap;gap:1px 18px;font-size:13px;margin:6px 0}dl div{display:flex;gap:5px}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
pre{background:var(--back);padding:10px;border-radius:6px;overflow:auto;font-size:12px}
details{margin:6px 0}summary{cursor:pointer;font-size:14px}
.bad{color:var(--bad)}.flag{border-left:4px solid #d9a400;padding:2px 12px;background:var(--mark);font-size:14px}
@media(max-width:600px){main{padding:10px 10px 40px}section{padding:14px 12px;border-radius:8px}h1{font-size:22px}
 h2{font-size:18px;overflow-wrap:anywhere}.plots{grid-template-columns:1fr}
 th:first-child,td:first-child{min-width:9em;max-width:9.5em}table{font-size:12px}th,td{padding:4px 7px}}
@media print{body{background:#fff}section{break-inside:avoid;border:0}}
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass
class Page:
    """The report while it grows: the same content as HTML and as Markdown, and the pictures by file name."""

    html: list[str] = field(default_factory=list)
    markdown: list[str] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)

    def open(self, anchor: str, title: str) -> None:
        self.html.append(f'<section id="{anchor}"><h2>{escape(title)}</h2>')
        self.markdown.append(f"\n## {markdown(title)}\n")

    def close(self) -> None:
        self.html.append("</section>")

    def title(self, text: str) -> None:
        self.html.append(f"<h3>{escape(text)}</h3>")
        self.markdown.append(f"\n### {markdown(text)}\n")

    def text(self, text: str, kind: str = "") -> None:
        self.html.append(f'<p class="{kind}">{escape(text)}</p>')
        self.markdown.append(f"{markdown(text)}\n")

    def table(self, table: Table | None) -> None:
        if table is None:
            return
        kinds = ['class="n"' if i in table.numeric else "" for i in range(len(table.head))]
        head = "".join(f"<th {k}>{escape(c)}</th>" for k, c in zip(kinds, table.head, strict=True))
        body = "".join(
            f'<tr class="{"m" if i in table.marked else ""}">'
            + "".join(f"<td {k}>{escape(c)}</td>" for k, c in zip(kinds, row, strict=True))
            + "</tr>"
            for i, row in enumerate(table.rows)
        )
        self.html.append(f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')
        if table.note:
            self.html.append(f'<p class="soft">{escape(table.note)}</p>')
        self.markdown.append(tables.as_markdown(table, foreign=True) + "\n")

    def facts(self, values: dict) -> None:
        pairs = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in values.items())
        self.html.append(f"<dl>{pairs}</dl>")
        self.markdown.append(markdown(", ".join(f"{k} {v}" for k, v in values.items())) + "\n")

    def plots(self, figures: dict, prefix: str) -> None:
        shown = []
        for name, figure in figures.items():
            file = f"{prefix}-{name}.png"
            self.pictures[file] = plots.as_png(figure)
            source = base64.b64encode(plots.as_svg(figure)).decode()
            alt = escape(figure.axes[0].get_title(loc="left"))
            shown.append(f'<figure><img alt="{alt}" src="data:image/svg+xml;base64,{source}"></figure>')
            self.markdown.append(f"![{markdown(alt)}]({file})\n")
            pyplot.close(figure)
        self.html.append(f'<div class="plots">{"".join(shown)}</div>')

    def details(self, summary: str, content: str) -> None:
        self.html.append(f"<details><summary>{escape(summary)}</summary><pre>{escape(content)}</pre></details>")


def build(collection: Collection, title: str) -> tuple[Page, list[Group]]:
    """The page over the whole collection."""
    page, parts = Page(), groups(collection.finished)
    look = plots.styles(list({r.series for r in collection.finished}))
    head(page, collection, parts, title)
    if len(parts) > 1:
        page.open("protocols", "Protocols differ")
        page.text(
            "These records were not all made by the same protocol. Each protocol has its own table and plots below; "
            "figures from two of them must not be ranked against each other.", "flag",
        )  # fmt: skip
        page.table(tables.protocols(parts))
        page.close()
    for i, group in enumerate(parts):
        one_group(page, group, i, look)
    verdicts = claims.table(collection.finished)
    if verdicts is not None:
        page.open("claims", "Published claims")
        page.table(verdicts)
        page.close()
    beside = published.beside(collection.finished)
    if beside:
        page.open("published", "Published beside measured")
        page.text(
            "A published figure stands beside a run of the same method at the same operating point. Where model, data or "
            "settings are not the published ones, neither reproduces the other: the last column says what differs."
        )
        page.table(tables.beside(beside))
        others = tables.beside_other_models(beside)
        if others is not None:
            page.title("Same setting, other model")
            page.table(others)
        page.close()
    if collection.failed or collection.unreadable:
        page.open("failures", "Failures")
        if collection.failed:
            page.table(tables.failures(collection.failed))
        for _, content in collection.failed:
            if (content.get("error") or {}).get("traceback"):
                page.details(content["name"], content["error"]["traceback"])
        for path, reason in collection.unreadable:
            page.text(f"{path} was left out: {reason}.", "bad")
        page.close()
    for i, (path, content) in enumerate(collection.benches):
        one_bench(page, path, content, i)
    return page, parts


def head(page: Page, collection: Collection, parts: list[Group], title: str) -> None:
    counts = {"finished runs": len(collection.finished), "failed": len(collection.failed), "protocols": len(parts),
              "machines": len({r.machine for r in collection.finished}), "benchmarks": len(collection.benches)}  # fmt: skip
    links = [(f"group-{i}", f"{i + 1}. {g.title}") for i, g in enumerate(parts)]
    links += [(f"bench-{i}", f"Benchmark {i + 1}") for i in range(len(collection.benches))]
    links += [("failures", "Failures")] if collection.failed or collection.unreadable else []
    page.html.append(f"<h1>{escape(title)}</h1>")
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
    page.table(tables.comparison(group))
    for title, table in (("Further metrics", tables.metrics(group)), ("Over seeds", tables.seeds(group)),
                         ("Estimates", tables.estimates(group))):  # fmt: skip
        if table is not None:
            page.title(title)
            page.table(table)
    page.plots(plots.quality_plots(group, look), f"group-{number + 1}")
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


def document(page: Page, title: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>{''.join(page.html)}</main></body></html>\n"
    )


def write(collection: Collection, folder: Path, title: str) -> Page:
    """report.html, report.md, report.csv and the plots as PNG in `folder`, each written atomically."""
    page, parts = build(collection, title)
    for name, content in page.pictures.items():
        files.write_atomic(folder / name, content)
    files.write_atomic(folder / "report.csv", tables.as_csv(parts).encode(errors="replace"))
    files.write_atomic(folder / "report.md", "\n".join(page.markdown).encode(errors="replace"))
    files.write_atomic(folder / "report.html", document(page, title).encode(errors="replace"))
    return page
