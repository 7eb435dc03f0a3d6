"""Tagging schemes: whatever the data have becomes BIO."""

from __future__ import annotations

import re
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


def rewritten(tag: str) -> str | None:
    """A tag with another joint (`B_PER`), order (`PER-B`) or case (`b-PER`, `o`) as it should be written; None for others."""
    if tag == "o":
        return "O"
    if found := re.fullmatch(r"([BIELSU])[_.:/|+=~](.+)", tag):
        return f"{found[1]}-{found[2]}"
    if found := re.fullmatch(r"([bielsu])[-_.:/|](.+)", tag):
        return f"{found[1].upper()}-{found[2]}"
    if found := re.fullmatch(r"(.{2,})[-_.:/|]([BIELSU])", tag):
        return f"{found[2]}-{found[1]}"
    return None


def advice(tag: str) -> str:
    """A sentence on what to write instead of a tag with another joint, with a blank before it; empty for other tags."""
    right = rewritten(tag)
    return "" if right is None else f" Write {right} for {tag}, in all tags alike."
