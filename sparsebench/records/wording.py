"""Figures in words: units, shares, changes, and no more digits than a standard error leaves."""

from __future__ import annotations

import math
from typing import Any

ROUNDING = 1e-6  # of a figure: what fp32 leaves [choice]
LARGE = 1e7  # above it a figure is written with a power of ten [choice]


def scaled(value: float | None, unit: str = "") -> str:
    """1234567 -> 1.23 M; small amounts of a unit have prefixes, too."""
    if value is None:
        return "-"
    small = ((1.0, ""), (1e-3, "m"), (1e-6, "µ")) if unit else ()
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), *small):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def duration(seconds: float) -> str:
    """3 h 18 min; 5 min 20 s; 12.3 s."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left} min" if hours else f"{minutes} min {rest} s"


def ratio(dense: float | None, sparse: float | None) -> str:
    if not dense or sparse is None:
        return "-"
    times = sparse / dense
    return f"{times:.3f}x" if abs(times) < LARGE else f"{times:.4g}x"


def rounded(value: float, stderr: float | None) -> str:
    """A figure to the digit its standard error reaches (its first, or its second where that starts with 1); 4 digits
    where it has none."""
    if not stderr or not math.isfinite(stderr) or abs(value) > LARGE:
        return f"{value:.4g}"
    return f"{value:.{digits(stderr)}f}"


def digits(stderr: float) -> int:
    """Decimals that a figure of this standard error can have."""
    first = math.floor(math.log10(stderr))
    return int(max(0, -first + (stderr / 10**first < 1.95)))


def uncertain(value: float | None, stderr: float | None, unit: str = "", sign: str = "") -> str:
    """10.98 ± 0.03, in significant digits only. An error of less than a millionth of the value (rounding) is none."""
    if value is None:
        return "-"
    if not stderr or not math.isfinite(stderr) or stderr < ROUNDING * abs(value):
        return f"{value:{sign}.4g}{unit}"
    if max(abs(value), stderr) > LARGE:
        return f"{value:{sign}.4g} ± {stderr:.2g}{unit}"
    return f"{value:{sign}.{digits(stderr)}f} ± {stderr:.{digits(stderr)}f}{unit}"


def change(name: str, metric: dict[str, Any]) -> str:
    """From dense to sparse, with its paired standard error: a ratio, of shares a difference in points."""
    if is_share(name, metric):
        stderr = metric.get("difference_stderr")
        points = 100 * (metric["sparse"] - metric["dense"])
        return uncertain(points, 100 * stderr, " points", "+") if stderr else f"{points:+.2f} points"
    if metric.get("ratio") is not None:
        return uncertain(metric["ratio"], metric.get("ratio_stderr"), "x")
    return ratio(metric["dense"], metric["sparse"])


def is_share(name: str, metric: dict[str, Any]) -> bool:
    """Whether a metric is a share of right answers, whose change is said in points: accuracy, also that of a task."""
    sides = (metric["dense"], metric["sparse"])
    return metric.get("higher_is_better", name == "accuracy") and all(v is not None and 0 <= v <= 1 for v in sides)


def in_words(name: str, metric: dict[str, Any]) -> str:
    """The sparse model's figure and the change: 10.98 ± 0.03 (1.093 ± 0.003x)."""
    mark = ", little text" if metric.get("little_text") else ""
    return f"{uncertain(metric['sparse'], metric.get('sparse_stderr'))} ({change(name, metric)}{mark})"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def gain(before: float, after: float) -> str:
    """A change of a share in points and relative to where it started."""
    relative = f" ({(after - before) / before:+.1%})" if before else ""
    return f"{100 * (after - before):+.2f} points{relative}"
