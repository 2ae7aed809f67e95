"""What a record says, as text and nothing else: in Markdown and in a spreadsheet. (HTML: html.escape.)"""

from __future__ import annotations

import re
from typing import Any

MARKDOWN = re.compile(r"[\\`*<|$]|\](?=[(\[])")
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def markdown(text: str) -> str:
    """One line in which no HTML, link, code, emphasis, formula or table cell begins."""
    return MARKDOWN.sub(r"\\\g<0>", " ".join(text.splitlines()))


def in_cell(text: str) -> str:
    """Markdown that stays in its cell of a table."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def marked_down(value: Any) -> Any:
    """JSON with all of its text so escaped, keys included, so that they still name what they named."""
    if isinstance(value, dict):
        return {markdown(k): marked_down(v) for k, v in value.items()}
    if isinstance(value, list):
        return [marked_down(v) for v in value]
    return markdown(value) if isinstance(value, str) else value


def csv_cell(value: Any) -> Any:
    """A value that no spreadsheet takes for a formula: text that begins like one gets an apostrophe before it."""
    text = str(value) if not isinstance(value, (int, float)) and value is not None else value
    return f"'{text}" if isinstance(text, str) and text.startswith(FORMULA) else text
