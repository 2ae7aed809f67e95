"""One bisection for every search of an operating point: PPL-p %, critical sparsity, thresholds in a budget of accuracy."""

from __future__ import annotations

from collections.abc import Callable


def furthest(
    passes: Callable[[float], bool], passed: float, failed: float, close: Callable[[float, float], bool]
) -> float:
    """The value furthest from `passed` towards `failed` that passes, as far as halving the way between them finds it.

    passed: a value that passes; failed: one that does not, or the end of the range, which is taken to fail. It ends where
    close(passed, failed) says that what is left between the two does not matter.
    """
    while not close(passed, failed):
        middle = (passed + failed) / 2
        if passes(middle):
            passed = middle
        else:
            failed = middle
    return passed
