"""Comparisons at equal terms: interpolation on constructed curves, a difference that is known, groups that must refuse."""

import math

import numpy as np
import pytest

from sparsebench.measure.uncertainty import packed
from sparsebench.report import equal_terms, tables
from sparsebench.report.equal_terms import SPARSITY, WORK, standing
from sparsebench.report.groups import groups
from sparsebench.report.rows import collect
from tests.helpers import laid, made, vision, with_losses

PIECES = 40
TEXT = np.random.default_rng(0).normal(2.3, 0.4, PIECES)  # NLL of the dense model


def group_of(folder, *records):
    (group,) = groups(collect([laid(folder, *records)]).finished)
    return group


def run(method, sparsity, nll, **changes):
    """A run whose sparse model has these losses [P], doing 1 - sparsity of the work."""
    return with_losses(made(method, sparsity, **changes), TEXT, nll)


def by_hand(influence):
    """Standard error of a sum over independent pieces."""
    return math.sqrt(PIECES / (PIECES - 1) * np.square(influence).sum())


def test_a_straight_curve_is_met_exactly_between_its_knots(tmp_path):
    """Perplexity exp(2 + s), which is straight on the scale of its logarithm."""
    group = group_of(tmp_path, *(made(sparsity=s, perplexity=math.exp(2 + s)) for s in (0.2, 0.45, 0.6, 0.8)))
    for target in (0.25, 0.4, 0.5, 0.65):
        (point,) = standing(group, SPARSITY, target).ranked
        assert point.value == pytest.approx(math.exp(2 + target)) == point.linear
        assert point.between[0] < target < point.between[1]
    (half,) = standing(group, WORK, 0.5).ranked
    assert half.value == pytest.approx(math.exp(2.5))


def test_the_curve_neither_overshoots_nor_leaves_the_range(tmp_path):
    """Flat, then a step: a cubic spline would dip below the flat part."""
    values = {0.2: 10.0, 0.3: 10.0, 0.4: 10.0, 0.6: 30.0, 0.7: 30.0}
    group = group_of(tmp_path, *(made(sparsity=s, perplexity=p) for s, p in values.items()))
    curve = equal_terms.curves(group, SPARSITY)[0]
    read = [equal_terms.at(curve, SPARSITY, x).value for x in np.linspace(0.2, 0.7, 101)]
    assert min(read) >= 10 - 1e-9 and max(read) <= 30 + 1e-9 and read == sorted(read)
    for outside in (0.1, 0.75):
        point = equal_terms.at(curve, SPARSITY, outside)
        assert math.isnan(point.value) and point.problem == "measured from 20.0% to 70.0% measured sparsity"


def test_a_difference_is_the_one_between_the_pieces(tmp_path):
    """Both methods measured at half the work: the paired error is that of the differences piece by piece."""
    noise = np.random.default_rng(1)
    teal, wina = TEXT + 0.10 + noise.normal(0, 0.01, PIECES), TEXT + 0.18 + noise.normal(0, 0.01, PIECES)
    group = group_of(tmp_path, run("teal", 0.5, teal), run("wina", 0.5, wina))
    half = equal_terms.half_the_work(group)
    assert [p.series for p in half.ranked] == ["teal", "wina"] and half.target == 0.5
    (comparison,) = half.comparisons
    a, b = math.exp(teal.mean()), math.exp(wina.mean())
    expected = by_hand((b * (wina - wina.mean()) - a * (teal - teal.mean())) / PIECES)
    assert comparison.difference == pytest.approx(b - a) and comparison.paired
    assert comparison.stderr == pytest.approx(expected, rel=1e-4)
    assert half.ranked[0].stderr > 5 * comparison.stderr  # what pairing removes
    assert comparison.verdict == "a real difference" and comparison.rests_on == "paired over 40 windows, one seed"
    assert comparison.sentence == (
        f"at 50 % of the MACs wina is worse than teal by {b - a:.2f} ± {expected:.2f} perplexity on llama-tiny, pystdlib"
    )
    lead, lines, _ = tables.answer(group, half)
    assert lead.startswith("At 50 % of the MACs teal has the best perplexity: ") and lead.endswith("a real difference.")
    assert len(lines) == 1 and lines[0].endswith("(a real difference; paired over 40 windows, one seed)")


def test_an_interpolated_figure_has_the_error_of_its_knots_together(tmp_path):
    """Two knots: halfway between them the losses are averaged, piece by piece."""
    noise = np.random.default_rng(2)
    low, high = TEXT + 0.1 + noise.normal(0, 0.1, PIECES), TEXT + 0.3 + noise.normal(0, 0.1, PIECES)
    group = group_of(tmp_path, run("teal", 0.4, low), run("teal", 0.6, high))
    (point,) = standing(group, SPARSITY, 0.5).ranked
    middle = (low + high) / 2
    assert point.value == pytest.approx(math.exp(middle.mean()), rel=1e-6)
    assert point.stderr == pytest.approx(by_hand(point.value * (middle - middle.mean()) / PIECES), rel=1e-4)
    above, error = standing(group, SPARSITY, 0.5).above_dense(point)
    dense = math.exp(TEXT.mean())
    paired = (point.value * (middle - middle.mean()) - dense * (TEXT - TEXT.mean())) / PIECES
    assert above == pytest.approx(point.value - dense, rel=1e-6) and error == pytest.approx(by_hand(paired), rel=1e-4)


