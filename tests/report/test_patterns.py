"""The chart of quality against N:M: order of the patterns, one line per score, seeds together; other methods draw none."""

from sparsebench.report import patterns
from sparsebench.report.groups import groups
from sparsebench.report.rows import collect
from tests.helpers import laid, made


def ladder(n, m, perplexity, score="abs", seed=0):
    content = made("nm", 0.5, perplexity, seed=seed)
    content["config"]["method"] |= {"n": n, "m": m, "score": score, "correction": "none", "coverage": 1.0}
    content["config_hash"] = f"{n}{m}{score}{seed}"
    return content


def drawn(folder, *records):
    (group,) = groups(collect([laid(folder, *records)]).finished)
    return patterns.ladder(group)


def test_patterns_from_narrow_to_unstructured(tmp_path):
    spec = drawn(
        tmp_path, ladder(None, None, 11.0), ladder(None, 16, 12.0), ladder(2, 4, 15.0), ladder(2, 4, 16.0, seed=1),
        ladder(2, 4, 14.0, "amber"), ladder(None, None, 10.5, "amber"), made("teal", 0.5),
    )  # fmt: skip
    (cells,) = spec["datasets"].values() if "datasets" in spec else [spec["data"]["values"]]
    assert [(c["pattern"], c["series"], c["quality"]) for c in cells] == [
        ("2:4", "abs", 15.5), ("2:4", "amber", 14.0), ("8:16", "abs", 12.0), ("unstructured", "abs", 11.0),
        ("unstructured", "amber", 10.5),
    ]  # fmt: skip
    assert cells[0]["low"] < 15.5 < cells[0]["high"]
    assert spec["layer"][0]["encoding"]["x"]["sort"] == ["2:4", "8:16", "unstructured"]


def test_one_pattern_is_no_ladder(tmp_path):
    assert drawn(tmp_path / "a", ladder(2, 4, 15.0), ladder(2, 4, 14.0, "amber")) is None
    assert drawn(tmp_path / "b", made("teal", 0.5), made("teal", 0.4)) is None
