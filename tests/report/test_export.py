"""The report's figures for other programs: typed Parquet with every run, LaTeX that compiles, Markdown."""

import io

import pyarrow.parquet as pq

from sparsebench.report import export
from sparsebench.report.groups import groups
from sparsebench.report.rows import collect
from sparsebench.report.tables import Table
from tests.helpers import failed, laid, made, vision


def test_parquet_has_typed_columns_and_every_figure(tmp_path):
    record = made(seed=3)
    record["latency"]["decode"] |= {"sparse": {"median_ms": 0.5, "p10_ms": 0.4, "p90_ms": 0.7}, "dense_engine": "fused"}
    record["env"] |= {"versions": {"torch": "2.9", "sparsebench": "0.1"}, "load_average": [0.5, 1, 1], "cores": 2}
    record["memory"] = {"weight_bytes": 10, "dense_weight_bytes": 20, "peak_bytes": 30}
    parts = groups(collect([laid(tmp_path, record, vision(), failed())]).finished)
    lines = pq.read_table(io.BytesIO(export.as_parquet(parts))).to_pylist()
    line = next(each for each in lines if each["method"] == "teal")
    assert len(lines) == 2 and line["seed"] == 3 and line["noisy"] is None
    expected = {
        "sparse_ms": 0.5, "sparse_p90_ms": 0.7, "sparse_per_s": 2000.0, "dense_engine": "fused", "kernel": "cpu_numba",
        "sparse_flops": 100.0, "weight_bytes_sparse": 10.0, "torch": "2.9", "load_average": 0.5, "device": "Test CPU",
    }  # fmt: skip
    assert {k: line[k] for k in expected} == expected
    other = next(each for each in lines if each["method"] == "dstf")
    assert other["speedup"] is None and other["metric"] == "accuracy" and other["higher_is_better"] is True


def test_a_report_without_runs_is_an_empty_table():
    assert export.as_csv([]).strip() == "group" and pq.read_table(io.BytesIO(export.as_parquet([]))).num_rows == 0


def test_latex_escapes_and_follows_booktabs():
    table = Table(["run", "10 %"], [["a_b & c\\d~^", "10.1 ± 0.2 ◆"], ["#1 {x} $", "–"]], {1}, set())
    text = export.as_latex(table, "50 % of the work")
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}{lr}", r"\caption{50 \% of the work}"):
        assert rule in text
    assert r"a\_b \& c\textbackslash{}d\textasciitilde{}\textasciicircum{} & 10.1 $\pm$ 0.2 $\blacklozenge$ \\" in text
    assert r"\#1 \{x\} \$ & -- \\" in text


def test_markdown_keeps_to_its_cells():
    text = export.as_markdown(Table(["a", "b"], [["x|y", "1\n2"]], {1}, set(), "note"))
    assert text == "| a | b |\n|---|---:|\n| x\\|y | 1 2 |\n\nnote"
