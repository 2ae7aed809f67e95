"""Records of anybody: what can't be read is counted and named, the rest is shown, and all of it is text."""

import csv
import io
import json
import os
import random
from unittest import mock
from xml.etree import ElementTree

import pytest

from sparsebench.records import archive, record
from sparsebench.report import charts, document, escape, export, page, rows, vega
from sparsebench.report.groups import groups as grouped
from tests.helpers import EVIL_TEXT, failed, laid, made, made_bench, variants

ESTIMATE = {"label": "estimate", "target": "h200", "target_peaks": {}, "fitted_on": {"device": "Test CPU"}, "cautions": [],
            "decode": {"dense_ms": 5.0, "sparse_ms": 2.5, "speedup": 2.0}}  # fmt: skip


def scattered(folder, count):
    """Damaged records of every kind below a folder."""
    kinds = (made(), made(estimate=ESTIMATE), made("dense"), failed(), made_bench())
    for kind, content in enumerate(kinds):
        for number, (_, text) in enumerate(variants(content, count, seed=kind)):
            file = folder / f"{kind}-{number}" / "result.json"
            file.parent.mkdir(parents=True)
            own = content.get("config_hash", "none")[:-8] + f"{kind}{number:07}"  # else one would stand for all
            file.write_bytes(text.replace(content.get("config_hash", "none").encode(), own.encode()))
    return len(kinds) * count


def believable(row: rows.Row) -> bool:
    """Whether a row's figures are such as a run can have."""
    shares = [value for value in (row.sparsity, row.macs) if value is not None]
    times = [each[side] for each in row.times.values() for side in ("dense", "sparse")]
    figures = [value for value in (row.dense, row.sparse, *shares, *times) if value is not None]
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in figures)
    return numbers and all(abs(value) < 1e300 for value in figures) and all(value >= -1e-9 for value in shares + times)


@pytest.mark.parametrize(
    ("count", "drawn"), [(60, False), pytest.param(400, False, marks=pytest.mark.slow), pytest.param(12, True, marks=pytest.mark.slow)]
)  # fmt: skip
def test_damaged_records_stop_nothing(tmp_path, count, drawn):
    """Before: 40 of 92 such records ended the report in a traceback."""
    total = scattered(tmp_path, count)
    collection = rows.collect([tmp_path])
    assert len(collection) + len(collection.unreadable) + collection.repeated == total
    assert all(reason and "\n" not in reason for _, reason in collection.unreadable)
    assert len(collection.unreadable) > total / 5 and len(collection.finished) > total / 10
    assert all(map(believable, collection.finished))
    figures = charts.of_group if drawn else lambda *arguments: ({}, {})
    with mock.patch.object(charts, "of_group", figures):
        written = page.write(collection, tmp_path / "report", "title")
    html = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    own = document.document("", written.charts, "title")  # its scripts, which the policy names by their digests
    assert html.count("<script") == own.count("<script")
    assert all(str(path.parent.name) in html for path, _ in collection.unreadable)
    assert len(written.markdown) > 10


