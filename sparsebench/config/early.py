"""What shows before anything is loaded: plainly wrong values, paths that no system takes, results that can't be written.

No torch here. (What shows of models and data is in models/structure.py and tasks/trial.py.)
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sparsebench.config import inputs, static
from sparsebench.config.fields import wrong

ABSENT = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EACCES,
)  # a path that may be a name of something else, or be said better later
SETTINGS = {"config": "sparsebench.config.settings.Settings", "bench": "sparsebench.bench.Bench"}  # by YAML in conf/


def refused_paths(configuration: dict[str, Any]) -> list[str]:
    """A line for each setting whose path the system can't even look for: too long, a circle of links, a null byte.

    Also one for what is neither file nor folder: a pipe ends at the first reading, a device perhaps never, and a run is
    named by what it reads.
    """
    places = [(key, value) for key, value, _, _ in inputs.named(configuration)]
    if isinstance(configuration.get("output_dir"), str):
        places.append(("output_dir", configuration["output_dir"]))
    lines = []
    for key, value in places:
        try:
            kind = os.stat(value).st_mode
            if key != "output_dir" and not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                lines.append(f"{key} must be a file or folder, got {shortened(value)} (a pipe, a device or a socket)")
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) not in ABSENT:
                lines.append(f"{key} must be a path that can be opened, got {shortened(value)} ({reason(error)})")
    return lines


def shortened(value: str) -> str:
    """A value as it is shown: of a very long one both ends."""
    return repr(value) if len(value) <= 120 else f"{value[:60]!r}...{value[-30:]!r} of {len(value)} characters"


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def wrong_values(configuration: dict[str, Any], target: str) -> list[str]:
    """A line for each value of a wrong type or out of its bounds, as far as the source of the classes tells.

    target: the class of the whole configuration, of SETTINGS. The lines are those of `build`, which imports torch first.
    """
    parts = [("", configuration, target)]
    parts += [(f"{key}.", node, str(node["_target_"])) for key, node in configuration.items() if is_group(node)]
    return [line for prefix, node, cls in parts for line in wrong_in(prefix, node, cls)]


def is_group(node: Any) -> bool:
    return isinstance(node, dict) and "_target_" in node


def wrong_in(prefix: str, node: dict[str, Any], target: str) -> Iterator[str]:
    for key, (hint, meta) in static.fields_of(target).items():
        *sections, leaf = key.split(".")
        inner: Any = node
        for section in sections:
            inner = inner.get(section) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and leaf in inner:
            with suppress(TypeError):  # a type that source alone does not tell
                line = wrong(f"{prefix}{key}", inner[leaf], hint, meta)
                if line:
                    yield line


def output_problem(output_dir: str, key: str = "output_dir") -> str | None:
    """The line about a folder for results that can't be made or written, or None. Leaves nothing behind.

    Tried in its nearest existing folder: rights, a full or read-only disk and too long names all show there.
    """
    wanted = Path(output_dir).absolute()
    home = next(p for p in (wanted, *wanted.parents) if os.path.lexists(p))
    try:
        trial = Path(tempfile.mkdtemp(prefix=".sparsebench-", dir=home))
    except OSError as error:
        return f"{key} must be a folder that can be written, got {shortened(output_dir)} ({home}: {reason(error)})"
    try:
        (trial / wanted.relative_to(home)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"{key} must be a folder that can be made, got {shortened(output_dir)} ({reason(error)})"
    finally:
        with suppress(OSError):
            shutil.rmtree(trial)
    return None
