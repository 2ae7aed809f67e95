"""Figures with errors: curves and combinations against known answers."""

import math
from pathlib import Path

import numpy as np
import pytest

from sparsebench.measure.uncertainty import Pieces, packed
from sparsebench.report import quantities
from sparsebench.report.quantities import Estimate, Quantity, linear, over_seeds, read_curve
from sparsebench.report.rows import make_row
from tests.helpers import made

PLACES = np.arange(30)


def sampled(value, influence):
    return Quantity(value, Pieces(PLACES, PLACES, np.ones(30, int), np.zeros(30)), influence)


def test_a_curve_through_a_line_is_the_line():
    curve = [(x, Quantity(2 * x + 1, error=0.1)) for x in (0.1, 0.3, 0.6, 0.9)]
    for x in (0.1, 0.2, 0.5, 0.9):
        read = read_curve(curve, x)
        assert read.value == pytest.approx(2 * x + 1)
    assert read_curve(curve, 0.6).error == pytest.approx(0.1, rel=1e-4)  # at a row, that row alone


def test_a_curve_is_monotone_between_its_rows_and_has_no_outside():
    steep = [(x, Quantity(y)) for x, y in ((0.1, 0.0), (0.2, 0.0), (0.3, 1.0), (0.4, 1.0))]
    values = [read_curve(steep, x).value for x in np.linspace(0.1, 0.4, 31)]
    assert min(values) >= 0 and max(values) <= 1 and values == sorted(values)
    assert read_curve(steep, 0.096).value == 0  # a row within NEAR stands for it
    assert read_curve(steep, 0.42) is None and read_curve([], 0.1) is None
    assert read_curve([(0.5, Quantity(3.0))], 0.5005).value == 3 and read_curve([(0.5, Quantity(3.0))], 0.52) is None


def test_paired_parts_cancel_in_a_difference():
    noise = np.random.default_rng(0).normal(0, 0.01, 30)
    a, b = sampled(1.0, noise), sampled(0.4, noise)
    assert linear([a, b], [1, -1], 0.6).variance == 0 < a.variance
    other = Quantity(0.4, Pieces(PLACES + 1, PLACES, np.ones(30, int), np.zeros(30)), noise)
    assert linear([a, other], [1, -1], 0.6).variance is None  # other windows: nothing to pair


def test_a_curve_carries_the_parts_of_its_rows():
    noise = np.random.default_rng(1).normal(0, 0.01, 30)
    middle = read_curve([(0.0, sampled(0.0, noise)), (1.0, sampled(1.0, -noise))], 0.5)
    assert middle.variance == pytest.approx(0.0, abs=1e-15)  # half of each cancels
    assert read_curve([(0.0, sampled(0.0, noise)), (1.0, sampled(1.0, noise))], 0.25).variance == pytest.approx(
        sampled(0, noise).variance, rel=1e-6
    )


def test_errors_of_text_and_seeds_add_up_in_squares():
    noise = np.full(30, 0.0)
    noise[:2] = 0.1, -0.1
    text = sampled(0, noise).variance
    actual = over_seeds({i: sampled(v, noise) for i, v in enumerate((1.0, 1.1, 1.2))})
    assert actual.value == pytest.approx(1.1) and actual.stderr == pytest.approx(math.sqrt(text + 0.01 / 3))
    assert actual.holds == "3 seeds, 30 windows or examples"
    assert actual.freedom == pytest.approx((text + 0.01 / 3) ** 2 / (text**2 / 29 + (0.01 / 3) ** 2 / 2))
    assert over_seeds({0: Quantity(1.0)}) == Estimate(1.0, None, "one run, parts of the test set not kept")
    assert over_seeds({0: Quantity(1.0, error=0.0)}) == Estimate(1.0, 0.0, "a count")


def test_students_t_of_few_seeds():
    assert Estimate(0, 1, "").needed(2) == 2
    assert Estimate(0, 1, "", freedom=2).needed(2) == pytest.approx(4.526, abs=1e-3)
    assert Estimate(0, 1, "", freedom=1e6).needed(2) == pytest.approx(2, abs=1e-4)


def test_accuracy_is_paired_by_examples():
    right = np.array([1, 1, 0, 1, 0, 1, 1, 1, 0, 1], bool)
    losses = {f"{side}_right": packed(right, "bits") for side in ("dense", "sparse")}
    record = made("dstf", speedup=None)
    record["quality"] = {"accuracy": {"dense": 0.7, "sparse": 0.7, "higher_is_better": True, "losses": losses,
                                      "protocol": {"examples": 10}}}  # fmt: skip
    row = make_row(Path("x"), record)
    sparse, dense = quantities.quality(row), quantities.quality(row, "dense")
    assert sparse.value == pytest.approx(0.7)
    assert math.sqrt(sparse.variance) == pytest.approx(right.std(ddof=1) / math.sqrt(10))
    assert linear([sparse, dense], [1, -1], 0.0).variance == 0


def test_the_error_of_a_median():
    rng = np.random.default_rng(0)
    errors = [quantities.median_error(rng.normal(0, 1, 101)) for _ in range(200)]
    assert np.mean(errors) == pytest.approx(1.2533 / math.sqrt(101), rel=0.15)


def test_random_weights_have_no_quality():
    record = made()
    record["config"]["model"]["weights"] = "random"
    assert quantities.quality(make_row(Path("x"), record)) is None
