"""Files that are whole or not there, in UTF-8 whatever the locale, free of secrets, and JSON-ready values."""

from __future__ import annotations

import json
import locale
import logging
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote

from sparsebench.ranks import MODE

SECRET_NAME = re.compile(
    r"(API_?KEY|ACCESS_?KEY|TOKEN|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE
)  # of environment variables
IN_URL = re.compile(r"([a-z][a-z0-9+.-]*://)([^\s/?#\"'<>]+)@", re.IGNORECASE)  # scheme, user and password
QUERY = "access_?token|api_?key|auth|credential|key|password|sig|signature|token|x-amz-[a-z-]+"
IN_QUERY = re.compile(rf"([?&](?:{QUERY})=)[^&\s\"'<>]+", re.IGNORECASE)
SHORTEST = 6  # characters of a secret: shorter ones stand in ordinary words


def plain(value: Any) -> Any:
    """JSON-ready: NaN and infinities become null, paths and scalars of other libraries become text and numbers."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return plain(value.item()) if hasattr(value, "item") else str(value)


CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(value: Any) -> Any:
    """The same JSON with U+FFFD for what no terminal, page or picture should be given: control characters but newline
    and tab, marks that turn the direction of writing, halves of characters."""
    if isinstance(value, str):
        return value if value.isprintable() else CONTROL.sub("\ufffd", value)
    if isinstance(value, dict):
        return {printable(k): printable(v) for k, v in value.items()}
    return [printable(v) for v in value] if isinstance(value, list) else value


def one_line(text: str) -> str:
    """Text as one line of a terminal: line breaks and control characters by their escapes."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def secrets() -> dict[str, str]:
    """secret -> what stands in its place, the longest first: keys and tokens of the environment, passwords of proxies."""
    known: dict[str, str] = {}
    for name, value in os.environ.items():
        words = [value] if SECRET_NAME.search(name) else []
        if name.lower().endswith("_proxy"):
            url = value if "://" in value else f"http://{value}"
            words = [word for user in IN_URL.findall(url) for word in (user[1], user[1].partition(":")[2])]
        for word in words:
            known |= dict.fromkeys(spellings(word), f"<{name}>")
    return {word: known[word] for word in sorted(known, key=len, reverse=True) if len(word) >= SHORTEST}


def spellings(word: str) -> list[str]:
    """A secret as it is, and as it stands in a traceback, in JSON and in URLs."""
    return [
        word, unquote(word), repr(word)[1:-1], json.dumps(word)[1:-1], json.dumps(word, ensure_ascii=False)[1:-1],
        quote(word), quote(word, safe=""), quote_plus(word),
    ]  # fmt: skip


def scrub(text: str, known: dict[str, str] | None = None) -> str:
    """`text` without the values of secret environment variables, and without users, passwords and tokens in URLs.

    Give it what is meant, before any encoding: a secret with a quotation mark stands otherwise in JSON. known: `secrets()`.
    """
    for secret, shown in (secrets() if known is None else known).items():
        text = text.replace(secret, shown)
    if "://" not in text:
        return text
    return IN_QUERY.sub(r"\1<secret>", IN_URL.sub(r"\1<credentials>@", text))


def scrubbed(value: Any, known: dict[str, str] | None = None) -> Any:
    """The same JSON with `scrub` applied to all of its text."""
    known = secrets() if known is None else known
    if isinstance(value, str):
        return scrub(value, known)
    if isinstance(value, dict):
        return {scrubbed(k, known): scrubbed(v, known) for k, v in value.items()}
    return [scrubbed(v, known) for v in value] if isinstance(value, (list, tuple)) else value


def speak_utf8() -> None:
    """Start this command again in Python's UTF-8 mode where the locale would have it read and write anything else.

    Arguments, names of files, what libraries write and the processes of a sweep are then UTF-8, too.
    """
    if not sys.flags.utf8_mode and locale.getpreferredencoding(False).lower().replace("-", "") != "utf8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def write_atomic(path: Path, content: bytes) -> None:
    """Write so that `path` holds either what it held before or all of `content`, whatever happens in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, MODE)  # mkstemp gives 0600; others may read records
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def scrubbing(entry: logging.LogRecord) -> bool:
    """A logging filter that takes secrets out of messages."""
    entry.msg, entry.args = scrub(entry.getMessage()), None
    return True
