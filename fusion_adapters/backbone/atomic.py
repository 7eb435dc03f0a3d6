"""Files that appear whole or not at all: written under a name beside their own, then renamed.

It stands in this room because it is the lowest that all rooms which write files may import.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = re.compile(r"\.(.+)\.(\d+)")  # the file's own name, and the process that writes it


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a name to write under; the file there gets its own name when the body ends well, and is gone if not.

    Folders above `path` that are not there are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_whole(path: Path, text: str) -> None:
    """Writes a text as UTF-8, see `written_whole`."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def temporary_of(name: str) -> tuple[str, int] | None:
    """The file that a name of `written_whole` stands for, and the id of the process that writes it; None for other names."""
    found = TEMPORARY.fullmatch(name)
    return None if found is None else (found[1], int(found[2]))
