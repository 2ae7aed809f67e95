"""The pages about published experiments are what their archives say, and say nothing else."""

import json
import re
import runpy
import sys
from pathlib import Path

import jsonschema
import pytest

from sparsebench.records import archive, record
from sparsebench.report import claims, experiments
from sparsebench.report.experiments import cell, run_table, spread
from sparsebench.report.rows import make_row
from tests.helpers import made, made_bench

ROOT = Path(__file__).parents[2]
REFERENCE, PAGES = ROOT / "outputs" / "reference", ROOT / "docs" / "experiments"
SPEC = {"title": "t", "by": ["method", "asked"], "columns": ["perplexity", "sparsity", "MACs"]}


@pytest.fixture(scope="module")
def published():
    return experiments.load(REFERENCE)


def rows(*records):
    return [make_row(Path("x"), r) for r in records]


def test_the_committed_pages_are_those_of_the_archives(published):
    pages = experiments.pages(published)
    assert {file.name for file in PAGES.glob("*.md")} == pages.keys()
    for name, text in pages.items():
        assert (PAGES / name).read_text() == text, f"docs/experiments/{name}: run scripts/make_docs_tables.py"
    shown = set(re.findall(r"!\[.*?\]\((.*?)\)", "".join(pages.values())))
    assert shown == {file.name for file in PAGES.glob("*.png")} and shown


def test_the_claims_page_is_what_the_archives_say(published):
    rows = [row for experiment in published for row in experiment.runs]
    assert (ROOT / "docs" / "claims.md").read_text() == claims.page(rows), "run scripts/make_docs_tables.py"


