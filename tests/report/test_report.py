"""The report over made-up records of every kind: rankings stay inside a protocol, everything is escaped, nothing is fetched."""

import contextlib
import copy
import csv
import functools
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from sparsebench.config.identity import digest
from sparsebench.records import archive, record
from sparsebench.report import __main__ as report_command
from sparsebench.report import charts, document, export, page, published, rows, step_tables, tables, vega
from sparsebench.report import groups as grouping
from tests.helpers import failed, laid, made, made_bench, vision, with_losses

ROOT = Path(__file__).parents[2]


def reported(folder, draw=False):
    """(collection, groups, HTML, Markdown); charts take seconds and are drawn only where asked for, libraries left out."""
    actual = rows.collect([folder])
    with contextlib.nullcontext() if draw else mock.patch.object(charts, "of_group", return_value=({}, {})):
        written, groups = page.build(actual, "title")
    with (
        mock.patch.object(vega, "bundle", return_value="0"),
        mock.patch.object(document, "datatables", return_value="0"),
    ):
        html = document.document("".join(written.html), written.charts, "title")
    return actual, groups, html, "\n".join(written.markdown)


# ---------------------------------------------------------------------------------------------------------------------


def test_rows_of_different_protocols_are_never_in_one_table(tmp_path):
    longer = made(sparsity=0.65)
    longer["quality"]["perplexity"]["protocol"]["window"] = 2048
    other_data = made(sparsity=0.7)
    other_data["dataset"] = {"test": {"fingerprint": "e" * 64}}
    layers = made(sparsity=0.6)
    layers["config"]["model"]["num_layers"] = 2
    all_of_them = [made(sparsity=0.5), made(sparsity=0.4), made(policy="half"), longer, other_data, layers, vision()]
    _, groups, html, markdown = reported(laid(tmp_path, *all_of_them))
    assert sorted(len(g.rows) for g in groups) == [1, 1, 1, 1, 1, 2]
    for group in groups:
        assert len({digest(grouping.protocol(r)) for r in group.rows}) == 1
    assert "Protocols differ" in html and "Protocols differ" in markdown
    titles = [g.title for g in groups]
    assert len(set(titles)) == len(titles) and any("prompt policy half" in t for t in titles)


def test_one_protocol_is_one_table_whatever_machine_and_times_are_flagged(tmp_path):
    elsewhere = made(sparsity=0.65)
    elsewhere["env"] = {"gpu": "H200", "hardware": {"device": "cuda:0", "dtype": "bfloat16", "threads": 8}}
    _, groups, html, _ = reported(laid(tmp_path, made(), elsewhere), draw=True)
    assert len(groups) == 1 and len(groups[0].rows) == 2
    assert "can&#x27;t be compared across them" in html and "H200, bfloat16, context 128" in html
    assert html.count('alt="Quality against time, ') == 2  # one chart per machine


def test_times_of_a_busy_machine_are_flagged(tmp_path):
    quiet, busy = made(), made(sparsity=0.25)
    quiet["env"] |= {"load_average": [0.9, 1, 1], "cores": 2}
    busy["env"] = {**quiet["env"], "load_average": [7.5, 1, 1]}
    _, groups, html, _ = reported(laid(tmp_path, quiet, busy))
    assert tables.busy(groups[0]).startswith(
        "1 of 2 runs started on a busy machine (load average up to 7.5 on 2 cores)"
    )
    assert "not to be trusted" in html
    assert tables.busy(grouping.Group({}, [r for r in groups[0].rows if r.sparsity == 0.5])) is None


def test_the_dense_method_stands_beside_every_prompt_policy(tmp_path):
    plain = made("dense", sparsity=0.0, perplexity=10.0, speedup=None)
    _, groups, _, _ = reported(laid(tmp_path, made(), made(policy="half"), plain))
    assert [sum(r.method == "dense" for r in g.rows) for g in groups] == [1, 1]


def scratch(seed, accuracy, channels=32) -> dict:
    """A run on a model that its seed trained from scratch, kept in a file of its own."""
    record = vision(accuracy)
    record["config"] |= {"seed": seed, "model": {"name": "lenet5", "weights": "scratch", "channels": channels}}
    record["model"] = {"source": f"outputs-{seed}/models/lenet5-{seed}f00"}
    record["config_hash"] = digest(record)
    return record


