"""Text for a terminal: what it would obey is shown as a sign."""

from __future__ import annotations

import json
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
