"""The program's own folder for what can be made again: digests of files, downloaded image sets, tuned kernels.

SPARSEBENCH_CACHE moves it; else it is `sparsebench` in $XDG_CACHE_HOME or ~/.cache. Where that can't be written (a
read-only home, none at all, an unknown user) a folder of this user in the temporary directory takes its place.
"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

VARIABLE = "SPARSEBENCH_CACHE"


def folder() -> Path:
    """The folder, made where it is missing."""
    return writable(os.environ.get(VARIABLE), os.environ.get("XDG_CACHE_HOME"), os.environ.get("HOME"))


@functools.cache
def writable(own: str | None, xdg: str | None, home: str | None) -> Path:
    """The first of the wanted folders that can be made and written."""
    wanted = [own and Path(own), xdg and Path(xdg, "sparsebench"), home and Path(home, ".cache", "sparsebench")]
    last = Path(tempfile.gettempdir(), f"sparsebench-{os.getuid() if hasattr(os, 'getuid') else 'cache'}")
    for path in [*filter(None, wanted), last]:
        if path.is_absolute() or path == wanted[0]:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError:
                continue
            if os.access(path, os.W_OK | os.X_OK) and (path is not last or mine(path)):
                return path.absolute()
    return Path(tempfile.mkdtemp(prefix="sparsebench-"))


def mine(path: Path) -> bool:
    """Whether a folder that anybody could have made in the temporary directory is this user's own."""
    return not hasattr(os, "getuid") or path.stat().st_uid == os.getuid()
