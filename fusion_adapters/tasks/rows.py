"""Sequences of pieces cut into rows, such that every labelled piece is predicted once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .base import IGNORED


def tiled(pieces: Sequence[int], max_length: int) -> Iterator[dict[str, Any]]:
    """Cuts running text: a row begins with the last piece of the one before, which has no label there.

    The first piece of the sequence, which nothing predicts, has none either.

    Args:
        pieces: The ids of the text.
        max_length: Pieces per row, 2 or more.

    Yields:
        Rows with `input_ids`, `attention_mask` and `labels`, the ids themselves but for the first.
    """
    for start in range(0, len(pieces) - 1, max_length - 1):
        own = list(pieces[start : start + max_length])
        yield _row(own, [IGNORED, *own[1:]])


def windowed(pieces: Sequence[int], labels: Sequence[int], max_length: int) -> list[tuple[int, dict[str, Any]]]:
    """Cuts a sequence of which parts have labels, so that before the first labelled piece of a row as much is left as fits.

    That is at least half a row, or all that comes before. One row, if the sequence fits in it.

    Args:
        pieces: The ids of the sequence.
        labels: The ids of the pieces that are to be predicted, else -100; the first piece, which nothing predicts, counts as such.
        max_length: Pieces per row, 2 or more.

    Returns:
        For each row its first position in the sequence, and the row as in `tiled`. None if nothing is to be predicted.
    """
    found = []
    total, done = len(pieces), 1
    while (first := next((i for i in range(done, total) if labels[i] != IGNORED), None)) is not None:
        start = max(0, min(first - max_length // 2, total - max_length))
        done = min(total, start + max_length)
        wanted = [IGNORED] * (first - start) + list(labels[first:done])
        found.append((start, _row(list(pieces[start:done]), wanted)))
    return found


def _row(pieces: list[int], labels: list[int]) -> dict[str, Any]:
    return {"input_ids": pieces, "attention_mask": [1] * len(pieces), "labels": labels}