def test_seeds_of_models_trained_apart_stand_in_one_group(tmp_path):
    records = [scratch(seed, 0.9 + seed / 100) for seed in range(3)]
    _, groups, html, _ = reported(laid(tmp_path, *records, scratch(0, 0.8, channels=64)))
    assert sorted(len(g.rows) for g in groups) == [1, 3]  # another recipe is another model
    (same,) = grouping.over_seeds(max(groups, key=lambda g: len(g.rows)).rows)
    assert (same["seeds"], round(same["mean"], 3)) == (3, 0.91) and "Over seeds" in html


def test_torch_tells_machines_apart(tmp_path):
    old, new = made(), made(sparsity=0.25)
    for each, version in ((old, "2.9"), (new, "2.10")):
        each["env"] |= {"versions": {"torch": version}}
    _, groups, html, _ = reported(laid(tmp_path, old, new))
    assert len(tables.machines(groups[0])) == 2 and "can&#x27;t be compared across them" in html


def test_a_further_metric_of_another_protocol_is_another_column(tmp_path):
    records = [made(sparsity=s) for s in (0.25, 0.5)]
    for each, limit in zip(records, (100, None), strict=True):
        stated = {"harness": "lm-eval 0.4.9", "limit": limit, "shots": 0}
        task = {"dense": 0.7, "sparse": 0.6, "sparse_stderr": 0.02, "higher_is_better": True, "protocol": stated}
        each["quality"]["piqa/acc"] = task
    _, groups, _, _ = reported(laid(tmp_path, *records))
    table = tables.metrics(groups[0])
    assert table.head == ["run", "piqa/acc (limit 100)", "piqa/acc (limit –)"]
    assert [row[1:] for row in table.rows] == [["0.7 → 0.60 ± 0.02", "–"], ["–", "0.7 → 0.60 ± 0.02"]]


def test_the_answer_stands_first_and_says_whether_it_is_sure(tmp_path):
    losses = np.random.default_rng(0).normal(2.3, 0.4, 40)
    runs = [
        with_losses(made(m, s), losses, losses + bias + s)
        for m, bias in (("teal", 0.1), ("wina", 0.2))
        for s in (0.4, 0.6)
    ]
    _, _, html, markdown = reported(laid(tmp_path, *runs, made("cats", 0.3)))
    lead = "At 50 % of the MACs teal has the best perplexity: "
    assert html.index(lead) < html.index("All runs</h2>") and "a real difference." in html
    assert markdown.count(lead) == 1 and "not compared: cats: one setting, at 70.0% of the MACs" in markdown
    assert "wina is worse than teal by" in markdown and "paired over 40 windows, one seed" in markdown


def test_pareto_front_by_hand():
    points = [(1.0, 5.0), (2.0, 4.0), (3.0, 4.5), (4.0, 1.0), (None, 0.0), (2.0, 3.9), (5.0, None)]
    assert grouping.pareto(points, higher_is_better=False) == [0, 5, 3]
    assert grouping.pareto([(1.0, 0.5), (2.0, 0.4), (3.0, 0.9)], higher_is_better=True) == [0, 2]
    assert grouping.pareto([], higher_is_better=True) == []


def test_fronts_follow_the_axis(tmp_path):
    """`other` leaves more channels out and does more work: it is on the front of sparsity, and on no other."""
    factors = made("other", sparsity=0.6, perplexity=13)
    factors["macs"] |= {"sparse": 95}
    _, groups, _, _ = reported(
        laid(tmp_path, made(sparsity=0.4, perplexity=11), made(sparsity=0.5, perplexity=12), factors)
    )
    told = [(r.method, r.sparsity, [f for f in r.fronts if f != "time"]) for r in groups[0].rows]
    assert told == [
        ("other", 0.6, ["sparsity"]),
        ("teal", 0.4, ["sparsity", "work"]),
        ("teal", 0.5, ["sparsity", "work"]),
    ]


