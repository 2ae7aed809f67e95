"""The program's own folder for what can be made again: digests of files, downloaded image sets, compiled and tuned kernels.

SPARSEBENCH_CACHE moves it; else it is `sparsebench` in $XDG_CACHE_HOME or ~/.cache. Where that can't be written (a
read-only home, none at all, an unknown user, a full disk) a folder of this user in the temporary directory takes its
place. Compilers keep their code in it, too (numba, Triton, torch), unless their own variables say otherwise. A file of
theirs that is not as a run left it, cut short or with one bit changed, is removed before it is read, and made again.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)

VARIABLE = "SPARSEBENCH_CACHE"
ROOM_BYTES = 64 << 20  # a disk with less left is as good as full
COMPILERS = {"NUMBA_CACHE_DIR": "numba", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
SEALS = "compiled.json"  # SHA-256 of every compiled file, by its path in the folder


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
                room = shutil.disk_usage(path).free >= ROOM_BYTES
            except OSError:
                continue
            if room and os.access(path, os.W_OK | os.X_OK) and (path is not last or mine(path)):
                return path.absolute()
    return Path(tempfile.mkdtemp(prefix="sparsebench-"))


def mine(path: Path) -> bool:
    """Whether a folder that anybody could have made in the temporary directory is this user's own."""
    return not hasattr(os, "getuid") or path.stat().st_uid == os.getuid()


def provide_home() -> None:
    """Give libraries a home folder where the user has none they may enter: HOME unset or wrong, an unknown user.

    Without one they fail at import, or write into a folder called `~`. A home that can only be read stays: the models
    of a hub's cache may lie there.
    """
    home = os.path.expanduser("~")
    if not (os.path.isabs(home) and os.path.isdir(home) and os.access(home, os.R_OK | os.X_OK)):
        os.environ.setdefault(VARIABLE, str(folder()))
        own = folder() / "home"
        own.mkdir(exist_ok=True)
        os.environ["HOME"] = home = str(own)
    if not os.access(home, os.W_OK):
        os.environ.setdefault("MPLCONFIGDIR", str(folder() / "matplotlib"))


# ---------------------------------------------------------------------------------------------------------------------
# Compiled code


def provide_compilers() -> None:
    """Tell the compilers of this process where to keep their code; called before any of them is imported."""
    for variable, name in COMPILERS.items():
        os.environ.setdefault(variable, str(folder() / name))
    if "numba" in sys.modules:  # imported by somebody else; it has read its variable
        sys.modules["numba"].config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]


class Users:
    """The processes that use the compiled code now, told by a shared lock: only one that is alone may judge the files."""

    lock: IO | None = None


def check_compiled() -> None:
    """Remove compiled files that are not as the last run left them; nothing where another process uses them now.

    From here to the end of the process this one uses them; `seal_compiled` then says how it leaves them.
    """
    if Users.lock is not None:
        return
    try:
        Users.lock = open(folder() / f"{SEALS}.lock", "a", encoding="utf-8")  # noqa: SIM115 - held to the end
        fcntl.flock(Users.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        alone = False
    else:
        alone = True
    try:
        if alone:
            heal(folder())
        if Users.lock is not None:
            fcntl.flock(Users.lock, fcntl.LOCK_SH)
    except OSError as error:
        log.warning("compiled code in %s: %s", folder(), error)
    atexit.register(seal_compiled)


def heal(where: Path) -> None:
    """Remove what does not fit its seal, or has none: a process that was killed wrote it, or the disk was full."""
    try:
        sealed = json.loads((where / SEALS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        sealed = {}
    sealed = sealed if isinstance(sealed, dict) else {}
    odd = [name for name, digest in digests(where).items() if sealed.get(name) != digest]
    for name in odd:
        (where / name).unlink(missing_ok=True)
    if odd and sealed:
        many = f"{len(odd)} files were" if len(odd) > 1 else "1 file was"
        log.info("compiled code in %s: %s damaged or left unfinished, and removed to be made again", where, many)


def seal_compiled() -> None:
    """Note what the compiled files hold now; called at the end of a process that compiled."""
    if Users.lock is None:
        return
    try:
        partial = folder() / f".{SEALS}.{os.getpid()}.partial"
        partial.write_text(json.dumps(digests(folder())), encoding="utf-8")
        partial.replace(folder() / SEALS)
    except OSError as error:  # they are compiled again next time
        log.debug("compiled code was not sealed: %s", error)


def digests(where: Path) -> dict[str, str]:
    """SHA-256 of every compiled file, by its path in the folder."""
    sums = {}
    for name in COMPILERS.values():
        for path in sorted((where / name).rglob("*")):
            try:
                if path.is_file():
                    sums[path.relative_to(where).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError:  # another process took it away
                continue
    return sums
