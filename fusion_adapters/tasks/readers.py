"""Data formats: a function that reads a file into columns, and a line in `READERS`."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tags import is_tag

Columns = dict[str, list[Any]]


def read_conll(path: Path) -> Columns:
    """Reads a CoNLL file: a word and, in the last column, its tag on each line; blank lines between sentences.

    Columns are separated by tabs, or by spaces where a line has no tab.

    Returns:
        `tokens` and `tags`, lists of equal length for each sentence.

    Raises:
        ValueError: If a line has no tag, or one that is no tag.
    """
    sentences: list[tuple[list[str], list[str]]] = [([], [])]
    # not splitlines: a word may be a character that Python takes for the end of a line
    for number, line in enumerate(text_of(path).split("\n"), start=1):
        if not line.strip():
            if sentences[-1][0]:
                sentences.append(([], []))
            continue
        if line.startswith("-DOCSTART-"):
            continue
        # split at blanks alone: a no-break space belongs to its word
        columns = line.rstrip("\r").split("\t") if "\t" in line else re.split(" +", line.strip(" \r"))
        word, tag = columns[0], columns[-1].strip()
        if len(columns) < 2 or not is_tag(tag):
            raise ValueError(
                f"{path}, line {number}: {line.strip()!r} is not a word and a tag. A CoNLL file has a word and, in its last "
                "column, a tag (O, B-TYPE or I-TYPE) on each line, separated by a tab or spaces."
            )
        sentences[-1][0].append(word)
        sentences[-1][1].append(tag)
    whole = [sentence for sentence in sentences if sentence[0]]
    return {"tokens": [words for words, _ in whole], "tags": [tags for _, tags in whole]}


def read_csv(path: Path) -> Columns:
    """Reads a file of values separated by commas (tabs in a .tsv) under a header."""
    text = io.StringIO(text_of(path), newline="")
    try:
        rows = list(csv.reader(text, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True))
    except csv.Error as error:
        raise ValueError(f"{path} is not valid CSV: {error}.") from error
    header, rows = rows[0], [row for row in rows[1:] if row]
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"{path}: the header has the column {twice[0]!r} twice. Give every column a name of its own.")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise ValueError(
                f"{path}, row {number} has {len(row)} fields, but the header has {len(header)} ({', '.join(header)})."
            )
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def read_json(path: Path) -> Columns:
    """Reads a list of objects with the same keys, or such objects one a line (.jsonl)."""
    text = text_of(path)
    try:
        rows = (
            [json.loads(line) for line in text.split("\n") if line.strip()] if path.suffix == ".jsonl" else json.loads(text)
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    objects = isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows)
    if not objects or any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError(f"{path} must hold objects with the same keys: a list of them (.json) or one a line (.jsonl).")
    return {name: [row[name] for row in rows] for name in rows[0]}


def read_text(path: Path) -> Columns:
    """Reads plain text: a text on each line that is not blank."""
    return {"text": text_of(path).split("\n")}


@dataclass(frozen=True)
class Reader:
    """A data format.

    Attributes:
        read: Reads a file into columns; raises ValueError with the place if it is not as the format asks.
        suffixes: Ends of file names that stand for the format.
        columns: The columns, where they are always the same.
        holds: What its files hold then, in words.
    """

    read: Callable[[Path], Columns]
    suffixes: tuple[str, ...]
    columns: tuple[str, ...] = ()
    holds: str | None = None


READERS: dict[str, Reader] = {
    "conll": Reader(
        read_conll,
        (".conll", ".bio", ".iob"),
        ("tokens", "tags"),
        "CoNLL files hold tagged words, for task: token_classification",
    ),
    "csv": Reader(read_csv, (".csv", ".tsv")),
    "json": Reader(read_json, (".json", ".jsonl")),
    "text": Reader(read_text, (".txt",), ("text",), "plain text holds no labels, only texts for task: masked_lm"),
}


def reader_of(path: Path, format_name: str | None) -> Reader:
    """The format of a file: the one that is named, else that of the end of its name. Raises ValueError if there is none."""
    name = format_name or next((n for n, reader in READERS.items() if path.suffix in reader.suffixes), None)
    if name is None:
        raise ValueError(
            f"The format of {str(path)!r} cannot be told from its name. Set data.format to one of {', '.join(READERS)}."
        )
    return READERS[name]


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