def test_vision_records_and_records_without_sections(tmp_path):
    actual, groups, html, _ = reported(laid(tmp_path, vision(), vision(0.9), failed()), draw=True)
    assert len(actual.finished) == 2 and len(actual.failed) == 1
    assert groups[0].title == "lenet5 on digits, accuracy" and "ece" in html
    assert groups[0].rows[0].decode["sparse"] == 2.1 and "batch 64" in " ".join(groups[0].rows[0].times)
    assert [(r.sparse, bool(r.fronts)) for r in groups[0].rows] == [(0.95, True), (0.9, False)]


def test_a_simulated_row_has_no_speed_up(tmp_path):
    _, groups, _, _ = reported(laid(tmp_path, made(speedup=None)))
    table = tables.comparison(groups[0])
    assert table.rows[0][table.head.index("speed-up")] == "simulated"


def test_everything_from_a_record_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>\"&"
    bad = made(sparsity=0.6)
    bad["config"]["model"]["name"] = bad["config"]["dataset"]["name"] = bad["name"] = evil
    bad["config"]["method"]["name"] = evil
    bad["env"]["cpu"] = bad["model"]["source"] = bad["latency"]["kernel"] = evil
    bad["sparsity"]["per_site"] = {evil: {"sparsity": 0.5, "weight": 1}}
    bad["quality"] = {evil: {**bad["quality"]["perplexity"], "protocol": {evil: evil}}}
    crash = failed(evil, evil)
    crash["name"] = evil
    (tmp_path / "<img src=x>").mkdir()
    (tmp_path / "<img src=x>" / "result.json").write_text("broken")
    _, _, html, _ = reported(laid(tmp_path, bad, crash), draw=True)
    assert html.count("<script") == 3 and "<img src=x>" not in html  # the data, the two libraries
    assert html.count("&lt;script&gt;") >= 8 and "\\u003cscript" in html


def test_the_page_needs_no_network_and_runs_only_what_it_names(tmp_path):
    _, _, html, _ = reported(laid(tmp_path, made(), made(sparsity=0.25), vision()), draw=True)
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", html)
    body = re.sub(r'src="data:[^"]*"|<style>.*?</style>', "", html, flags=re.DOTALL)
    assert "http" not in body.replace("http-equiv", "") and "@import" not in html
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    running = re.findall(r"<script(?: type=\"module\")?>(.*?)</script>", html, flags=re.DOTALL)
    assert len(running) == 2 and policy == document.policy(running) and "default-src 'none'" in policy
    assert "unsafe" not in policy.partition("script-src")[2]


def test_macs_of_ffns_are_those_of_their_maps_and_routers():
    """Attention's maps and layers of networks without blocks (`fc1` of LeNet) don't count."""
    cost = {"dense_macs": 100, "sparse_macs": 20, "overhead_macs": 5}
    sites = {"0.q": {**cost, "sparse_macs": 100}, "0.gate": cost, "0.down": {**cost, "overhead_macs": 0}, "fc1": {}}
    assert rows.ffn_share(sites) == 45 / 200
    assert rows.ffn_share({"conv1": {}, "fc1": {}}) is None


def test_a_curve_is_a_method_with_its_choices_and_its_points_are_means_over_seeds(tmp_path):
    records = []
    for seed, perplexity in ((0, 11.0), (1, 13.0)):
        for routing in ("trained", "oracle"):
            record = made("moefication", perplexity=perplexity, seed=seed)
            record["config"]["method"]["routing"] = routing
            record["config_hash"] = digest(record)
            records.append(record)
    group = grouping.groups(rows.collect([laid(tmp_path, *records)]).finished)[0]
    assert {r.series for r in group.rows} == {"moefication trained", "moefication oracle"}
    assert [len(same) for same in grouping.repeats(group.rows)] == [2, 2]
    specs, data = charts.of_group(group, vega.styles([r.series for r in group.rows]), lambda row: None)
    drawn = {p["series"]: (p["work"], p["quality"], p["seeds"], p["figure"]) for p in data["points"]}
    point = (0.5, 12.0, 2, "12.0 ± 1.4")
    assert drawn == {"moefication trained": point, "moefication oracle": point} and "macs" in specs


