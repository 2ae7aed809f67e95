"""Charts show what they say: one map a curve, stages apart, marks in the colour of their curve, no quality of random weights."""

import pytest

from sparsebench.config.identity import digest
from sparsebench.report import charts, equal_terms, tables, vega
from sparsebench.report.groups import groups
from sparsebench.report.rows import collect
from tests.helpers import laid, made


def group_of(folder, *records):
    for record in records:
        record["config_hash"] = digest([record["config"], record["env"]])
    (group,) = groups(collect([laid(folder, *records)]).finished)
    return group


def drawn(group):
    return charts.of_group(group, vega.styles(list({r.series for r in group.rows})), lambda row: None)


def in_type(record, dtype):
    return {**record, "env": {**record["env"], "hardware": {**record["env"]["hardware"], "dtype": dtype}}}


def test_a_method_in_two_number_formats_has_one_heat_map(tmp_path):
    group = group_of(tmp_path, *(in_type(made(m), t) for m in ("teal", "wina") for t in ("float16", "float32")))
    assert len({r.series for r in group.rows}) == 4
    spec = charts.heat_map(group)
    assert {c["series"] for c in spec["data"]["values"]} == {"teal", "wina"} and spec["title"].endswith("measured")


def test_heat_maps_that_are_left_out_are_counted(tmp_path):
    group = group_of(tmp_path, *(made(f"method{i:02}") for i in range(charts.MOST_MAPS + 3)))
    assert charts.heat_map(group)["title"].endswith(f"{charts.MOST_MAPS} of {charts.MOST_MAPS + 3} curves")


def test_a_map_of_many_layers_names_few_of_them(tmp_path):
    record = made()
    record["sparsity"]["per_site"] = {
        f"{i}.{r}": {"sparsity": 0.5, "weight": 1} for i in range(30) for r in ("q", "up")
    }
    named = charts.heat_map(group_of(tmp_path, record))["spec"]["encoding"]["x"]["axis"]["values"]
    assert named == ["0", "6", "12", "18", "24"]


def test_stages_of_a_training_are_lines_apart_on_one_count_of_steps():
    history = [{"fit/relu/step": i, "fit/relu/loss": 3.0} for i in (1, 2)] + [
        {"fit/router/step": i, "fit/router/loss": 300.0} for i in (1, 2)
    ]
    assert charts.losses(history) == [
        ("fit/relu", 1, 3.0), ("fit/relu", 2, 3.0), ("fit/router", 3, 300.0), ("fit/router", 4, 300.0),
    ]  # fmt: skip
    (row,) = [made(extra={"training": history})]
    assert charts.quality_scale([3.0, 300.0]).to_dict()["type"] == "log"
    assert "type" not in charts.quality_scale([3.0, 4.0]).to_dict() and row["extra"]["training"]


def test_a_filled_mark_has_the_colour_of_its_curve(tmp_path):
    """Filled: a kernel skipped work. One colour scale serves outline and filling."""
    spec = drawn(group_of(tmp_path, made(), made("wina"), made("cats")))[0]["sparsity"]
    marks = next(layer for layer in spec["layer"] if "fill" in layer["encoding"])["encoding"]
    assert marks["fill"]["condition"]["scale"] == marks["color"]["scale"]


def test_random_weights_have_no_quality_to_compare(tmp_path):
    records = [made(m, s, perplexity=70_000 * p) for m, p in (("teal", 1.0), ("wina", 1.1)) for s in (0.4, 0.6)]
    for record in records:
        record["config"]["model"]["weights"] = "random"
    group = group_of(tmp_path, *records)
    assert equal_terms.half_the_work(group) is None and not equal_terms.standings(group)
    specs, _ = drawn(group)
    assert not {"sparsity", "macs", "ffn-macs", "time-0"} & set(specs) and "maps" in specs
    assert not any(row.fronts for row in group.rows) and len(tables.comparison(group).rows) == 4


@pytest.mark.parametrize("value", [1e299, 1e200, 1e25])
def test_figures_of_any_size_stop_nothing(tmp_path, value):
    """Before: squares of a perplexity beyond 1e154 ended the report."""
    records = [
        made(m, s, perplexity=value * (1 + seed), seed=seed)
        for m in ("teal", "wina")
        for s in (0.4, 0.6)
        for seed in (0, 1)
    ]
    group = group_of(tmp_path, *records)
    best = equal_terms.half_the_work(group)
    assert (best is None) == (value > equal_terms.BEYOND)
    assert "sparsity" in drawn(group)[0] and all(
        len(cell) < 40 for row in tables.comparison(group).rows for cell in row
    )


@pytest.mark.parametrize("values", [[0.0, 5.0], [-1.0, 100.0]])
def test_what_has_no_logarithm_is_drawn_without(values):
    assert "type" not in charts.quality_scale(values).to_dict()
