"""Figures in words."""

import pytest

from sparsebench.records.wording import duration, uncertain


@pytest.mark.parametrize(("value", "stderr", "words"), [
    (10.9812, 0.0312, "10.98 ± 0.03"), (10.9812, 0.0151, "10.981 ± 0.015"), (1234.5, 84.0, "1234 ± 84"), (0.0, 0.2, "0.0 ± 0.2"),
    (64.715200351, 2e-9, "64.72"), (5.0, 0.0, "5"), (5.0, float("nan"), "5"), (None, 1.0, "-"),
    (3.21e30, 1.5e29, "3.21e+30 ± 1.5e+29"), (1e6, 1e9, "1e+06 ± 1e+09"),
])  # fmt: skip
def test_digits_follow_the_error_and_rounding_is_none(value, stderr, words):
    assert uncertain(value, stderr) == words


@pytest.mark.parametrize(("seconds", "words"), [
    (0.5, "0.5 s"), (59.96, "60 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (11_934.2, "3 h 18 min"), (90 * 3600, "90 h 0 min"),
])  # fmt: skip
def test_long_times_are_hours_and_minutes(seconds, words):
    assert duration(seconds) == words