def test_the_script_tells_a_page_that_is_not_up_to_date(published, tmp_path, monkeypatch, capsys):
    script = runpy.run_path(str(ROOT / "scripts" / "make_docs_tables.py"))
    main, places = script["main"], script["main"].__globals__
    monkeypatch.setitem(places, "TARGET", tmp_path / "experiments")
    monkeypatch.setitem(places, "ROOT", tmp_path)
    monkeypatch.setattr(experiments, "load", lambda folder: published[:1])
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "gone.md").write_text("an experiment that is no more")
    monkeypatch.setattr(sys, "argv", ["make_docs_tables.py", "--check"])
    with pytest.raises(SystemExit, match=r"not up to date: default\.md, index\.md, claims\.md, gone\.md"):
        main()
    monkeypatch.setattr(sys, "argv", ["make_docs_tables.py"])
    main()
    assert sorted(file.name for file in tmp_path.rglob("*.md")) == ["claims.md", "default.md", "index.md"]
    monkeypatch.setattr(sys, "argv", ["make_docs_tables.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and "3 pages changed" in capsys.readouterr().out


def test_figures_in_prose_stand_in_the_tables(published):
    for experiment in published:
        text = experiments.page(experiment)
        tables = "\n".join(line for line in text.splitlines() if line.startswith("|"))
        for figure in re.findall(r"\d+\.\d+", experiment.spec.get("findings", "")):
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", tables), f"{experiment.name}: {figure}"


def test_every_record_has_its_line(published):
    """Tables show all runs of an archive, but for a model that was only trained to be used by the others."""
    twice = {"prosparse": 2}  # runs that stand in a further table
    for experiment in published:
        tables = [run_table(experiment.runs, each) for each in experiment.spec["tables"] if "bench" not in each]
        shown = sum(int(line[-1]) for table in tables for line in table.rows)
        runs = [r for r in experiment.runs if not r.record["name"].startswith("llama-wikitext2/dense")]
        assert shown == len(runs) + twice.get(experiment.name, 0), experiment.name


def test_the_archives_are_small_and_keep_where_records_come_from(published):
    files = [file for file in REFERENCE.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 3_000_000
    text = [file for file in files if file.suffix != archive.SUFFIX]
    assert sum(len(file.read_text().splitlines()) for file in text) < 5000
    assert sum(len(e.records) for e in published) >= 656
    for experiment in published:
        for row in map(archive.row, experiment.records):
            assert (
                row["command"].split()[0] in ("sparsebench", "sparsebench-bench") and row["commit"] and row["machine"]
            )


def test_the_example_is_a_whole_record():
    content = json.loads((REFERENCE / "example" / "result.json").read_text())
    assert record.refusal(content) is None and content["status"] == "finished"
    if content["schema_version"] == record.SCHEMA_VERSION:
        jsonschema.validate(content, json.loads(record.SCHEMA_FILE.read_text()))
    assert len(content["latency"]["decode"]["sparse"]["samples_ms"]) >= 30


# ---------------------------------------------------------------------------------------------------------------------


def test_a_line_is_the_mean_over_seeds():
    table = run_table(
        rows(*(made(seed=s, perplexity=12 + s) for s in range(3)), made(sparsity=0.25, perplexity=10.5)), SPEC
    )
    assert table.head == ["method", "asked", "perplexity", "sparsity", "MACs", "runs"]
    assert table.rows == [
        ["teal", "25 %", "10.50", "25.0 %", "75.0 %", "1"], ["teal", "50 %", "13.0 ± 1.0", "50.0 %", "50.0 %", "3"],
    ]  # fmt: skip
    assert table.numeric == {1, 2, 3, 4, 5}


def test_a_table_that_hides_a_setting_is_refused():
    other = made(seed=1)
    other["config"]["method"]["allocation"] = "greedy"
    with pytest.raises(ValueError, match="differ in more than the seed"):
        run_table(rows(made(seed=0), other), SPEC)
    with pytest.raises(ValueError, match="differ in more than the seed"):
        run_table(rows(made(), made()), SPEC)  # one seed twice is no second seed
    elsewhere = made(seed=1)
    elsewhere["env"] = {**elsewhere["env"], "git_commit": "f" * 40}
    with pytest.raises(ValueError, match="differ in more than the seed"):
        run_table(rows(made(), elsewhere), SPEC)
    told = {**SPEC, "by": [*SPEC["by"], {"head": "a", "path": "config.method.allocation", "form": "text"}]}
    assert [line[2] for line in run_table(rows(made(seed=0), other), told).rows] == ["–", "greedy"]


def test_a_table_without_rows_and_one_of_a_busy_machine():
    with pytest.raises(ValueError, match="no record has"):
        run_table(rows(made()), {**SPEC, "where": {"config.model.name": "other"}})
    busy = made()
    busy["env"] |= {"load_average": [7.5, 1, 1], "cores": 2}
    assert "not to be trusted" in run_table(rows(busy), {**SPEC, "columns": ["sparse ms"]}).note
    assert run_table(rows(busy), SPEC).note == ""


@pytest.mark.parametrize(
    "values, expected",
    [([9.731], "9.731"), ([9.70, 9.75, 9.743], "9.731 ± 0.027"), ([9.6, 9.9, 9.75], "9.75 ± 0.15"), ([8.99, 8.99], "8.990"),
     ([0.0], "0"), ([12345.6], "12346"), ([0.0123], "0.01230"), ([10.0, 50.0], "30 ± 28")],
)  # fmt: skip
def test_digits_follow_the_deviation(values, expected):
    assert spread(values, 0, 3, None) == expected


def test_cells():
    assert cell([None], {"form": "percent"}) == "–" and cell([None], {"empty": "all"}) == "all"
    assert cell([0.215], {"form": "share"}) == "21.5 %" and cell([0.5, None], {"form": "percent"}) == "50.0 %"
    assert cell(["a", "b", "a"], {"form": "text"}) == "a, b" and cell([20480], {"form": "count"}) == "20,480"
    assert cell(["c" * 40 + "+"], {"form": "commit"}) == "ccccccc with local changes"


def test_benchmarks_in_one_table():
    other = made_bench(model="llama2-7b")
    steps = experiments.bench_table([made_bench(), other], {"bench": "step", "levels": [0.5, 0.9]})
    assert steps.head == ["tokens/s", "dense, fused", "50 %", "90 %"]
    assert steps.rows[1] == ["llama2-7b, float32, context 128", "250.0", "400.0 (1.60x)", "–"]
    ffn = experiments.bench_table([other], {"bench": "ffn", "levels": [0.5]})
    assert ffn.rows == [["llama2-7b, float32", "80.0", "40.0 (2.00x)"]]
    products = {
        "m": 4, "n": 8, "times": {"dense mv": {"median_us": 8.0}, "fused@0.5": {"median_us": 4.0}},
        "sparse": {"fused@0.5": {"speedup": 2.0, "of_read_bandwidth": 0.9}},
    }  # fmt: skip
    table = experiments.bench_table([made_bench(projections=[products])], {"bench": "products", "levels": [0.5]})
    assert table.rows == [["4 x 8, float32", "8.0", "4.0 (2.00x) [90%]"]]


def test_yaml_and_archives_must_agree(tmp_path):
    (tmp_path / "experiments.yaml").write_text("here: {}\ngone: {}\n")
    archive.write(tmp_path / "here.parquet", [made()])
    with pytest.raises(ValueError, match=r"differ in \['gone'\]"):
        experiments.load(tmp_path)


def test_a_picture_takes_runs_of_other_archives_and_names_what_is_missing():
    """Over several models, from several archives; a plot of one protocol; neither."""

    def experiment(name, sizes, **picture):
        records = [made("teal", level, perplexity) for level, perplexity in ((0.4, 12.0), (0.6, 16.0))]
        for each in records:
            each["config"]["model"]["name"], each["model"] = name, {"source": name, "num_parameters": sizes}
        return experiments.Experiment(name, {"pictures": [{"name": "p", **picture}]} if picture else {}, records)

    one, other = experiment("one", 1e8, plot="kept-at-half-all", also=["other"]), experiment("other", 1e9)
    both = experiments.pictures([one, other])
    alone = experiments.pictures([experiment("one", 1e8, plot="kept-at-half-all")])
    assert both.keys() == alone.keys() == {"one-p.png"} and both["one-p.png"] != alone["one-p.png"]
    assert experiments.pictures([experiment("one", 1e8, plot="macs")])["one-p.png"][:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="no plot 'macs', got 4 records of 2 protocols"):
        experiments.pictures([experiment("one", 1e8, plot="macs", also=["other"]), other])
