"""Claims are data that records decide: each criterion on constructed records, each shipped claim on its own."""

import contextlib
import copy
import math
import re
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_module

import sparsebench.conf
from sparsebench import config
from sparsebench.config.compose import to_dict
from sparsebench.config.identity import digest
from sparsebench.measure import uncertainty
from sparsebench.report import charts, claims, page
from sparsebench.report.claims import OPEN, REFUTED, REPRODUCED, UNTESTABLE, parsed, verdicts
from sparsebench.report.rows import collect, make_row
from tests.helpers import laid, made

ROOT = Path(__file__).parents[2]
FOLDER = Path(sparsebench.conf.__path__[0]) / "experiment" / "claims"
SHIPPED = claims.claims()
BETTER = {
    "method": "wina", "statement": "WINA loses less than TEAL", "published": "65 against 61",
    "source": {"paper": "arXiv 1", "where": "Table 1", "seen": "text"},
    "setting": {"models": ["llama2-7b"], "data": "tasks", "metric": "accuracy", "with": {"method.prompt": "p99"}},
    "sides": {"wina": {"where": {"method.name": "wina", "method.sparsity": 0.5}},
              "teal": {"where": {"method.name": "teal"}, "vary": ["method.sparsity"]}},
    "tests": [{"measure": "loss", "of": "wina", "than": "teal", "along": "sparsity", "below": 0}],
}  # fmt: skip
PLAIN = {**BETTER, "sides": {"wina": {"where": {"method.name": "wina"}}, "teal": {"where": {"method.name": "teal"}}},
         "tests": [{"measure": "loss", "of": "wina", "than": "teal", "below": 0}]}  # fmt: skip
TEXT = np.random.default_rng(0).normal(2.3, 0.3, 40)  # NLL per token of each window by the dense model


def pieces(losses):
    places = np.arange(len(losses))
    return uncertainty.Pieces(places, places, np.full(len(losses), 100), 100 * losses)


def run(method, losses=None, spread=0.0, **changes):
    """A record whose sparse model adds `losses` nats to every window, give or take `spread`."""
    record = made(method, **changes)
    if losses is not None:
        dense = pieces(TEXT)
        sparse = pieces(TEXT + losses + spread * np.random.default_rng(sum(map(ord, method))).normal(0, 1, len(TEXT)))
        metric = record["quality"]["perplexity"]
        metric |= {
            "dense": math.exp(dense.mean),
            "sparse": math.exp(sparse.mean),
            "losses": uncertainty.kept(dense, sparse),
        }
    return record


def lines(node, *records):
    return verdicts([make_row(Path("x"), r) for r in records], [parsed("made", copy.deepcopy(node))])


def shown(line):
    """The measured number in percent."""
    return float(re.search(r"([+-][\d.]+)[^:]*%$", line.measured).group(1))


def verdict(node, *records):
    (line,) = lines(node, *records)
    return line.verdict, line.why


# ---------------------------------------------------------------------------------------------------------------------
# What a criterion answers


def test_a_clear_difference_decides_either_way():
    (line,) = lines(PLAIN, run("wina", 0.1), run("teal", 0.2))
    assert line.verdict == REPRODUCED and line.holds == "40 windows or examples"
    assert shown(line) == pytest.approx(100 * math.expm1(-0.1), abs=1e-3)
    assert verdict(PLAIN, run("wina", 0.2), run("teal", 0.1)) == (REFUTED, "")


def test_a_difference_within_its_error_decides_nothing():
    told, why = verdict(PLAIN, run("wina", 0.10, spread=0.5), run("teal", 0.12, spread=0.5))
    assert told == OPEN and why == "within 2.1 standard errors of the bound"  # 40 windows


def test_the_error_is_the_paired_one():
    """It is that of the differences window by window, far below the spread of the text itself."""
    rng = np.random.default_rng(3)
    change = rng.normal(0, 0.01, 40)
    a, b = run("wina", 0.1), run("teal", 0.1)
    sparse = pieces(TEXT + 0.1 + change)
    a["quality"]["perplexity"]["losses"] = uncertainty.kept(pieces(TEXT), sparse)
    (line,) = lines(PLAIN, a, b)
    value, error = map(float, re.search(r"([+-][\d.]+) ± ([\d.]+) %", line.measured).groups())
    assert value == pytest.approx(100 * math.expm1(change.mean()), abs=0.01)
    assert error == pytest.approx(100 * change.std(ddof=1) / math.sqrt(40), rel=0.1)
    assert uncertainty.perplexities(pieces(TEXT), sparse)["sparse_stderr"] / math.exp(sparse.mean) > 10 * error / 100


