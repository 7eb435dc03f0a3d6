"""CoNLL files: a word and its tag on each line, among whatever other columns a corpus has."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from .tags import advice, is_tag
from .textfiles import Columns, Layout, text_of

NAMES = ("tokens", "tags")  # of the two columns that are read, where a recipe names none
COUNT = re.compile(r"[0-9]+([-.][0-9]+)?")  # a word's number in its sentence; CoNLL-U also has 3-4 and 8.1

COMMENT = re.compile(r"#(\s|$)")


def read_conll(path: Path, layout: Layout) -> Columns:
    """Reads a CoNLL file: a word and its tag on each line; blank lines between sentences.

    Columns are separated by tabs, or by spaces where a line has no tab. The word is in the first and the tag in the last, unless the
    layout names them: by number, counted from 1, or by the names of a header, which is then the first line. Lines that begin with `#`
    and a blank before the first word of a sentence are comments, unless they have the columns of a word; `-DOCSTART-` begins a document.

    Returns:
        `tokens` and `tags`, lists of equal length for each sentence, under the names that the layout gives.

    Raises:
        ValueError: If a line has no tag, or one that is no tag, or the words are the numbers of words.
    """
    # not splitlines: a word may be a character that Python takes for the end of a line
    lines = enumerate(text_of(path).split("\n"), start=1)
    rows = [(number, line, _columns(line, layout.delimiter)) for number, line in lines]
    widths = Counter(len(columns) for _, line, columns in rows if line.strip() and not line.startswith("#"))
    width = widths.most_common(1)[0][0] if widths else 0
    names = tuple(given or usual for given, usual in zip((layout.text, layout.label), NAMES, strict=True))
    header = _header(path, rows, names)
    word_at, tag_at = (
        _position(path, name, usual, key, header)
        for name, usual, key in zip(names, NAMES, ("data.text", "data.label"), strict=True)
    )
    if word_at == tag_at:
        raise ValueError(f"{path}: data.text and data.label name the same column ({names[0]}). Name two.")
    sentences: list[tuple[list[str], list[str]]] = [([], [])]
    for number, line, columns in rows:
        begun = bool(sentences[-1][0])
        ends = not line.strip() or line.startswith(("-DOCSTART-", "#begin document", "#end document"))
        if ends:
            if begun:
                sentences.append(([], []))
            continue
        if header and columns == header and len(sentences) == 1 and not begun:
            continue
        there = -len(columns) <= tag_at < len(columns) and word_at < len(columns)
        tag = columns[tag_at].strip() if there else ""
        if COMMENT.match(line) and not begun and not (len(columns) == width and is_tag(tag)):
            continue
        if len(columns) < 2 or not is_tag(tag):
            raise ValueError(_no_tag(path, number, line, tag, layout))
        sentences[-1][0].append(columns[word_at])
        sentences[-1][1].append(tag)
    whole = [sentence for sentence in sentences if sentence[0]]
    if names[0] == NAMES[0]:
        _check_no_numbers(path, [words for words, _ in whole], rows)
    return {names[0]: [words for words, _ in whole], names[1]: [tags for _, tags in whole]}


def _columns(line: str, delimiter: str | None) -> list[str]:
    by_blanks = delimiter is None and "\t" not in line  # at blanks alone: a no-break space belongs to its word
    columns = re.split(" +", line.strip(" ")) if by_blanks else line.split(delimiter or "\t")
    while len(columns) > 1 and not columns[-1].strip(" "):  # a tab at the end of the line
        columns.pop()
    return columns


def _header(path: Path, rows: list[tuple[int, str, list[str]]], names: tuple[str, ...]) -> list[str]:
    """The first line, where the layout names a column by another name than a number; else nothing."""
    if all(name in NAMES or name.isdecimal() for name in names):
        return []
    for _, line, columns in rows:
        if columns[0] == "#" and "global.columns" in line:  # CoNLL-U Plus
            return [name for name in columns[2:] if name != "="]
        if line.strip() and not line.startswith(("#", "-DOCSTART-")):
            return [column.strip() for column in columns]
    raise ValueError(f"{path} holds comments alone, no header and no words. Check the file, or data.path.")


def _position(path: Path, name: str, usual: str, key: str, header: list[str]) -> int:
    if name in header:
        return header.index(name)
    if name.isdecimal() and int(name) > 0:
        return int(name) - 1
    if name == usual:
        return 0 if usual == NAMES[0] else -1
    raise ValueError(
        f"{path} has no column {name!r} ({key}); its first line has {', '.join(map(repr, header or ['no header']))}. Name a column of "
        "a CoNLL file by its number, counted from 1, or by its name in the first line."
    )


def _no_tag(path: Path, number: int, line: str, tag: str, layout: Layout) -> str:
    shown = line.strip()[:200].replace("\t", " ")  # columns as a reader sees them
    where = "the last column" if layout.label is None else f"column {layout.label}"
    header = " If it is a header, name its columns in data.text and data.label." if number == 1 else ""
    return (
        f"{path}, line {number}: {shown!r} is not a word and a tag: {tag or 'nothing'!r} in {where} is no tag. A CoNLL file has a word "
        "in its first and a tag (O, B-TYPE or I-TYPE) in its last column, separated by a tab or spaces; data.text and data.label name "
        f"other columns, by number from 1.{advice(tag)}{header}"
    )


def _check_no_numbers(path: Path, sentences: list[list[str]], rows: list[tuple[int, str, list[str]]]) -> None:
    """Raises ValueError if the words count the words of their sentence."""
    if not any(len(words) > 1 for words in sentences):
        return
    if all(COUNT.fullmatch(word) for words in sentences for word in words):
        number, _, columns = next(row for row in rows if COUNT.fullmatch(row[2][0]))
        found = ", ".join(f"{i} is {column!r}" for i, column in enumerate(columns, start=1))
        raise ValueError(
            f"{path}: the first column numbers the words of a sentence (1, 2, 3), and would be read as the words. Name the columns by "
            f"their numbers, data.text and data.label; of line {number}, {found}. For example data.text: 2, data.label: 3."
        )
