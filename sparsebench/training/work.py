"""What loading or fitting may use beside model and data: seed, target, folders, batch size, a place for history."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsebench.hardware import Hardware


@dataclass
class Work:
    """The context of a fit."""

    seed: int
    hardware: Hardware
    output_dir: Path
    folder: Path  # this fit's own, for checkpoints; survives a crash
    batch_size: int
    log: Callable[[dict[str, Any]], None]  # one row of history, to W&B and the run's log