def test_one_run_without_kept_losses_decides_nothing():
    told, why = verdict(PLAIN, made("wina", perplexity=11), made("teal", perplexity=12))
    assert told == OPEN and why.startswith("no standard error is known (one run")


def test_few_seeds_need_more_standard_errors():
    """Three seeds: Student's t with two degrees of freedom, 4.5 errors for the sureness of 2."""

    def seeds(*values):
        return [made("wina", perplexity=v, seed=i) for i, v in enumerate(values)]

    teal = [made("teal", perplexity=12, seed=i) for i in range(3)]
    told, why = verdict(PLAIN, *seeds(11.7, 11.8, 11.95), *teal)
    assert told == OPEN and why == "within 4.5 standard errors of the bound"
    (line,) = lines(PLAIN, *seeds(11.7, 11.72, 11.74), *teal)
    assert line.verdict == REPRODUCED and line.holds == "3 seeds, not the test set"
    told, why = verdict(PLAIN, *seeds(11.7, 11.72), *[made("teal", perplexity=12, seed=i) for i in (2, 3)])
    assert (told, why) == (UNTESTABLE, "the sides have no seed in common")


def test_a_curve_is_read_where_the_other_side_lies_and_never_outside():
    teal = [run("teal", loss, sparsity=s) for s, loss in ((0.4, 0.10), (0.6, 0.30))]
    (line,) = lines(BETTER, run("wina", 0.15), *teal)
    assert line.verdict == REPRODUCED and "at equal measured sparsity" in line.measured
    assert shown(line) == pytest.approx(100 * math.expm1(0.15 - 0.2), abs=1e-3)  # half way from 0.1 to 0.3
    told, why = verdict(BETTER, run("wina", 0.15), *(run("teal", 0.3, sparsity=s) for s in (0.55, 0.6)))
    assert told == UNTESTABLE and why == "teal was run from 55.0% to 60.0% of measured sparsity, not at 50.0%"


def test_a_test_of_one_side_against_a_bound_or_the_dense_model():
    node = {**PLAIN, "tests": [{"measure": "loss", "of": "wina", "than": "dense", "below": 0.1}]}
    assert verdict(node, run("wina", 0.05), run("teal", 0.0))[0] == REPRODUCED
    assert verdict(node, run("wina", 0.15), run("teal", 0.0))[0] == REFUTED
    node["tests"] = [{"measure": "macs.sparse / macs.dense", "name": "products", "of": "wina", "above": 0.4}]
    (line,) = lines(node, run("wina", sparsity=0.5), run("teal"))
    assert (line.verdict, line.measured, line.holds) == (REPRODUCED, "products of wina: 50 %", "a count")


def test_all_tests_must_hold_and_one_refutes():
    node = {**PLAIN, "tests": [{"measure": "loss", "of": "wina", "than": "teal", "below": b} for b in (0, -0.5)]}
    assert verdict(node, run("wina", 0.1), run("teal", 0.2))[0] == REFUTED
    node["tests"][1] = {"measure": "extra.share", "of": "wina", "above": 0}
    assert verdict(node, run("wina", 0.1, extra={"share": 0.2}), run("teal", 0.2))[0] == OPEN  # one run, no error known


def test_times_count_only_on_a_quiet_machine():
    node = {**PLAIN, "tests": [{"measure": "speedup", "of": "wina", "above": 1.2}]}

    def timed(**env):
        record = made("wina")
        samples = [1 + 0.01 * (i % 5) for i in range(40)]
        record["latency"]["decode"] |= {
            "dense": {"median_ms": 1.02, "samples_ms": [1.3 * s for s in samples]},
            "sparse": {"median_ms": 1.0, "samples_ms": samples[::-1]},
        }
        record["env"] |= env
        return record

    assert verdict(node, timed(), made("teal"))[0] == REPRODUCED
    busy = timed(load_average=[7.0, 1, 1], cores=2)
    assert verdict(node, busy, made("teal")) == (UNTESTABLE, "the machine was too busy for its times to count")


def test_shape_bias_has_the_error_of_its_answers():
    def counts(shape, texture):
        return {"shape_bias": shape / (shape + texture), "shape_answers": shape, "texture_answers": texture}

    node = {**PLAIN, "tests": [{"measure": "shape_bias", "of": "wina", "than": "dense", "above": 0}]}
    both = {"shape_bias": {"dense": counts(181, 575), "sparse": counts(277, 108)}}  # AlexNet, published
    (line,) = lines(node, made("wina", extra=both), made("teal"))
    assert line.verdict == REPRODUCED and line.measured == "shape bias of wina over dense: +48 ± 3 points"
    few = {"shape_bias": {"dense": counts(3, 9), "sparse": counts(4, 8)}}
    assert verdict(node, made("wina", extra=few), made("teal"))[0] == OPEN


