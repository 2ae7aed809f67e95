"""Models and where they can be sparse: `language` and `vision` load them, `sites` knows a transformer block's maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass
class Loaded:
    """A model ready to use: eval mode, on the device, parameters frozen."""

    module: nn.Module
    tokenizer: Any  # None where the inputs are no text
    info: dict[str, Any]  # for the record: name, num_parameters, source, ...
