"""Critical sparsity in the report and on the terminal: a column, a table over all runs, one figure against model size."""

import io
import json

import pytest
from rich.console import Console

from sparsebench.records import record, terminal
from sparsebench.report import critical, page, published, tables
from sparsebench.report.claims import claims, verdicts
from sparsebench.report.groups import groups
from sparsebench.report.rows import collect
from tests.helpers import laid, made


def section(**changes):
    return {
        "metric": "perplexity", "share": 0.99, "knob": "method.p", "status": "reached", "value": 0.93, "kept": 0.991,
        "stderr": 0.002, "sparsity": 0.21, "channels": 0.42, "low": 0.2, "high": 0.225, "sparsity_stderr": 0.006,
        "channels_stderr": 0.01, "best_kept": 1.0, "monotone": True, "evaluations": 12, "seconds": 3.0, "curve": [],
        "test": {"kept": 0.9875}, **changes,
    }  # fmt: skip


def run(model="small", size=1e8, target="input", **changes):
    content = made(
        "topp",
        0.3,
        extra={"critical": section(**changes)},
        model={"name": model, "num_parameters": size, "source": "x"},
    )
    content["config"]["model"]["name"] = model
    content["config"]["method"] |= {"target": target, "p": 0.9, "rule": "topp", "cut": "token"}
    content["config"]["eval"] = {"critical": {"enabled": True, "share": 0.99}}
    content["config_hash"] = f"{hash((model, target)) & 0xFFFFFFFF:064x}"
    return content


def collected(folder, *contents):
    return collect([laid(folder, *contents)])


def test_a_record_with_a_search_is_one():
    assert record.misfit(record.validator(), {**made(), "extra": {"critical": section()}}) == record.misfit(
        record.validator(), made()
    )
    assert record.misfit(record.validator(), {**made(), "extra": {"critical": section(status="clipped")}}) is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "21.0% [20.0%, 22.5%]"),
        ({"low": None, "high": None}, "21.0%"),
        ({"status": "beyond the range", "high": None}, "at least 21.0% [20.0%, ?]"),
        ({"status": "unreachable", "sparsity": None, "value": None, "low": None, "high": None}, "unreachable"),
    ],
)
def test_the_terminal_says_it_with_its_interval_and_clips_nothing(changes, words):
    content, out = run(**changes), io.StringIO()
    Console(file=out, width=160).print(
        terminal.table({**content, "name": "x", "memory": None, "latency": None, "macs": None, "bytes": None})
    )
    line = next(each for each in out.getvalue().splitlines() if "critical" in each)
    assert words in line and "99% of perplexity kept" in line
    assert ("method.p=0.93" in line) == (changes.get("value", 0.93) is not None)


def test_the_table_of_a_group_has_the_column_only_where_something_was_searched(tmp_path):
    (group,) = groups(collected(tmp_path / "a", run()).finished)
    assert (
        tables.comparison(group).head[-1] == "critical"
        and tables.comparison(group).rows[0][-1] == "21.0% [20.0%, 22.5%]"
    )
    (group,) = groups(collected(tmp_path / "b", made()).finished)
    assert "critical" not in tables.comparison(group).head


def test_models_share_a_figure_and_targets_are_curves(tmp_path):
    sizes, shares = {"small": 1e8, "large": 1e9}, {"input": (0.30, 0.35), "intermediate": (0.40, 0.50)}
    contents = [
        run(name, sizes[name], target, channels=share)
        for target, pair in shares.items()
        for name, share in zip(sizes, pair, strict=True)
    ]
    rows = collected(tmp_path, *contents).finished
    table = critical.table(rows)
    assert {line[0] for line in table.rows} == {"topp input", "topp intermediate"} and len(table.rows) == 4
    (spec,) = critical.chart(rows).values()
    values = [v for v in spec["data"]["values"] if v["source"] == "measured"]
    assert {(v["series"], v["parameters"], v["value"]) for v in values} == {
        ("topp input", 1e8, 0.3), ("topp input", 1e9, 0.35), ("topp intermediate", 1e8, 0.4), ("topp intermediate", 1e9, 0.5),
    }  # fmt: skip
    assert values[0]["low"] == pytest.approx(values[0]["value"] - 0.0196)
    written = page.write(collect([tmp_path]), tmp_path / "report", "t")
    assert (
        "Critical sparsity against model size" in "".join(written.markdown)
        and "across-critical-0.png" in written.pictures
    )


def test_different_demands_and_single_models_make_no_figure(tmp_path):
    one = run("small", 1e8, target="up")  # of which nothing is published
    other = run("large", 1e9, target="up", metric="next_token")
    assert critical.chart(collected(tmp_path / "a", one, other).finished) == {}
    assert critical.chart(collected(tmp_path / "b", one).finished) == {}
    assert critical.table(collected(tmp_path / "c", made()).finished) is None


def test_published_points_stand_beside_one_model_and_are_named_so(tmp_path):
    """Only of the tensors that our own searches are about, of the same share, and a line for each family."""
    (spec,) = critical.chart(collected(tmp_path / "a", run("small", 1e8, "gate", channels=0.2)).finished).values()
    values = spec["data"]["values"]
    assert [(v["source"], v["value"]) for v in values if v["parameters"] == 1e8] == [("measured", 0.2)]
    others = {(v["series"], v["model"], v["parameters"], v["value"]) for v in values if v["source"] == "published"}
    name = "topp gate, published"
    assert {(name, "gemma3-27b", 27e9, 0.55), (name, "qwen2.5-1.5b", 1.5e9, 0.2593)} <= others and len(others) == 5
    assert {v["run"] for v in values} == {"topp", "gate gemma3", "gate qwen2.5"}
    assert "dashed: published" in json.dumps(spec)
    half = run("small", 1e8, "gate", share=0.5)
    assert critical.chart(collected(tmp_path / "b", half).finished) == {}


def test_published_and_claimed_figures_are_read(tmp_path):
    rows = collected(
        tmp_path, run("gemma3-1b", 1e9, "intermediate", channels=0.44), run("gemma3-1b", 1e9, "input")
    ).finished
    lines = {
        b.row.record["config"]["method"]["target"]: b for b in published.beside(rows) if b.metric == "critical_sparsity"
    }
    assert (lines["intermediate"].ours, lines["intermediate"].published, lines["input"].published) == (
        "0.44",
        "0.5",
        "0.35",
    )
    claim = next(c for c in claims() if c.id == "topp_order")
    both = claim.__class__(
        **{**vars(claim), "tests": claim.tests[:1], "sides": {k: claim.sides[k] for k in ("middle", "input")}}
    )
    (line,) = verdicts(rows, [both])
    assert line.verdict == "not decided" and "2.0 ± 1.4" in line.measured.replace("+", ""), line
