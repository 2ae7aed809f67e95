"""Where a step's time goes, the batch axis, the bytes limit and energy: from the record to charts, tables and figures."""

import csv
import io

import pytest

from sparsebench.records import record
from sparsebench.report import charts, export, page, step_tables, tables
from sparsebench.report.rows import collect
from tests.helpers import laid, made

ROLES = {"norm": 0.1, "qkv": 0.2, "attention": 0.1, "o": 0.1, "gate_up": 0.25, "down": 0.1, "head": 0.05}


def told(scale, engine="fused"):
    """Marks of a step of `scale` ms of which a tenth is nobody's."""
    ms = {role: share * scale for role, share in ROLES.items()}
    return {"engine": engine, "how": "marks", "ms": ms, "step_ms": scale, "unattributed": 0.1, "steps": 30}


def measured(sparsity=0.5, noisy=False, **changes):
    """A record with marks, batches, limit and energy: the bytes allow 2.5x, the run reached 1.3x."""
    content = made(sparsity=sparsity, **changes)
    section = content["latency"]
    section["noisy"] = noisy
    section["decode"]["by_kernel"] = {"dense": told(1.0), "sparse": told(0.8), "seconds": 0.1}
    section["limit"] = {"read_bandwidth_gbs": 100.0, "bytes": {"dense": 5e7, "sparse": 2e7}, "ms": {"dense": 0.5, "sparse": 0.2},
                        "share": {"dense": 0.5, "sparse": 0.26}, "speedup": 2.5}  # fmt: skip
    section["energy"] = {"dense": {"joules": 0.02, "watts": 20.0}, "sparse": {"joules": 0.015, "watts": 19.0}, "per": "token",
                         "source": "RAPL, package-0", "reason": None}  # fmt: skip
    section["batches"] = [
        {"batch": b, "dense_ms": 1.0 + b / 10, "sparse_ms": 0.5 + b / 4, "kernel": "cpu_numba", "simulated": b == 8,
         "union_density": 1 - 0.5**b}
        for b in (1, 2, 4, 8)
    ]  # fmt: skip
    return content


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    laid(folder, measured(0.25), measured(0.5, perplexity=13), measured(0.65, noisy=True), made("wina", 0.5))
    built, parts = page.build(collect([folder]), "Steps")
    return built, parts[0]


def test_such_a_record_is_one(written):
    for row in written[1].rows:
        assert record.misfit(record.comparable(), row.record) is None
    wrong = measured()
    wrong["latency"]["energy"]["dense"]["joules"] = 0  # never zero
    assert "joules" in record.misfit(record.comparable(), wrong)


def test_bars_of_a_step_add_up_to_it_dense_beside_sparse(written):
    """Of the curve's quiet setting nearest to half; what is nobody's is drawn, too."""
    (spec,) = [s for n, s in written[0].charts["group-1"]["charts"].items() if n.startswith("by-kernel")]
    cells = spec["data"]["values"]
    sums = {bar: sum(c["ms"] for c in cells if c["bar"] == bar) for bar in {c["bar"] for c in cells}}
    assert sums == pytest.approx({"teal: dense": 1.0, "teal: sparse": 0.8})
    assert {c["role"] for c in cells} == {*ROLES, "not attributed"}


def test_the_table_of_roles_holds_every_run_that_took_marks(written):
    table = step_tables.where_time_goes(written[1])
    assert len(table.rows) == 6 and {r.method for r in table.runs} == {"teal"}
    cells = dict(zip(table.head, table.rows[1], strict=True))
    assert cells["model"] == "sparse" and cells["gate_up"] == "0.200" and cells["not attributed"] == "10%"


def test_the_batch_axis_says_up_to_where_skipping_pays(written):
    """Sparse is faster at 1 and 2 (1.2 against 1.0 ms), slower at 4 (1.4 against 1.5), simulated at 8."""
    table = step_tables.batches(written[1])
    cells = [dict(zip(table.head, row, strict=True)) for row in table.rows[:4]]
    assert [c["speed-up"] for c in cells] == ["1.47x", "1.20x", "0.93x", "simulated"] and cells[0]["pays"] == "up to 2"
    assert [c["kept by any"] for c in cells[:2]] == ["50.0%", "75.0%"]
    noisy = dict(zip(table.head, table.rows[8], strict=True))
    assert noisy["speed-up"].endswith("(noisy)")
    specs = written[0].charts["group-1"]["charts"]
    gain = specs["batch-gain-0"]["data"]["values"]
    assert {c["batch"] for c in gain} == {1, 2, 4} and not any("0.65" in c["run"] for c in gain)
    assert {c["batch"] for c in specs["batches-0"]["data"]["values"]} == {1, 2, 4, 8}


def test_the_limit_of_the_machine_stands_beside_the_speedup(written):
    row = next(r for r in written[1].rows if r.method == "teal")
    assert row.roofline == 2.5 and row.of_limit == {"of_limit_dense": 0.5, "of_limit_sparse": 0.26}
    table = tables.comparison(written[1])
    cells = dict(zip(table.head, table.rows[0], strict=True))
    assert cells["roofline"] == "2.50x" and cells["of limit"] == "50% / 26%" and cells["J sparse"] == "0.015"
    point = next(p for p in charts.points(written[1], lambda row: None) if p["series"] == "teal")
    assert point["roofline"] == 2.5 and point["of_limit_sparse"] == 0.26


def test_columns_that_no_run_fills_are_left_out(tmp_path):
    built, parts = page.build(collect([laid(tmp_path, made())]), "Plain")
    assert not {"of limit", "J dense", "J sparse"} & {*tables.comparison(parts[0]).head, *tables.every_run(parts).head}
    assert step_tables.where_time_goes(parts[0]) is None and step_tables.batches(parts[0]) is None
    names = built.charts["group-1"]["charts"]
    assert not any(n.startswith(("by-kernel", "batch")) for n in names)


def test_figures_for_other_programs_hold_energy_limit_and_roles(written):
    lines = list(csv.DictReader(io.StringIO(export.as_csv([written[1]]))))
    teal, wina = (next(line for line in lines if line["method"] == m) for m in ("teal", "wina"))
    expected = {
        "dense_joules": "0.02",
        "sparse_of_limit": "0.26",
        "sparse_gate_up_ms": "0.2",
        "energy_source": "RAPL, package-0",
    }
    assert {k: teal[k] for k in expected} == expected and not any(wina[k] for k in expected)
    assert export.as_parquet([written[1]])[:4] == b"PAR1"


def test_marks_that_say_only_why_not_are_left_out(tmp_path):
    content = measured()
    content["latency"]["decode"]["by_kernel"]["dense"] = {"engine": "compiled", "how": "none", "reason": "no marks"}
    content["latency"]["energy"] = {
        "dense": None,
        "sparse": None,
        "per": "token",
        "source": None,
        "reason": "no counter",
    }
    (row,) = collect([laid(tmp_path, content)]).finished
    assert set(row.by_kernel) == {"sparse"} and row.joules == {}
