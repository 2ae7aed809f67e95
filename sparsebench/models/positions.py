"""How many positions a transformer knows, and what a longer window means for it: an error, or a caution in the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from sparsebench.models import structure

NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")
OFFSET = {"roberta": 2, "xlm-roberta": 2, "camembert": 2}  # positions count from behind the padding token's


def known_config(location: str, architecture: dict | None) -> Any | None:
    """The configuration of a folder, or of an `architecture` node; None where it can't be read here.

    Raises ValueError where it holds values that no such model has.
    """
    if Path(location or ".missing", "config.json").is_file():
        try:
            return transformers.AutoConfig.from_pretrained(location, local_files_only=True)
        except (OSError, ValueError):  # code of its own, or no configuration: loading it says so
            return None
        except Exception as error:  # what transformers makes of a foreign value is of any kind
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ValueError(f"model.path: {location}/config.json is no configuration of a model ({reason})") from error
    return None if architecture is None else structure.of_fields(architecture)


def limit(config: Any) -> int | None:
    """Positions that the model was made for, or None where its configuration says none (ALiBi)."""
    count = next((getattr(config, n) for n in NAMES if isinstance(getattr(config, n, None), int)), None)
    return None if count is None else count - OFFSET.get(config.model_type, 0)


def learned(config: Any) -> bool:
    """Whether there is a table with a row per position, beyond which nothing can be computed."""
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rotary_dim", None)
    return not rotary and not getattr(config, "alibi", False) and config.model_type not in ("xglm", "bloom", "mpt")


def problems(name: str, config: Any | None, lengths: dict[str, int]) -> list[str]:
    """A line for each key whose length the model can't hold, or, of what is only timed, was never made for.

    A window of text may be longer than a model without learned positions was made for: the record warns.
    """
    count = None if config is None else limit(config)
    if config is None or count is None:
        return []
    table, reach = learned(config), int(count * stretch(config))
    lines = []
    for key, length in lengths.items():
        if table and length > count:
            lines.append(f"{key} must be at most {count}, the learned positions of model={name}, got {length}")
        elif key.startswith("measure.") and length > reach:
            lines.append(f"{key} must be at most {reach}, the positions that model={name} was made for, got {length}")
    return lines


def stretch(config: Any) -> float:
    """The factor by which a scaling of its rotary positions may extend what the configuration counts; 1 without one."""
    rotary = getattr(config, "rope_parameters", None) or {}
    factor = rotary.get("factor")
    return max(1.0, factor) if isinstance(factor, (int, float)) else 1.0


def cautions(config: Any, length: int) -> list[str]:
    """What the record says of windows longer than a model without learned positions was made for."""
    count = limit(config)
    if count is None or length <= count:
        return []
    return [f"windows of {length} tokens are longer than the {count} positions that the model was made for"]