def test_a_curve_runs_along_what_one_fit_serves(tmp_path):
    """D2DMoE: tau along, another alpha another curve. LTE: every eta is a fit of its own, and the curve runs along it."""
    records = []
    for alpha in (0.0, 0.02):
        for tau in (0.1, 0.2):
            record = made("d2dmoe", perplexity=11.0 + tau)
            record["config"]["method"] |= {"alpha": alpha, "tau": tau, "base": "relu"}
            record["fit"]["state"] = f"d2dmoe-{alpha}.safetensors"
            records.append(record)
    for sparsity, tokens in ((0.4, 10), (0.5, 10), (0.4, 20)):
        record = made("teal", sparsity)
        record["config"]["method"] |= {"tokens": tokens, "allocation": "greedy" if tokens == 10 else "uniform"}
        record["fit"]["state"] = f"teal-{tokens}.safetensors"
        records.append(record)
    for eta in (0.5, 1.0, 2.0):
        record = made("lte", perplexity=12.0 + eta)
        record["config"]["method"] |= {"eta": eta, "control": "dense" if eta == 2.0 else None}
        record["fit"]["state"] = f"lte-{eta}.safetensors"
        records.append(record)
    for record in records:
        record["config_hash"] = digest(record)
    group = grouping.groups(rows.collect([laid(tmp_path, *records)]).finished)[0]
    two = ["d2dmoe alpha=0.0", "d2dmoe alpha=0.02", "lte"]
    assert sorted(r.series for r in group.rows) == [*sorted(two * 2), "lte dense", *["teal greedy"] * 2, "teal uniform"]


def test_seeds_are_summed_up(tmp_path):
    _, groups, html, _ = reported(
        laid(tmp_path, *(made(seed=s, perplexity=12 + s) for s in range(3)), made(sparsity=0.3))
    )
    (same,) = grouping.over_seeds(groups[0].rows)
    assert (same["seeds"], same["mean"], same["sd"]) == (3, 13.0, 1.0) and "Over seeds" in html


def test_a_run_made_twice_is_no_second_seed(tmp_path):
    """The same settings and seed with another version of a package are another run, of the same seed."""
    twice = [made(config_hash=str(n) * 64, perplexity=12.0 + n) for n in range(2)]
    _, groups, html, _ = reported(laid(tmp_path, *twice))
    assert len(groups[0].rows) == 2 and not grouping.over_seeds(groups[0].rows) and "Over seeds" not in html


def test_estimates_stand_apart_and_beside_the_measured_target(tmp_path):
    guess = made(estimate={"label": "estimate", "target": "h200", "decode": {"dense_ms": 5.0, "sparse_ms": 2.5, "speedup": 2.0},
                           "fitted_on": {"device": "Test CPU"}, "cautions": []})  # fmt: skip
    guess["config"]["hardware"]["requires"] = "H200"
    real = made(speedup=1.7)
    real["config"]["hardware"] = {"name": "h200", "requires": "H200"}
    real["env"] = {"gpu": "NVIDIA H200", "hardware": {"device": "cuda:0", "dtype": "float32", "threads": 1}}
    real["config_hash"] = "real"
    _, groups, html, _ = reported(laid(tmp_path, guess, real))
    table = step_tables.estimates(groups[0])
    assert len(table.rows) == 1 and "1.70x" in table.rows[0][6] and "≈ 2.00x" in table.rows[0]
    assert "Estimates, not measurements" in html
    measured = tables.comparison(groups[0])
    assert all("2.00" not in row[measured.head.index("speed-up")] for row in measured.rows)


def test_a_copied_run_counts_once_and_the_later_one(tmp_path):
    later = {**made(), "started_at": "2026-02-02T00:00:00+00:00", "seconds": 5.0}
    actual = rows.collect([laid(tmp_path, made(), later)])
    assert actual.repeated == 1 and [r.record["seconds"] for r in actual.finished] == [5.0]


def test_csv_has_every_finished_row_with_unrounded_numbers(tmp_path):
    _, groups, _, _ = reported(laid(tmp_path, made(perplexity=12.3456789), vision(), failed()))
    lines = list(csv.DictReader(io.StringIO(export.as_csv(groups))))
    assert len(lines) == 2 and {"12.3456789", "0.95"} == {line["sparse"] for line in lines}
    assert next(line for line in lines if line["model"] == "lenet5")["speedup"] == ""


