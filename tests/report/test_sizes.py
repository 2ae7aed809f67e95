"""Figures against the model's size: what is measured, what is published, and what never stands on one axis."""

import pytest

from sparsebench.report import page, sizes
from sparsebench.report.groups import groups
from sparsebench.report.rows import collect
from tests.helpers import laid, made


def run(model, parameters, sparsity, perplexity, tokens=1000, policy="all", weights="pretrained"):
    content = made("teal", sparsity, perplexity, policy=policy, speedup=None)
    content["config"]["model"] |= {"name": model, "weights": weights}
    content["model"] = {"source": model, "name": model, "num_parameters": parameters}
    content["quality"]["perplexity"]["protocol"] = {
        **content["quality"]["perplexity"]["protocol"], "tokens": tokens, "fingerprint": f"{model}{tokens}",
    }  # fmt: skip
    content["config_hash"] = f"{hash((model, sparsity, tokens, policy)) & 0xFFFFFFFF:064x}"
    return content


def points(folder, *contents):
    """Cells of the charts by policy, those of our own."""
    charts = sizes.kept_at_half(groups(collect([laid(folder, *contents)]).finished))
    return {
        name.rpartition("-")[2]: [v for v in spec["data"]["values"] if v["source"] == "measured"]
        for name, spec in charts.items()
    }, charts


def test_names_tell_sizes():
    assert sizes.nominal("llama2-7b") == ("llama2", 7e9) and sizes.nominal("qwen2.5-0.5b") == ("qwen2.5", 0.5e9)
    assert sizes.nominal("gemma3-270m") == ("gemma3", 270e6) and sizes.nominal("a model") is None


def test_quality_at_half_is_read_between_levels_and_never_beyond(tmp_path):
    """The larger model has no level at half, but levels around it; a third one ends before half."""
    cells, charts = points(
        tmp_path, run("small", 1e8, 0.5, 20.0), run("large", 1e9, 0.4, 12.0), run("large", 1e9, 0.6, 15.0),
        run("short", 2e9, 0.2, 10.1), run("short", 2e9, 0.4, 11.0),
    )  # fmt: skip
    by_model = {c["model"]: c["value"] for c in cells["all"]}
    assert by_model == pytest.approx({"small": 0.5, "large": 10 / (12 * 15) ** 0.5})
    published = {c["model"]: c for c in charts["kept-at-half-all"]["data"]["values"] if c["source"] == "published"}
    assert (
        published["llama2-70b"]["value"] == pytest.approx(3.12 / 3.50) and published["llama2-70b"]["parameters"] == 70e9
    )
    assert "llama2-13b" not in published and "mistral-7b" not in published  # found in no source that could be read
    assert {c["series"] for c in published.values()} == {"teal, published"}


def test_policies_stay_apart_the_longest_text_counts_and_random_weights_are_left_out(tmp_path):
    cells, _ = points(
        tmp_path, run("small", 1e8, 0.5, 20.0, tokens=10), run("small", 1e8, 0.5, 25.0, tokens=5000),
        run("small", 1e8, 0.5, 16.0, policy="p99"), run("drawn", 1e9, 0.5, 11.0, weights="random"),
    )  # fmt: skip
    assert {policy: [c["model"] for c in own] for policy, own in cells.items()} == {"all": ["small"], "p99": ["small"]}
    assert [cells["all"][0]["value"], cells["p99"][0]["value"]] == pytest.approx([0.4, 0.625])


def test_a_model_run_in_two_number_formats_is_one_point_of_the_usual_one(tmp_path):
    rare = run("small", 1e8, 0.5, 25.0)
    rare["env"] = {**rare["env"], "hardware": {**rare["env"]["hardware"], "dtype": "float16"}}
    rare["config_hash"] = "f" * 64
    cells, _ = points(
        tmp_path, rare, run("small", 1e8, 0.5, 20.0), run("small", 1e8, 0.6, 30.0), run("large", 1e9, 0.5, 16.0)
    )
    assert [(c["series"], c["model"]) for c in cells["all"]] == [("teal", "small"), ("teal", "large")]
    assert [c["value"] for c in cells["all"]] == pytest.approx([0.5, 0.625])


def test_the_page_shows_the_figure(tmp_path):
    laid(tmp_path, run("small", 1e8, 0.5, 20.0), run("large", 1e9, 0.5, 12.0))
    written = page.write(collect([tmp_path]), tmp_path / "report", "t")
    assert "Quality kept at 50 % sparsity, prompt=all" in "".join(written.markdown)
    assert "sizes-kept-at-half-all.png" in written.pictures
