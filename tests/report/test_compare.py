"""Two sets of records row by row: what changed beyond noise is marked, what did not or can't be told is not."""

import copy
import json

import numpy as np
import pytest

from sparsebench.report import compare
from sparsebench.report.__main__ import main
from sparsebench.report.rows import collect
from tests.helpers import laid, made, with_losses

TEXT = np.random.default_rng(0).normal(2.3, 0.4, 40)


def timed(record, median, spread=0.02, noisy=False):
    """The record with these times of a sparse step."""
    record = copy.deepcopy(record)
    times = {"median_ms": median, "p10_ms": median * (1 - spread), "p90_ms": median * (1 + spread)}
    record["latency"]["decode"]["sparse"], record["latency"]["noisy"] = times, noisy
    return record


def changes(tmp_path, before, after):
    first, second = (collect([laid(tmp_path / name, record)]) for name, record in (("a", before), ("b", after)))
    _, (pair,) = compare.build(first, second, "title")
    return {c.name: c for c in pair.changes}


@pytest.mark.parametrize(("shift", "jitter", "verdict"), [
    (0.05, 0.001, "changed"), (0.0, 0.0, "within noise"), (0.001, 0.1, "within noise"),
])  # fmt: skip
def test_quality_is_judged_by_its_paired_error(tmp_path, shift, jitter, verdict):
    before = TEXT + 0.1
    after = before + shift + np.random.default_rng(1).normal(0, jitter, 40)
    change = changes(tmp_path, with_losses(made(), TEXT, before), with_losses(made(), TEXT, after))["perplexity"]
    assert change.verdict == verdict
    assert change.shown == "the same" if shift == jitter else "±" in change.shown


@pytest.mark.parametrize(("median", "options", "verdict"), [
    (0.6, {}, "changed"), (0.505, {}, "within noise"), (0.6, {"spread": 0.4}, "within noise"), (0.6, {"noisy": True}, "no error known"),
])  # fmt: skip
def test_times_change_where_each_lies_outside_the_others_spread(tmp_path, median, options, verdict):
    assert changes(tmp_path, timed(made(), 0.5), timed(made(), median, **options))["ms"].verdict == verdict


def test_runs_are_the_same_on_another_machine_and_others_are_listed(tmp_path, monkeypatch, capsys):
    elsewhere = made()
    elsewhere["config"]["hardware"] = {"name": "h200"}
    elsewhere["env"] = {"gpu": "H200", "hardware": {"device": "cuda:0", "dtype": "bfloat16"}}
    moved = made(sparsity=0.65)
    laid(tmp_path / "a", made(), made(sparsity=0.25), moved)
    moved = copy.deepcopy(moved)
    moved["sparsity"]["model_wide"] = 0.6
    laid(tmp_path / "b", elsewhere, made("wina"), moved)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["sparsebench-report", "a", "b", "--compare", "--output", "out"])
    main()
    last = json.loads(capsys.readouterr().out)
    assert (last["pairs"], last["only in first"], last["only in second"]) == (2, 1, 1)
    assert last["changed"] == ["teal sparsity=0.65 float32"]
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "2 runs are in both sets; 1 of them changed beyond noise." in text and "-5.00 points ◆" in text
    assert "Only in the first set" in text and "H200, bfloat16" in text
    assert "teal sparsity=0.65" in (tmp_path / "out" / "compare.html").read_text()
    monkeypatch.setattr("sys.argv", ["sparsebench-report", "a", "--compare"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--compare needs two sets of records, got 1" in capsys.readouterr().err