def test_spread_dense_engine_and_noise_stand_in_table_and_csv(tmp_path):
    record = made()
    dense = {"median_ms": 1.0, "p10_ms": 0.9, "p90_ms": 1.4}
    sparse = {"median_ms": 0.5, "p10_ms": 0.45, "p90_ms": 0.6}
    decode = {"dense": dense, "sparse": sparse, "dense_engine": "fused", "speedup": 2.0, "context": 128}
    record["latency"] |= {"decode": decode, "noisy": True, "reasons": ["load"]}
    _, groups, _, _ = reported(laid(tmp_path, record))
    (line,) = csv.DictReader(io.StringIO(export.as_csv(groups)))
    expected = {"dense_p10_ms": "0.9", "dense_p90_ms": "1.4", "sparse_p10_ms": "0.45", "sparse_p90_ms": "0.6"}
    assert {k: line[k] for k in expected} == expected and line["dense_engine"] == "fused" and line["noisy"] == "True"
    table = tables.comparison(groups[0])
    cells = dict(zip(table.head, table.rows[0], strict=True))
    assert cells["dense ms"] == "1.000 [0.900, 1.400]" and cells["sparse ms"] == "0.500 [0.450, 0.600]"
    assert cells["speed-up"] == "2.00x (noisy)" and cells["kernel"] == "fused / cpu_numba"


@pytest.fixture
def command(forked):
    """The command sparsebench-report, in `tmp_path`."""
    return functools.partial(forked, main=report_command.main)


def test_command_writes_all_four_kinds_and_counts(command, tmp_path):
    laid(tmp_path / "a", made(), made(sparsity=0.25, perplexity=10.5), failed())
    laid(tmp_path / "b", vision())
    (tmp_path / "b" / "bench").mkdir()
    (tmp_path / "b" / "bench" / "result.json").write_text(json.dumps(made_bench(model="m <b>")))
    process = command("a", "b", "--output", "out", "--latex")
    assert process.returncode == 0, process.stderr
    last = json.loads(process.stdout.splitlines()[-1])
    assert (last["finished"], last["failed"], last["unreadable"]) == (3, 1, 0)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"report.html", "report.md", "report.csv", "report.parquet", "report.tex"} <= names and set(
        last["plots"]
    ) <= names
    begins = {".png": b"\x89PNG", ".svg": b"<svg"}
    assert all((tmp_path / "out" / n).read_bytes().startswith(begins[Path(n).suffix]) for n in last["plots"])
    html = (tmp_path / "out" / "report.html").read_text()
    assert (
        "Benchmark: m &lt;b&gt;" in html and "| 50% | 40.0 [40.0, 40.0] | 2.00x | 80% |" in html and "<b>\n" not in html
    )
    assert "bench-1.png" in last["plots"]
    again = command("nowhere")
    assert again.returncode == 2 and "no such file or folder: nowhere" in again.stderr
    (tmp_path / "empty").mkdir()
    nothing = command("empty")
    assert nothing.returncode == 1 and nothing.stderr.strip() == "error: no records below empty"


# ---------------------------------------------------------------------------------------------------------------------
# Archives, older schemas, damaged files


def test_the_command_writes_an_archive_reports_it_and_gives_its_records_back(command, tmp_path):
    records = [made(), made(sparsity=0.25), failed()]
    laid(tmp_path / "runs", *records)
    archived = command("runs", "--archive", "mine.parquet")
    assert archived.returncode == 0, archived.stderr
    assert json.loads(archived.stdout)["records"] == 3
    hash_of_one = records[1]["config_hash"]
    extracted = command("mine.parquet", "--extract", hash_of_one[:8], "out")
    (file,) = json.loads(extracted.stdout)["records"]
    assert json.loads((tmp_path / file).read_text()) == records[1]
    unknown = command("mine.parquet", "--extract", "ffffffffff", "out")
    assert unknown.returncode == 1 and "no record has such a hash" in unknown.stderr
    wrong_name = command("runs", "--archive", "mine.zip")
    assert wrong_name.returncode == 2 and "ends in .parquet" in wrong_name.stderr


