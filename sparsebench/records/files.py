"""Files that are whole or not there, in UTF-8 whatever the locale, free of secrets, and JSON-ready values."""

from __future__ import annotations

import locale
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from sparsebench.ranks import MODE

SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


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


def scrub(text: str) -> str:
    """`text` without the values of secret environment variables."""
    for name in SECRETS:
        secret = os.environ.get(name)
        if secret and len(secret) >= 6:
            text = text.replace(secret, f"<{name}>")
    return text


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
