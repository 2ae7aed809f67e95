"""What a report's page and its folder hold: rows named apart, tables without empty columns, nothing of an earlier report."""

from pathlib import Path
from unittest import mock

import pytest

from sparsebench.config.identity import digest
from sparsebench.records import record
from sparsebench.report import __main__ as command
from sparsebench.report import charts, content, export, page, tables
from sparsebench.report.content import Page
from sparsebench.report.groups import groups
from sparsebench.report.rows import collect
from sparsebench.report.sources import contents
from tests.helpers import laid, made, made_bench

REFERENCE = Path(__file__).parents[2] / "outputs" / "reference"


def labels(folder, *records):
    for each in records:
        each["config_hash"] = digest([each["config"], each["env"]])
    return sorted(r.label for g in groups(collect([laid(folder, *records)]).finished) for r in g.rows)


def elsewhere(content, **changes):
    env = {**content["env"], **{k: v for k, v in changes.items() if k in ("cpu", "versions")}}
    env["hardware"] = {**env["hardware"], **{k: v for k, v in changes.items() if k in ("dtype", "threads")}}
    return {**content, "env": env}


def test_number_formats_are_named_in_every_row_of_a_method_and_machines_only_where_they_tell_rows_apart(tmp_path):
    names = labels(
        tmp_path / "types",
        made(seed=0),
        elsewhere(made(seed=0), dtype="float16"),
        elsewhere(made(seed=1), dtype="float16"),
    )
    assert names == ["teal seed=0 float16", "teal seed=0 float32", "teal seed=1 float16"]
    assert labels(tmp_path / "cpus", made(), elsewhere(made(), cpu="Other CPU")) == [
        "teal, Other CPU",
        "teal, Test CPU",
    ]
    names = labels(tmp_path / "threads", made(), elsewhere(made(), threads=4), made("wina"))
    assert names == ["teal, 1 thread(s)", "teal, 4 thread(s)", "wina"]


def test_columns_that_no_row_fills_are_left_out_and_not_explained(tmp_path):
    bare = made(latency=None, macs=None)
    (group,) = groups(collect([laid(tmp_path, bare)]).finished)
    table = tables.comparison(group)
    assert table.head[:5] == ["run", "front", "asked", "sparsity", "dense"] and "bytes" in table.head
    assert not {"MACs", "executed", "sparse ms", "speed-up", "kernel", "critical"} & set(table.head)
    assert "Roofline" in table.note and "noisy" not in table.note and all(len(r) == len(table.head) for r in table.rows)


def test_long_tables_scroll_in_a_window_of_their_own_and_few_comparisons_stand_open():
    written = Page()
    for count in (content.LONG, content.LONG + 1):
        written.table(tables.Table(["run"], [["x"]] * count, set(), set()))
    assert [html.startswith('<div class="wide tall">') for html in written.html] == [False, True]
    written.answer("title", "group-0", "lead", [f"line {i}" for i in range(content.FEW + 2)], [])
    assert "2 more to quote" in written.html[-1] and "Not compared there" not in written.html[-1]
    assert written.markdown[-1].count("\n- line") == content.FEW + 2