def test_archives_and_folders_mix_and_a_run_in_both_counts_once(tmp_path):
    archive.write(tmp_path / "a.parquet", [made(), made(sparsity=0.25), made_bench()])
    folder = laid(tmp_path / "runs", made(), made(sparsity=0.65))
    actual = rows.collect([tmp_path / "a.parquet", folder])
    assert (len(actual.finished), actual.repeated, len(actual.benches)) == (3, 1, 1)
    assert actual.finished[0].path.name.startswith("a.parquet#")
    assert len(rows.collect([tmp_path]).finished) == 3  # archives inside a folder are found


@pytest.mark.parametrize("content", [b"", b"PAR1 and then nothing", b"{}"])
def test_a_damaged_archive_is_one_line_and_exit_code_2(command, tmp_path, content):
    (tmp_path / "bad.parquet").write_bytes(content)
    process = command("bad.parquet")
    assert process.returncode == 2 and process.stdout == ""
    assert len(process.stderr.splitlines()) == 1 and "bad.parquet can't be read as an archive" in process.stderr


def test_anybodys_parquet_inside_a_folder_is_left_alone(tmp_path):
    pq.write_table(pa.table({"text": ["a data set"]}), tmp_path / "data.parquet")
    actual = rows.collect([laid(tmp_path, made())])
    assert len(actual.finished) == 1 and not actual.unreadable


def test_records_of_older_schemas_are_shown_and_of_newer_ones_named(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "SCHEMA_VERSION", 2)
    old, new, future = made(), made(sparsity=0.25), made(sparsity=0.65)
    old["schema_version"], new["schema_version"], future["schema_version"] = 1, 2, 3
    folder = laid(tmp_path, old, new, future)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "result.json").write_text("[]")
    actual, _, html, _ = reported(folder)
    assert len(actual.finished) == 2
    assert [reason for _, reason in actual.unreadable] == ["schema 3, this version reads 2", "not a record"]
    assert "1 record(s) are of schema 1; this version writes 2." in html
    content, problem = record.read_any(tmp_path / "m0" / "method" / "hash" / "result.json")
    assert content["schema_version"] == 1 and problem == "it is of schema 1, this version reads 2"


def test_old_names_below_eval_do_not_tell_rows_apart(tmp_path):
    """Schema 1 wrote eval.batch_size where eval.text.batch_size stands now."""
    old, new = made(seed=0), made(seed=1)
    old["config"]["eval"] = {"test_sequences": 4, "batch_size": 8, "tasks": [], "neurons": {"enabled": False}}
    new["config"]["eval"] = {
        "text": {"test_sequences": 4, "batch_size": 8}, "lm_eval": {"tasks": []}, "neurons": {"enabled": False},
    }  # fmt: skip
    (group,) = grouping.groups(rows.collect([laid(tmp_path, old, new)]).finished)
    assert [r.label for r in group.rows] == ["teal seed=0", "teal seed=1"]
    assert len(grouping.repeats(group.rows)) == 1


def test_every_key_below_eval_has_its_old_place(tmp_path):
    evaluation = yaml.safe_load((ROOT / "conf" / "config.yaml").read_text())["eval"]
    for key, part in rows.SCHEMA_1_EVAL.items():
        assert key in evaluation[part], key


def test_a_record_that_is_not_whole_stops_nothing(tmp_path):
    cut = made(sparsity=0.25)
    del cut["config"]["method"]
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "result.json").write_text(json.dumps({"kind": "bench", "model": "m", "env": {}}))
    actual, _, html, _ = reported(laid(tmp_path, made(), cut))
    assert len(actual.finished) == 1 and "not a whole record" in actual.unreadable[0][1]
    assert "not a whole record of a benchmark" in html


