"""What every data set gives to a run: three splits that never mix, and an account of them for the record."""

from __future__ import annotations

from typing import Any, Protocol

SPLITS = ("fit", "dev", "test")


class Data(Protocol):
    """Methods fit on `fit`, may choose on `dev`, and are judged on `test`."""

    fit: Any
    dev: Any
    test: Any
    kind: str  # language, vision or classification

    def check_disjoint(self) -> None:
        """Prove that no content stands in two splits. Raises ValueError naming one that does."""

    def describe(self) -> dict[str, Any]:
        """For the record: sizes and a fingerprint of each split."""