def test_a_table_that_no_page_holds_goes_on_over_several():
    text = export.as_latex(tables.Table(["run"], [["x"]] * 41, set(), set()), "Runs")
    assert text.startswith(
        "\\begin{longtable}{l}\n\\caption{Runs}\\\\\n\\toprule\nrun \\\\\n\\midrule\n\\endhead\nx \\\\"
    )
    assert text.endswith("\\bottomrule\n\\end{longtable}\n")


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """The command in this process, in `tmp_path`, without charts: (its arguments) -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(charts, "of_group", lambda *args: ({}, {}))

    def run(capsys, *arguments):
        with mock.patch("sys.argv", ["sparsebench-report", *map(str, arguments)]):
            try:
                command.body()
                code = 0
            except SystemExit as stop:
                code = stop.code
        return code, *capsys.readouterr()

    return run


def test_a_second_report_in_a_folder_leaves_nothing_of_the_first_and_nothing_else_is_touched(quick, tmp_path, capsys):
    laid(tmp_path / "runs", made())
    out = tmp_path / "out"
    out.mkdir()
    others = {"group-9-macs.png": False, "group-12-time-0.svg": False, "bench-3.png": False, "across-critical.png": False,
              "group photo.png": True, "results-1.png": True, "notes.tex": True}  # fmt: skip
    for name in others:
        (out / name).write_text("old")
    assert quick(capsys, "runs", "--output", "out", "--latex")[0] == 0
    assert {name: (out / name).exists() for name in others} == others and (out / "report.tex").exists()
    assert quick(capsys, "runs", "--output", "out")[0] == 0 and not (out / "report.tex").exists()
    (out / "report.tex").write_text("\\documentclass{article} % somebody's paper")
    assert quick(capsys, "runs", "--output", "out")[0] == 0 and (out / "report.tex").exists()


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_read(quick, tmp_path, capsys):
    laid(tmp_path / "runs", made())
    (tmp_path / "taken").write_text("a file")
    with mock.patch.object(page, "write", side_effect=AssertionError("built in vain")):
        for where in ("taken", "taken/below/it"):
            code, _, errors = quick(capsys, "runs", "--output", where)
            assert code == 1 and errors.startswith(f"error: {where} can't be written: ") and errors.count("\n") == 1


def test_records_left_out_are_named_with_their_reasons_and_where_all_are_listed(quick, tmp_path, capsys):
    laid(tmp_path / "runs", made())
    for i in range(command.NAMED + 2):
        (tmp_path / "runs" / f"bad{i}").mkdir()
        (tmp_path / "runs" / f"bad{i}" / "result.json").write_text("{")
    code, _, errors = quick(capsys, "runs")
    lines = errors.splitlines()
    assert code == 0 and [line.split("/")[1] for line in lines[: command.NAMED]] == [
        f"bad{i}" for i in range(command.NAMED)
    ]
    assert all("was left out: not a record (" in line for line in lines[: command.NAMED])
    assert lines[command.NAMED] == "2 more were left out; all are listed in runs/report/report.html, under Failures"
    assert lines[-1] == f"1 finished, 0 failed, {command.NAMED + 2} unreadable"
    html = (tmp_path / "runs" / "report" / "report.html").read_text()
    assert all(f"bad{i}/result.json was left out" in html for i in range(command.NAMED + 2))


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks of older versions


@pytest.mark.parametrize("archive", ["bench_cpu", "bench_h200", "expert_kernels"])
def test_every_published_benchmark_is_shown(archive):
    every = contents([REFERENCE / f"{archive}.parquet"])
    assert every and not [reason for _, _, reason in every if reason]
    shown = [page.bench.table(each) for _, each, _ in every]
    assert all("break-even" in text or "## One product" not in text for text in shown)


def test_a_benchmark_needs_its_break_even_under_one_of_its_names_and_experts_may_all_rest():
    product = {"projection": "o", "m": 1, "n": 1, "dense": "mv", "dense_bandwidth_gbs": 1.0, "sparse": {}, "times": {}}
    assert record.refusal(made_bench(projections=[{**product, "break_even_sparsity": {"fused": 0.4}}])) is None
    assert record.refusal(made_bench(projections=[{**product, "break_even": {}}])) is None
    assert "break_even" in record.refusal(made_bench(projections=[product]))
    row = {"measured": 0.0, "median_us": 1.0, "speedup": 9.0, "proportional": 0.0, "relative_error": 0.0}
    part = {
        "shape": "s",
        "tokens": 1,
        "d": 1,
        "experts": 2,
        "size": 1,
        "kernel": None,
        "dense": "d",
        "times": {},
        "rows": [row],
    }
    assert record.refusal(made_bench(experts=[part])) is None
    assert "proportional" in record.refusal(made_bench(experts=[{**part, "rows": [{**row, "proportional": -0.1}]}]))