def test_what_is_no_record_is_named_with_the_reason(tmp_path):
    contents = {
        "brackets": b"[" * 200_000, "nan": b'{"schema_version": NaN}', "infinite": b'{"schema_version": 1e999}', "empty": b"",
        "latin": b'{"name": "\xe9"}', "digits": b"1" * 5000, "deep": b'{"a":' * 70 + b"1" + b"}" * 70,
        "whole": json.dumps(made()).encode(),
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_bytes(content)
    os.mkfifo(tmp_path / "result.json")
    (tmp_path / "folder" / "result.json").mkdir(parents=True)
    collection = rows.collect([tmp_path])
    assert [row.path.parent.name for row in collection.finished] == ["whole"]
    reasons = {path.parent.name: reason for path, reason in collection.unreadable}
    assert len(reasons) == len(contents) - 1 + 2 and all(
        reason.startswith("not a record (") for reason in reasons.values()
    )
    assert "more than 64 levels" in reasons["deep"] and "no plain file" in reasons["folder"]


def test_a_record_too_large_to_be_one_is_not_read(tmp_path, monkeypatch):
    folder = laid(tmp_path, made())
    monkeypatch.setattr(record, "MOST_BYTES", 100)
    ((_, reason),) = rows.collect([folder]).unreadable
    assert "no record is longer than" in reason
    archive.write(tmp_path / "a.parquet", [made()])
    monkeypatch.setattr(archive, "MOST_BYTES", 100)
    with pytest.raises(archive.ArchiveError, match="would unpack to"):
        rows.collect([tmp_path / "a.parquet"])


def test_dollars_and_odd_characters_are_drawn_as_they_are(tmp_path):
    """Before: the legal path /data/$a^$/h ended the report in matplotlib's parser of mathematics."""
    names = ["/data/$a^$/h", "$\\frac{$", "\x00\x1b]0;title\x07", "<script>", "x" * 3000, "\ud800", "\U0001f600"]
    records = []
    for i, name in enumerate(names):
        records.append(made(sparsity=0.3 + 0.01 * i, perplexity=12 * 3.0 ** (i % 4)))
        records[-1]["config"]["method"]["histograms"] = name
        records[-1]["sparsity"]["per_site"] = {f"{name}{i}": {"sparsity": 0.5, "weight": 1} for i in range(3)}
        records[-1]["config_hash"] = str(i)
    collection = rows.collect([laid(tmp_path, *records)])
    (group,) = grouped(collection.finished)
    specs, data = charts.of_group(group, vega.styles([row.series for row in group.rows]), lambda row: None)
    drawn = {name: vega.as_svg({**spec, "datasets": data}) for name, spec in specs.items()}
    assert {"sparsity", "maps"} <= set(drawn)
    assert all(ElementTree.fromstring(svg) is not None for svg in drawn.values())
    assert "/data/$a^$/h" in drawn["sparsity"]


@pytest.mark.parametrize("name", [t for t in EVIL_TEXT if t.startswith(("=", "-", "@"))])
def test_no_cell_of_the_csv_is_a_formula(tmp_path, name):
    content = made(sparsity=0.5, perplexity=-3.5)
    content["config"]["model"]["name"] = content["name"] = content["env"]["cpu"] = name
    groups = grouped(rows.collect([laid(tmp_path, content)]).finished)
    (line,) = csv.DictReader(io.StringIO(export.as_csv(groups)))
    assert line["name"] == line["model"] == f"'{name}" and line["machine"].startswith(f"'{name}")
    assert line["sparse"] == "-3.5", "numbers stay numbers"


@pytest.mark.parametrize("text", EVIL_TEXT)
def test_markdown_shows_text_as_text(text):
    markdown_it = pytest.importorskip("markdown_it")
    html = (
        markdown_it.MarkdownIt("commonmark").enable("table").render(f"| a |\n|---|\n| {escape.markdown(text)} |\n\nend")
    )
    tags = ElementTree.fromstring(
        f"<x>{html.replace(chr(0), '').replace(chr(27), '').replace(chr(7), '')}</x>".encode(errors="replace")
    )
    assert {each.tag for each in tags.iter()} <= {"x", "table", "thead", "tbody", "tr", "th", "td", "p"}
    assert "\n" not in escape.markdown(text)


def test_benchmarks_of_anybody(tmp_path):
    """Names of a benchmark are escaped, too, and its figures checked before they are drawn."""
    chance = random.Random(1)
    content = made_bench(model="$a^$ <script> | `x`")
    content["step"][0]["dense"] = "dense/[a](b)"
    (tmp_path / "result.json").write_text(json.dumps(content))
    written, _ = page.build(rows.collect([tmp_path]), "t")
    text = "\n".join(written.markdown)
    assert "\\<script> \\|" in text and "\\](b)" in text and "<script>" not in "".join(written.html)
    content["step"][0]["speedup"] = chance.choice([0, -1, None, "fast"])
    assert record.refusal(content).startswith("not a whole record of a benchmark: step[0].speedup must be")