# ---------------------------------------------------------------------------------------------------------------------
# Which runs it is asked of


def elsewhere(record, name, parameters):
    record["config"]["model"] = {**record["config"]["model"], "name": name}
    record["model"] = {**record["model"], "num_parameters": parameters}
    return record


def test_a_toy_and_a_real_model_have_a_line_each():
    toy = [elsewhere(run(m, loss), "llama-tiny", 3e6) for m, loss in (("wina", 0.1), ("teal", 0.2))]
    real = [elsewhere(run(m, loss), "smollm2-135m", 1e8) for m, loss in (("wina", 0.3), ("teal", 0.2))]
    actual = lines(PLAIN, *real, *toy)
    assert [(each.model, each.verdict) for each in actual] == [
        ("llama-tiny (toy) on pystdlib", REPRODUCED), ("smollm2-135m on pystdlib", REFUTED),
    ]  # fmt: skip
    assert actual[1].differs == (
        "model instead of llama2-7b", "data pystdlib in windows of 512 instead of tasks", "perplexity instead of accuracy",
        "prompt=all instead of p99",
    )  # fmt: skip
    assert claims.in_short(actual) == ("reproduced (llama-tiny)", "not reproduced (smollm2-135m)")


def test_settings_that_a_claim_does_not_name_are_never_mixed():
    """Runs of a side that differ in a setting have a line for each of its values; a side without the setting joins both."""
    greedy, uniform = run("teal", 0.05), run("teal", 0.2)
    greedy["config"]["method"]["allocation"], uniform["config"]["method"]["allocation"] = "greedy", "uniform"
    actual = {each.setting: each.verdict for each in lines(PLAIN, run("wina", 0.1), greedy, uniform)}
    assert actual == {"allocation=greedy": REFUTED, "allocation=uniform": REPRODUCED}
    wina = run("wina", 0.1)
    wina["config"]["method"]["allocation"] = "greedy"
    (line,) = lines({**PLAIN, "equal": ["method.allocation"]}, wina, greedy, uniform)
    assert line.verdict == REFUTED


def test_of_one_run_made_twice_the_latest_counts():
    later = run("teal", 0.05, started_at="2026-02-01T00:00:00+00:00")
    assert verdict(PLAIN, later, run("wina", 0.1), run("teal", 0.2))[0] == REFUTED


def test_runs_of_other_terms_are_never_compared():
    far = run("teal", 0.2)
    far["env"] = {**far["env"], "cpu": "Other CPU"}
    for other in (far, run("teal", 0.2, policy="p99"), elsewhere(run("teal", 0.2), "other", 1e8)):
        assert verdict(PLAIN, run("wina", 0.1), other) == (UNTESTABLE, "not run")
    assert verdict({**PLAIN, "needs": "a 7B model"}) == (UNTESTABLE, "needs a 7B model")


def test_models_trained_here_for_each_seed_are_one_model():
    records = []
    for seed in range(3):
        for method, loss in (("wina", 11.0), ("teal", 12.0)):
            record = made(method, perplexity=loss + 0.001 * seed * (method == "teal"), seed=seed)
            record["config"]["model"]["weights"] = "scratch"
            record["model"] = {"source": f"states/scratch-{seed}.safetensors"}
            records.append(record)
    (line,) = lines(PLAIN, *records)
    assert line.verdict == REPRODUCED and line.holds == "3 seeds, not the test set"


def test_runs_without_a_known_error_give_way_to_those_with_one():
    far = [made(m, perplexity=p) for m, p in (("wina", 11), ("teal", 12))]
    for record in far:
        record["env"] = {**record["env"], "cpu": "Other CPU"}
    assert [each.verdict for each in lines(PLAIN, *far, run("wina", 0.1), run("teal", 0.2))] == [REPRODUCED]


