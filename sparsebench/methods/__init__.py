"""One file per method. A method is a dataclass whose fields are the keys of its YAML, with

kinds             kinds of model it takes
fit(loaded, data, work) -> State trains or calibrates on data.fit, may choose on data.dev, never sees data.test
apply(module, state, work)       swaps modules in place and returns the sparse model; the only way to obtain it

and, from `Method` where it has nothing else to say,

operating_point                  names of the fields that only `apply` uses: a sweep over them fits once
requested                        the sparsity asked for, or None where the method has no such number
problems(settings)               lines about settings that can't work together
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sparsebench.hardware import Hardware


@dataclass
class Work:
    """What a fit may use beside model and data."""

    seed: int
    hardware: Hardware
    output_dir: Path
    folder: Path  # this fit's own, for checkpoints; survives a crash
    batch_size: int
    log: Callable[[dict[str, Any]], None]  # one row of history, to W&B and the run's log


class Method:
    """What a method says of itself unless it says otherwise."""

    operating_point: ClassVar[tuple[str, ...]] = ()

    @property
    def requested(self) -> float | None:
        """The setting `sparsity`, where there is one."""
        return getattr(self, "sparsity", None)

    def problems(self, settings: Any) -> list[str]:
        return []
