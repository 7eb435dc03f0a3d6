"""Data formats: a function that reads a file into columns, and a line in `READERS`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .conll import NAMES, read_conll
from .separated import read_csv
from .textfiles import Columns, Layout, text_of


def read_json(path: Path, layout: Layout) -> Columns:
    """Reads a list of objects with the same keys, or such objects one a line (.jsonl)."""
    text = text_of(path)
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), start=1)
        rows: Any = [_parsed(line, f"{path}, line {number},") for number, line in lines if line.strip()]
    else:
        rows = _parsed(text, str(path))
    objects = isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows)
    if not objects or any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError(f"{path} must hold objects with the same keys: a list of them (.json) or one a line (.jsonl).")
    return {name: [row[name] for row in rows] for name in rows[0]}


def _parsed(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, lists within lists without end
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and text[: error.pos].lstrip()[:1] == "{":
            raise ValueError(
                f"{source} holds an object a line: it is JSON Lines, not JSON, which would be one list. Give its name the ending .jsonl."
            ) from error
        raise ValueError(f"{source} is not valid JSON: {error}.") from error


def read_text(path: Path, layout: Layout) -> Columns:
    """Reads plain text: a text on each line that is not blank."""
    return {"text": text_of(path).split("\n")}


@dataclass(frozen=True)
class Reader:
    """A data format.

    Attributes:
        read: Reads a file into columns; raises ValueError with the place if it is not as the format asks.
        suffixes: Ends of file names that stand for the format.
        columns: The columns, where they are always the same.
        picks: Whether the reader itself picks the columns that a recipe names, and gives them these names.
        holds: What its files hold then, in words.
        heeds: Which of `data.delimiter` and `data.quoting` it knows.
    """

    read: Callable[[Path, Layout], Columns]
    suffixes: tuple[str, ...]
    columns: tuple[str, ...] = ()
    picks: bool = False
    holds: str | None = None
    heeds: tuple[str, ...] = ()


READERS: dict[str, Reader] = {
    "conll": Reader(
        read_conll,
        (".conll", ".bio", ".iob"),
        NAMES,
        True,
        "CoNLL files hold tagged words, for task: token_classification",
        ("delimiter",),
    ),
    "csv": Reader(read_csv, (".csv", ".tsv"), heeds=("delimiter", "quoting")),
    "json": Reader(read_json, (".json", ".jsonl")),
    "text": Reader(
        read_text, (".txt",), ("text",), False, "plain text holds no labels, only texts for task: masked_lm or causal_lm"
    ),
}


def reader_of(path: Path, format_name: str | None) -> Reader:
    """The format of a file: the one that is named, else that of the end of its name. Raises ValueError if there is none."""
    name = format_name or next((n for n, reader in READERS.items() if path.suffix in reader.suffixes), None)
    if name is None:
        raise ValueError(
            f"The format of {str(path)!r} cannot be told from its name. Set data.format to one of {', '.join(READERS)}."
        )
    return READERS[name]
