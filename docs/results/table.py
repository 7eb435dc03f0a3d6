"""Prints a Markdown table from a CSV file of this folder; plain Python, no packages.

    python docs/results/table.py ner-fewshot.csv --only data=WNUT-17 method=deeper/concat --columns sentences --cells F1

A row a method and number of parameters (`--rows`), a column a value of `--columns`. A quantity that has a column `sd`
beside it is printed as mean ± deviation, one with `low` and `high` as a difference with its interval.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

FOLDER = Path(__file__).parent
Row = dict[str, str]


def shown(row: Row, name: str) -> str:
    """One quantity of a row as it stands in a table."""
    value = row[name]
    if not value:
        return ""
    if name == "method":
        return f"`{value}`"
    if f"{name} sd" in row:
        return f"{value} ± {row[f'{name} sd']}"
    if f"{name} low" in row:
        return f"{value} [{row[f'{name} low']}, {row[f'{name} high']}]"
    return f"{int(value):,}" if value.isdigit() else value


def markdown(
    rows: list[Row], heads: list[str], cells: list[str], columns: str | None = None, best: str | None = None
) -> str:
    """The table.

    Args:
        rows: The rows of the file to be shown.
        heads: The columns of the file that name a row of the table.
        cells: The quantities to show, for each value of `columns` where that is given.
        columns: The column of the file whose values become columns of the table.
        best: `max` or `min`: the best value of each quantity with a deviation is bold.
    """
    across = list(dict.fromkeys(row[columns] for row in rows)) if columns else [""]
    down = list(dict.fromkeys(tuple(row[head] for head in heads) for row in rows))
    at = {(tuple(row[h] for h in heads), row[columns] if columns else ""): row for row in rows}
    titles, table = list(heads), [[shown(dict(zip(heads, key, strict=True)), head) for head in heads] for key in down]
    for value in across:
        number = f"{int(value):,}" if value.isdigit() else value
        for cell in cells:
            titles.append(f"{number}: {cell}" if columns and len(cells) > 1 else number or cell)
            values = [at[key, value][cell] for key in down]
            top = (max if best == "max" else min)(map(float, values)) if best and f"{cell} sd" in rows[0] else None
            for line, key, text in zip(table, down, values, strict=True):
                entry = shown(at[key, value], cell)
                line.append(f"**{entry}**" if top is not None and float(text) == top else entry)
    lines = [titles, ["---"] * len(titles), *table]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(arguments: list[str] | None = None) -> str:
    """What the command prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--only", nargs="+", default=[], metavar="COLUMN=VALUE/VALUE", help="rows of the file to show")
    parser.add_argument("--rows", nargs="+", default=["method", "parameters"], metavar="COLUMN")
    parser.add_argument("--columns", metavar="COLUMN")
    parser.add_argument("--cells", nargs="+", required=True, metavar="COLUMN")
    parser.add_argument("--best", choices=("max", "min"), help="which value is bold")
    given = parser.parse_args(arguments)
    with (FOLDER / given.file).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for condition in given.only:
        name, _, values = condition.partition("=")
        rows = [row for row in rows if row[name] in values.split("/")]
    return markdown(rows, given.rows, given.cells, given.columns, given.best)


if __name__ == "__main__":
    print(table())
