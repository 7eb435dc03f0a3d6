"""Text files as they are read: their content, and what a recipe says of their columns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Layout:
    """What a recipe says of the columns of a file; None where it says nothing.

    Attributes:
        text: The column of the text, or of the words.
        label: The column of the label, or of the tags.
        delimiter: Between the columns.
        quoting: Whether quotation marks around a field are not part of it.
    """

    text: str | None = None
    label: str | None = None
    delimiter: str | None = None
    quoting: bool | None = None


def text_of(path: Path) -> str:
    """The content of a text file.

    Raises:
        FileNotFoundError: If there is no such file; lists what the folder holds.
        ValueError: If it is empty or not UTF-8.
    """
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*") if p.is_file()) if path.parent.is_dir() else []
        raise FileNotFoundError(
            f"There is no file {str(path)!r}. " + (f"The folder holds: {', '.join(near)}." if near else "Check data.path.")
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}). Convert it to UTF-8.") from error
    if not text.strip():
        raise ValueError(f"{path} is empty ({path.stat().st_size} bytes, no examples). Check the file, or data.path.")
    return text
