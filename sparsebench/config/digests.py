"""SHA-256 of files' contents, remembered as long as a file stays the same: the answer from a record stays instant.

A digest is kept under device, inode, size, mtime and ctime. An edit that keeps size and mtime still moves the ctime, a
`touch` only costs reading the file once more. A file that changed within the last two seconds is not remembered: a
second edit in the same tick of the clock would look like none.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from sparsebench import cache

log = logging.getLogger(__name__)

SETTLED_SECONDS = 2  # of the coarsest clock among common file systems
ANNOUNCED_BYTES = 2 << 30
UNREADABLE = "unreadable"
known: dict[str, str] = {}  # digest by `stamp`: what this process has read or looked up


def stamp(path: Path) -> str:
    """What a file's digest is kept under."""
    try:
        status = path.stat()
    except OSError:
        return UNREADABLE
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def of_file(path: Path) -> str:
    """SHA-256 of a file, read now; UNREADABLE where that fails (the run itself says why)."""
    state = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                state.update(block)
    except OSError:
        return UNREADABLE
    return state.hexdigest()


def of_files(paths: Iterable[Path]) -> list[str]:
    """SHA-256 of each file, from memory where nothing about the file changed."""
    paths = list(paths)
    stamps = [stamp(p) for p in paths]
    recall([key for key in stamps if key not in known and key != UNREADABLE])
    unread = {k: p for p, k in zip(paths, stamps, strict=True) if k not in known and k != UNREADABLE}
    size = sum(int(key.split(":")[2]) for key in unread)
    if size > ANNOUNCED_BYTES:
        log.info("reading %.1f GB of input files to identify the run (once)", size / 1e9)
    with ThreadPoolExecutor() as pool:
        made = dict(zip(unread, pool.map(of_file, unread.values()), strict=True))
    settled = {k: d for k, d in made.items() if d != UNREADABLE and is_settled(unread[k], k)}
    known.update(settled)
    remember(settled)
    return [known.get(key) or made.get(key, UNREADABLE) for key in stamps]


def is_settled(path: Path, key: str) -> bool:
    """Whether a file was left alone while it was read, and long enough before."""
    changed = max(map(int, key.split(":")[3:])) / 1e9
    return changed < time.time() - SETTLED_SECONDS and stamp(path) == key


# ---------------------------------------------------------------------------------------------------------------------
# On disk


def ask(do: Callable[[sqlite3.Connection], Any]) -> Any:
    """`do(table)` on the table in the cache folder, None where that fails: it only costs reading files again.

    A damaged table is thrown away.
    """
    path = cache.folder() / "digests.sqlite3"
    for _ in range(2):
        try:
            with closing(sqlite3.connect(path, timeout=10)) as database, database:
                database.execute(
                    "create table if not exists digests (stamp text primary key, sha256 text) without rowid"
                )
                return do(database)
        except sqlite3.OperationalError:  # locked, full or read-only: not damaged
            return None
        except sqlite3.DatabaseError:
            with suppress(OSError):
                path.unlink()
    return None


def rows(table: sqlite3.Connection, query: str, values: list[str]) -> list[tuple[str, str]]:
    """What a query finds."""
    return table.execute(query, values).fetchall()


def recall(keys: list[str]) -> None:
    """Put what the table knows of `keys` into `known`."""
    for start in range(0, len(keys), 500):
        part = keys[start : start + 500]
        query = f"select stamp, sha256 from digests where stamp in ({','.join('?' * len(part))})"
        known.update(ask(functools.partial(rows, query=query, values=part)) or ())


def remember(digests: dict[str, str]) -> None:
    """Add digests by stamp to the table."""
    if digests:
        rows = list(digests.items())
        ask(lambda database: database.executemany("insert or replace into digests values (?, ?)", rows))
