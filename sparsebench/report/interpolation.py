"""Reading a curve between its measured points, and what each of them weighs in the figure read there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator


def monotone(places: Sequence[float], values: Sequence[float], x: float) -> tuple[float, list[float]]:
    """The figure at `x` by a monotone cubic (PCHIP), and its derivative by each of `values`.

    places: rising; `x` lies between the first and the last. The figure is smooth in the values almost everywhere, so
    central differences give the derivatives.
    """
    xs, ys = np.asarray(places, float), np.asarray(values, float)
    step = 1e-5 * (float(np.ptp(ys)) or 1.0)

    def at(y: np.ndarray) -> float:
        return float(PchipInterpolator(xs, y)(x))

    return at(ys), [(at(ys + m) - at(ys - m)) / (2 * step) for m in np.eye(len(ys)) * step]
