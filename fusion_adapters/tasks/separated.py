"""Tables as text: values separated by commas, tabs or another character, under a header."""

from __future__ import annotations

import csv
import io
import re
import sys
from pathlib import Path

from .textfiles import Columns, Layout, text_of

QUOTED = re.compile(r'"[^"]*(""[^"]*)+"')  # a field with marks of its own, as a program writes it that quotes
NO_LIMIT = min(sys.maxsize, 2**31 - 1)  # of characters in a field; the module's own is 131,072


def read_csv(path: Path, layout: Layout) -> Columns:
    """Reads a file of values separated by commas (tabs in a .tsv) under a header; empty fields at the end of a row may be surplus.

    Quotation marks around a field are not part of it, except in a .tsv, where every mark is part of the text.

    Raises:
        ValueError: If a row has another number of fields than the header, or marks are not as the layout says.
    """
    text = text_of(path)
    delimiter = layout.delimiter or ("\t" if path.suffix == ".tsv" else ",")
    quoting = path.suffix != ".tsv" if layout.quoting is None else layout.quoting
    if quoting:
        rows = _quoted_rows(path, text, delimiter)
    else:
        rows = [line.split(delimiter) for line in text.split("\n") if line]
        if layout.quoting is None:
            _check_unquoted(path, rows)
    rows = [row for row in rows if row]
    widest = max(len(_shortened(row)) for row in rows)  # a delimiter may end each line
    header, rows = rows[0][:widest], rows[1:]
    other = next((sign for sign in "\t;,|" if len(header) == 1 and sign in header[0] and sign != delimiter), None)
    if other is not None:
        raise ValueError(
            f"{path}: the header is one column, {header[0]!r}, where columns are separated by {delimiter!r}. If they are separated by "
            f"{other!r} in this file, set data.delimiter."
        )
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"{path}: the header has the column {twice[0]!r} twice. Give every column a name of its own.")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header) and len(_shortened(row, len(header))) != len(header):
            marks = any('"' in field for field in row)
            advice = (
                " Marks around a field are part of its text here; if they are not, set data.quoting: true." if marks else ""
            )
            raise ValueError(
                f"{path}, row {number} has {len(row)} fields, but the header has {len(header)} ({', '.join(header)})."
                + (advice if not quoting else "")
            )
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def _quoted_rows(path: Path, text: str, delimiter: str) -> list[list[str]]:
    limit = csv.field_size_limit(NO_LIMIT)
    try:
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"{path} is not valid CSV: {error}. If quotation marks are part of the texts, set data.quoting: false."
        ) from error
    finally:
        csv.field_size_limit(limit)


def _check_unquoted(path: Path, rows: list[list[str]]) -> None:
    """Raises ValueError for a .tsv that looks as if marks around fields were not part of them, while nobody says so."""
    header = all(len(name) > 1 and name[0] == name[-1] == '"' for name in rows[0])
    found = next((n for n, row in enumerate(rows[1:], start=1) if any(QUOTED.fullmatch(field) for field in row)), None)
    if header or found is not None:
        where = "the header's names stand" if header else f"a field of row {found} stands"
        raise ValueError(
            f"{path}: {where} between quotation marks, as programs write them that quote fields. Say what they are: data.quoting: true "
            "takes them off, data.quoting: false leaves them in the text, as in most .tsv files."
        )


def _shortened(row: list[str], length: int = 1) -> list[str]:
    """A row without empty fields at its end, as a delimiter at the end of a line makes one; never shorter than `length`."""
    end = len(row)
    while end > length and not row[end - 1]:
        end -= 1
    return row[:end]
