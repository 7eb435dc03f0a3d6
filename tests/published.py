"""The table in docs/backbones.md: a test that measures a cell checks it against what is published.

`pytest --publish tests/backbone/test_backbones.py` writes the table instead (`make backbones`).
"""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "backbones.md"
BEGIN, END = "<!-- table: make backbones -->\n", "<!-- end of table -->"
COLUMNS = (
    "blocks",
    "answer",
    "norm",
    "heads",
    "alone",
    "with LoRA",
    "8-bit",
    "checkpointing",
    "compile",
    "cached generation",
)


class Table:
    """Rows by family, cells by column."""

    def __init__(self, publish: bool) -> None:
        self.publish = publish
        self.measured: dict[str, dict[str, set[str]]] = {}
        self.published = self._read()

    def cell(self, family: str, column: str, value: str) -> None:
        """Notes what a test has found; fails if the page says something else."""
        assert column in COLUMNS, column
        self.measured.setdefault(family, {}).setdefault(column, set()).add(value)
        if not self.publish:
            said = self.published.get(family, {}).get(column)
            assert said == value, (
                f"docs/backbones.md says {said!r} for {family}, {column}; found {value!r}. Run: make backbones"
            )

    def write(self, families: list[str]) -> None:
        """Writes the measured table into the page; a cell that no test reached says so."""
        lines = ["| family | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
        for family in families:
            cells = self.measured.get(family, {})
            lines.append(f"| {family} | " + " | ".join(_joined(cells.get(c, {"FAILED"})) for c in COLUMNS) + " |")
        text = PAGE.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        PAGE.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + rest.split(END)[1], encoding="utf-8")

    def _read(self) -> dict[str, dict[str, str]]:
        if not PAGE.is_file():
            return {}
        rows = re.findall(
            r"^\| (.*) \|$", PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0], flags=re.M
        )
        cells = [row.split(" | ") for row in rows[2:]]
        return {row[0]: dict(zip(COLUMNS, row[1:], strict=True)) for row in cells}


def _joined(values: set[str]) -> str:
    return "; ".join(sorted(values))