def test_seeds_add_their_spread(tmp_path):
    records = [run("teal", 0.5, TEXT + shift, seed=seed) for seed, shift in enumerate((0.1, 0.2, 0.3))]
    (point,) = standing(group_of(tmp_path, *records), SPARSITY, 0.5).ranked
    of_seeds = math.exp(TEXT.mean() + 0.2) * 0.1 / math.sqrt(3)
    of_text = by_hand(point.value * (TEXT - TEXT.mean()) / PIECES)
    assert point.seeds == 3 and point.stderr == pytest.approx(math.hypot(of_text, of_seeds), rel=1e-3)


def test_noise_is_not_called_a_difference(tmp_path):
    change = np.random.default_rng(3).normal(0, 0.2, PIECES)
    group = group_of(tmp_path, run("teal", 0.5, TEXT + 0.1), run("wina", 0.5, TEXT + 0.1 + change))
    (comparison,) = standing(group, WORK, 0.5).comparisons
    assert comparison.verdict == "not told apart" and "are not told apart" in comparison.sentence


def test_without_losses_and_seeds_nothing_is_called_real(tmp_path):
    group = group_of(tmp_path, made("teal", perplexity=11.0), made("wina", perplexity=19.0))
    (comparison,) = standing(group, WORK, 0.5).comparisons
    assert comparison.stderr is None and comparison.verdict.startswith("unknown")
    assert "±" not in comparison.sentence
    assert "whether that is real is unknown" in tables.answer(group, standing(group, WORK, 0.5))[0]


def test_a_difference_over_other_text_is_not_paired(tmp_path):
    other = with_losses(made("wina", 0.5), TEXT[:30], TEXT[:30] + 0.3)
    group = group_of(tmp_path, run("teal", 0.5, TEXT + 0.1), other)
    (comparison,) = standing(group, WORK, 0.5).comparisons
    assert not comparison.paired and comparison.rests_on == "not paired, one seed"
    assert comparison.stderr == pytest.approx(math.hypot(comparison.better.stderr, comparison.worse.stderr))


@pytest.mark.parametrize("broken", [{"tokens": "AAAA"}, {"sparse": "not base64!"}, {"window": None}, {"tokens": ""}])
def test_losses_that_cannot_be_read_count_as_none(tmp_path, broken):
    record = run("teal", 0.5, TEXT + 0.1)
    record["quality"]["perplexity"]["losses"] |= broken
    (point,) = standing(group_of(tmp_path, record), WORK, 0.5).ranked
    assert point.evidence is None and point.stderr is None and point.value > 10


def test_a_group_that_must_refuse_says_why(tmp_path):
    """Disjoint ranges, one setting alone, two settings at one place, nothing counted: no ranking, and the reasons."""
    uncounted = made("cats", 0.5)
    uncounted["macs"] = None
    twice = [made("rsparse", 0.5, perplexity=p, seed=0) for p in (11.0, 15.0)]
    for record, rank in zip(twice, (8, 16), strict=True):
        record["config"]["method"]["rank"] = rank
        record["config_hash"] = str(rank) * 32
    group = group_of(
        tmp_path, made("teal", 0.2), made("teal", 0.4), made("wina", 0.6), made("wina", 0.8), made("larosa", 0.7),
        uncounted, *twice,
    )  # fmt: skip
    refused = {p.series: p.problem for p in standing(group, WORK, 0.5).refused}
    assert refused == {
        "teal": "measured from 60.0% to 80.0% of the MACs", "wina": "measured from 20.0% to 40.0% of the MACs",
        "larosa": "one setting, at 30.0% of the MACs", "cats": "no MACs were counted",
        "rsparse": "two settings at 50.0% of the MACs: not one curve",
    }  # fmt: skip
    assert not standing(group, WORK, 0.5).ranked and not standing(group, WORK, 0.5).comparisons
    shown = tables.equal_terms([s for s in equal_terms.standings(group) if s.axis is SPARSITY])
    assert [shown.rows[0][0], shown.rows[0][1]] == ["cats", "–"] and shown.rows[0][-1].startswith("one setting")


def test_noisy_and_simulated_times_are_no_terms(tmp_path):
    noisy = made("wina", 0.5)
    noisy["latency"]["noisy"] = True
    group = group_of(tmp_path, made("teal", 0.5, speedup=2.0), noisy, made("cats", 0.5, speedup=None))
    (axis,) = [a for a in equal_terms.axes(group.rows) if a.name == "time"]
    at_half = standing(group, axis, 0.5)
    assert [p.series for p in at_half.ranked] == ["teal"]
    assert all(p.problem.startswith("no quiet time with a kernel that skips on Test CPU") for p in at_half.refused)


def test_accuracy_is_compared_in_points_over_the_same_examples(tmp_path):
    """Of 200 examples `a` has 20 wrong and `b` these and 10 more: 5 points, by McNemar's differences."""
    records = []
    for method, wrong in (("a", 20), ("b", 30)):
        right = np.arange(200) >= wrong
        record = vision(float(right.mean()), method)
        record["quality"]["accuracy"]["protocol"] = {"split": "test", "examples": 200}
        record["quality"]["accuracy"]["losses"] = {
            f"{side}_right": packed(right, "bits") for side in ("dense", "sparse")
        }
        record["macs"] = {"dense": 100, "sparse": 50}
        record["config_hash"] = method * 64
        records.append(record)
    (comparison,) = standing(group_of(tmp_path, *records), WORK, 0.5).comparisons
    lost = np.concatenate([np.ones(10), np.zeros(190)])
    assert comparison.difference == pytest.approx(0.05)
    assert comparison.stderr == pytest.approx(lost.std(ddof=1) / math.sqrt(200))
    assert comparison.sentence.startswith("at 50 % of the MACs b is worse than a by 5.0 ± 1.5 points of accuracy")