def test_help_is_light():
    code = (
        "import sys; import sparsebench.report.__main__; heavy = ('torch', 'pyarrow', 'matplotlib', 'altair', 'vl_convert'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------------------------
# Published figures


def test_published_entries_are_complete():
    needed = {"method", "key", "metric", "model", "points", "with", "source", "seen"}
    for entry in published.figures():
        assert needed <= entry.keys() <= needed | {"dense", "recalled", "protocol", "hardware"}, entry["source"]
        assert entry["seen"] in published.SEEN and set(entry.get("recalled", ())) <= entry["points"].keys()
        assert ("hardware" in entry) == (entry["metric"] == "speedup")


def test_published_figure_stands_beside_a_matching_setting_and_says_what_differs(tmp_path):
    (row,) = rows.collect([laid(tmp_path, made())]).finished
    row.label = "teal"
    record = [b for b in published.beside([row]) if b.metric == "perplexity" and "2408.14690" in b.source]
    assert len(record) == 5 and all(b.ours == "10 → 12 (1.200x)" for b in record)
    assert any(b.published == "5.07 → 5.43 (1.071x)" for b in record)
    assert all("model llama-tiny instead of" in b.differs[0] for b in record)
    assert all("method.prompt=all instead of half" in b.differs for b in record)
    assert any("(unverified)" in b.source for b in record)
    other = copy.deepcopy(row.record)
    other["config"]["model"]["name"] = "llama2-7b"
    other["config"]["method"] |= {"prompt": "half", "allocation": "greedy"}
    exact = rows.make_row(row.path, other)
    mine = [b for b in published.beside([exact]) if b.metric == "perplexity" and "2408.14690" in b.source]
    assert len(mine) == 1 and [d.split()[0] for d in mine[0].differs] == ["data"]


def test_same_setting_is_said_only_where_it_holds(tmp_path):
    (row,) = rows.collect([laid(tmp_path, made())]).finished
    row.label = "teal"
    same, other = (table for _, table in published.tables([row])[1:])
    settings = [line[-1] for line in (same.rows if same else [])]
    assert not any("instead of half" in text for text in settings)
    assert any("method.prompt=all instead of half" in line[-1] for line in other.rows)


def test_published_figures_stand_beside_a_setting_once_whatever_its_seeds(tmp_path):
    runs = rows.collect([laid(tmp_path, *(made(seed=i, perplexity=12 + i) for i in range(3)))]).finished
    grouping.groups(runs)
    lines = [line for _, table in published.tables(runs) if table for line in table.rows if line[2] == "perplexity"]
    assert len({tuple(line[4:]) for line in lines}) == len(lines) and {line[0] for line in lines} == {
        "teal sparsity=0.5"
    }
    assert {line[3] for line in lines} == {"10 → 12 (1.200x) to 10 → 14 (1.400x), 3 runs"}


@pytest.mark.parametrize("changes", [{"method": "dense", "sparsity": 0.0}, {"sparsity": 0.55}])
def test_no_published_figure_where_the_setting_does_not_match(tmp_path, changes):
    assert not published.beside(rows.collect([laid(tmp_path, made(**changes))]).finished)


def test_zeros_of_neurons_are_compared_where_they_were_measured(tmp_path):
    record = made("prosparse", extra={"neurons": {"dense": {"x1_zero": 0.0}, "sparse": {"x1_zero": 0.85}}})
    record["config"]["method"]["threshold"] = 0.01
    rows_found = rows.collect([laid(tmp_path, record)]).finished
    beside = [b for b in published.beside(rows_found) if b.metric == "x1_zero"]
    assert {b.published for b in beside} == {"0.8932", "0.888"} and {b.ours for b in beside} == {"0.85"}


def test_recalled_figures_are_unverified():
    entry = next(e for e in published.figures() if e["model"] == "mistral-7b" and e["method"] == "teal")
    assert entry["recalled"] == [0.25, 0.5, 0.65]


def test_the_same_method_in_two_types_is_two_curves(tmp_path):
    """Before: both stood on one curve, which then had two settings at one place and could not be compared."""
    records = [made(sparsity=s, perplexity=10 + s) for s in (0.3, 0.5) for _ in range(2)]
    for number, content in enumerate(records):
        content["config_hash"] = str(number)
        content["env"]["hardware"] = {**content["env"].get("hardware", {}), "dtype": ("float16", "float32")[number % 2]}
    (group,) = grouping.groups(rows.collect([laid(tmp_path, *records)]).finished)
    assert {row.series.split()[-1] for row in group.rows if row.method != "dense"} == {"float16", "float32"}
