"""Columns of a data file or data set: looked up by name, and checked for what is missing."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# Usual names of the two columns, those of GLUE's sets among them.
PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
)
# A list of texts or numbers as Python, pandas and numpy print it.
PRINTED_LIST = re.compile(r"""\[\s*(['"].*['"]|-?\d[-\d.,\s]*)?\s*\]""", re.DOTALL)
WRITE_LISTS = "Write the data as JSON Lines, which keeps lists: df.to_json(path, orient='records', lines=True)."


@dataclass
class Table:
    """Columns of one file or split.

    Attributes:
        columns: Values by the column's name, of equal length.
        source: Where they come from, for errors.
        holds: What a format with fixed columns holds, in words; None for tables with names of their own.
        classes: For columns whose classes the data number themselves, their names in the order of the numbers.
    """

    columns: dict[str, Sequence[Any]]
    source: str
    holds: str | None = None
    classes: dict[str, list[str]] = field(default_factory=dict)

    def column(self, wanted: str | None, usual: Sequence[str], key: str) -> str:
        """The name of a column.

        Args:
            wanted: The name that the recipe gives; None for the first of the usual ones.
            usual: The usual names.
            key: The recipe's key, for errors.

        Raises:
            ValueError: If there is none; lists those that exist.
        """
        for name in (wanted,) if wanted else usual:
            if name in self.columns:
                return name
        looked_for = repr(wanted) if wanted else ", ".join(map(repr, usual))
        if self.holds is not None:
            raise ValueError(
                f"{self.source}: {self.holds}, and no column {looked_for}, which the task reads ({key}). Choose the task that fits "
                "the file, or set data.format if it has another format than its name says."
            )
        raise ValueError(
            f"{self.source} has no column {looked_for}; it has {', '.join(map(repr, self.columns))}. Set {key} to one of these."
        )

    def pair(self) -> tuple[str, str] | None:
        """The two columns of a pair of texts, by their usual names; None if there are none."""
        return next((pair for pair in PAIRS if all(name in self.columns for name in pair)), None)

    def texts(self, name: str) -> list[str]:
        """A column of whole texts. Raises ValueError, with the row, for a missing value or a list."""
        return [str(value) for value in self.values(name)]

    def values(self, name: str, empty: bool = True, lists: bool = False) -> Sequence[Any]:
        """A column's values.

        Args:
            name: The column.
            empty: Whether an empty text is a value.
            lists: Whether values are lists, of which each part must be there.

        Raises:
            ValueError: If a value is missing (null, NaN, or empty), or is a list where one text belongs.
        """
        for row, value in enumerate(self.columns[name]):
            parts = value if lists and isinstance(value, list) else [value]
            if any(is_missing(part) or (part == "" and not empty) for part in parts):
                raise ValueError(
                    f"{self.source}, row {row}: column {name!r} has no value (null, NaN or empty). Remove the row, or fill it in."
                )
            if not lists and isinstance(value, (list, dict)):
                raise ValueError(
                    f"{self.source}, row {row}: column {name!r} holds a {type(value).__name__} where one text belongs. Name "
                    "another column (data.text, data.label), or join its parts."
                )
        return self.columns[name]


def is_printed_list(value: Any) -> bool:
    """Whether a text is a list as it is printed, `['a', 'b']`: a file of text has none other."""
    return isinstance(value, str) and PRINTED_LIST.fullmatch(value.strip()) is not None


def is_missing(value: Any) -> bool:
    """None, or NaN, which Python and pandas write for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))
