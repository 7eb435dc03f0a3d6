"""Tagging schemes: whatever the data have becomes BIO."""

from __future__ import annotations

from collections.abc import Sequence

# how BIO writes the marks of BIOES and BILOU: last and single words
BIO = {"B": "B", "I": "I", "E": "I", "L": "I", "S": "B", "U": "B"}


def is_tag(tag: str) -> bool:
    """Whether a tag is `O`, or a mark of BIO, BIOES or BILOU with a type, `B-PER`."""
    mark, dash, kind = tag.partition("-")
    return tag == "O" or (mark in BIO and bool(dash) and bool(kind))


def to_bio(tags: Sequence[str]) -> list[str]:
    """IOB1, BIOES and BILOU to BIO, in which every entity begins with `B-`; BIO stays as it is. For `is_tag` tags."""
    previous = "O"
    result = []
    for tag in tags:
        if tag != "O":
            mark, _, kind = tag.partition("-")
            begins = BIO[mark] == "B" or previous[2:] != kind
            result.append(f"{'B' if begins else 'I'}-{kind}")
        else:
            result.append(tag)
        previous = tag
    return result
