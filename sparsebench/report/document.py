"""The page as one HTML file: its style, the libraries for tables and charts inside it, and a policy that lets nothing else run.

DataTables comes with itables, Vega with vl-convert; page.js hands tables and charts to them. The page asks for nothing
from a network, everything from a record is escaped, and only the scripts that are named by their digests run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sparsebench.report import vega

NO_SCRIPTS = "Scripts are off: tables can't be sorted and charts don't answer. Everything else is here."


def scripts(charts: bool) -> list[tuple[str, str]]:
    """(type attribute, source) of what the page runs; Vega only where there are charts."""
    tables = (' type="module"', closed(f"{datatables()}\n{text_of(__package__, 'page.js')}"))
    return [("", closed(vega.bundle())), tables] if charts else [tables]


def datatables() -> str:
    """The bundle of itables with its default export named, so that page.js can follow in the same module."""
    bundle = text_of("itables", "html/dt_bundle.js")
    source, count = re.subn(r"export\{[^{}]*?(\w+) as default[^{}]*\};?", r"const DataTable=\1;", bundle)
    if count != 1:
        raise RuntimeError("itables: its bundle exports DataTables in another way than this version knows")
    return source


def closed(source: str) -> str:
    """A script that can't end before its end tag."""
    return re.sub(
        r"</(?=script)|<!--", lambda m: m[0].replace("/", "\\/").replace("<!", "<\\!"), source, flags=re.IGNORECASE
    )


def style() -> str:
    return text_of("itables", "html/dt_bundle.css") + text_of(__package__, "page.css")


def text_of(package: str, name: str) -> str:
    """A file inside a package, which is not imported (itables would bring pandas)."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"no module named {package!r}", name=package)
    return Path(spec.submodule_search_locations[0], name).read_text(encoding="utf-8")


def policy(sources: list[str]) -> str:
    """Content-Security-Policy: scripts by their digests alone, pictures from the page itself, no connection."""
    digests = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in sources)
    allowed = " ".join(f"'sha256-{d}'" for d in digests)
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"


def data(charts: dict[str, Any]) -> str:
    """JSON inside the page: no text of a record can end it."""
    text = json.dumps(charts, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def document(body: str, charts: dict[str, Any], title: str) -> str:
    """The whole file. body: escaped HTML; charts: group -> {charts, datasets}."""
    running = scripts(bool(charts))
    tags = "".join(f"<script{kind}>{source}</script>" for kind, source in running)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy([source for _, source in running])}">'
        f"<title>{escape(title)}</title><style>{style()}</style></head><body><main>{body}</main>"
        f'<script type="application/json" id="charts">{data(charts)}</script>{tags}</body></html>\n'
    )