@pytest.mark.parametrize(
    "change, said",
    [({"sides": {}}, "tests name the side"), ({"extra": 1}, "must have the keys .* got \\['extra'\\]"),
     ({"tests": [], "needs": None}, "must say what it needs"), ({"source": {"paper": "x"}}, "source must have paper, where, seen"),
     ({"tests": [{"measure": "loss", "of": "wina"}]}, "either below or above"),
     ({"tests": [{"measure": "loss", "of": "wina", "along": "time", "below": 0}]}, "along must be one of sparsity, work, ffn_work")],
)  # fmt: skip
def test_a_claim_that_is_written_wrongly_is_named(change, said):
    with pytest.raises(ValueError, match=f"claims/mine: .*{said}"):
        parsed("mine", {**PLAIN, **change})
    with pytest.raises(ValueError, match="claims/mine: claim must have the keys"):
        parsed("mine", None)


# ---------------------------------------------------------------------------------------------------------------------
# The claims that are shipped


def test_headline_claims_of_every_paper():
    papers = Counter(re.sub(r"v\d$", "", each.source["paper"]) for each in SHIPPED)
    least = {"2408.14690": 2, "2504.19449": 2, "2505.19427": 2, "2507.01299": 1, "2404.08763": 1, "2506.20194": 2,
             "2402.13516": 3, "2402.06126": 2, "2310.04361": 2, "2110.01786": 1, "2405.19652": 3, "2210.06313": 1,
             "2407.10969": 1, "2411.02335": 1, "2310.18894": 1}  # fmt: skip
    assert all(papers[f"arXiv {paper}"] >= count for paper, count in least.items())
    assert len({each.id for each in SHIPPED}) == len({each.statement for each in SHIPPED}) == len(SHIPPED) >= 20


def test_every_method_with_a_paper_has_a_claim():
    sources = [p.stem for p in (ROOT / "sparsebench" / "methods").iterdir() if not p.name.startswith("_")]
    assert {each.method for each in SHIPPED} == set(sources) - {"base", "dense"}
    assert all((ROOT / "docs" / "methods" / f"{each.method}.md").exists() for each in SHIPPED)


def test_every_claim_is_an_experiment_that_can_run(tmp_path):
    """Each composes with the first value of every axis, and its settings are sound."""
    for file in ("images/a/1.png", "images/b/1.png", "cues/a1-b1.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    given = {"shape_bias": ["model.weights=random", f"dataset.path={tmp_path / 'images'}",
                            f"eval.classifier.cue_conflict={tmp_path / 'cues'}"]}  # fmt: skip
    with initialize_config_module("sparsebench.conf", version_base="1.3"):
        for claim in SHIPPED:
            text = (FOLDER / f"{claim.id}.yaml").read_text()
            axes = yaml.safe_load(text).get("hydra", {}).get("sweeper", {}).get("params", {})
            unknown = axes.keys() - {"method"}
            for method in axes["method"].split(",") if unknown and "method" in axes else [None]:
                chosen = [f"method={method}"] if method else []
                composed = to_dict(
                    compose("config", [f"experiment=claims/{claim.id}", *chosen, *given.get(claim.id, [])])
                )
                unknown -= set_first(composed, axes)
                config.build_settings(composed)
                assert "claim" not in composed
                if not unknown:
                    break
            assert not unknown, f"{claim.id}: no method has {unknown}"
            assert f"sparsebench -m experiment=claims/{claim.id}" in text.splitlines()[1]


def test_the_documented_example_is_a_claim():
    text = (ROOT / "docs" / "extending.md").read_text().partition("## A published claim")[2]
    node = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S).group(1))
    assert parsed("stat_topk", node["claim"]).command == "sparsebench -m experiment=claims/stat_topk"


def set_first(composed, axes):
    """Give each axis its first value where the configuration has the key; returns the keys it has."""
    known = set()
    for key, values in axes.items():
        *path, leaf = key.split(".")
        node = composed
        for part in path:
            node = node[part]
        if leaf in node and key != "method":
            node[leaf] = yaml.safe_load(str(values).split(",")[0])
            known.add(key)
    return known


def test_the_report_prints_the_verdicts(tmp_path):
    records = [
        run(m, loss, sparsity=s)
        for s, extra in ((0.5, 0.0), (0.65, 0.1))
        for m, loss in (("wina", extra), ("teal", extra + 0.1))
    ]
    for record in records:
        record["config"]["method"] |= {"allocation": "uniform", "rotate": True}
        record["config_hash"] = digest(record["config"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(charts, "of_group", return_value=({}, {})))
        written, _ = page.build(collect([laid(tmp_path, *records)]), "title")
    text = "\n".join(written.markdown)
    assert "## Published claims" in text and "| WINA loses less than TEAL where both drop half" in text
    assert claims.tested([make_row(Path("x"), made("dense"))]) == [] and claims.table([]) is None
