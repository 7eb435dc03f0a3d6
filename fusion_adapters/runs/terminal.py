"""Text from and for a terminal: what it would obey is shown as a sign."""

from __future__ import annotations

import json
import sys
from typing import Any

# What a terminal would obey instead of showing it: C0 without tab and line feed, DEL, C1.
_CONTROLS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_CONTROLS |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def visible(text: str) -> str:
    """A text with signs for its control characters, as it may be printed to a terminal."""
    return text.translate(_CONTROLS)


def json_line(value: Any) -> str:
    """A value as JSON on one line; text as it is, but for what a terminal would obey (JSON itself escapes only some of it)."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(f"\\u{ord(c):04x}" if "\x7f" <= c < "\xa0" else c for c in text)


def lines_of_input() -> list[str]:
    """The lines of standard input that are not blank.

    Raises:
        ValueError: If it is not UTF-8.
    """
    try:
        return [line.rstrip("\n") for line in sys.stdin if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Standard input is not UTF-8 text ({error.reason}: {error.object[error.start : error.start + 1]!r}). Convert it, for example "
            "with iconv -f latin1 -t utf-8."
        ) from None
