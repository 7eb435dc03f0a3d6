"""What runs answer to texts, as the shell gives it out: lines of JSON, rich text, a table of several runs, a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.markup import escape
from rich.table import Table
from tqdm.auto import tqdm

from ..backbone.atomic import written_whole
from .answering import LoadedRuns, load_runs
from .predicting import load_run, predict
from .terminal import json_line, visible


class Answers(Protocol):
    """What one run or several answer to texts.

    Attributes:
        notes: What a person should know of the runs, a sentence each.
    """

    notes: list[str]

    def lines(self, texts: Sequence[str]) -> Iterator[str]:
        """JSON, a line a text."""

    def shown(self, texts: Sequence[str]) -> Iterator[str | Table]:
        """What a terminal shows of each text."""

    def write(self, texts: Sequence[str], path: Path) -> None:
        """Writes the lines to a file, with a progress bar. The file is there when all texts are answered, and not before."""


def answers_of(folders: Sequence[str | Path], output: Path | None = None) -> Answers:
    """Loads one run or several, see `load_run` and `load_runs`.

    Args:
        folders: Their folders.
        output: The file that will be written, if any.

    Raises:
        IsADirectoryError: If the output is a folder; nothing is loaded then.
    """
    if output is not None and output.is_dir():
        raise IsADirectoryError(
            f"The output {str(output)!r} is a folder. Give the name of a file, for example {str(output / 'answers.jsonl')!r}."
        )
    return _OneRun(folders[0]) if len(folders) == 1 else _SeveralRuns(load_runs(folders))


class _OneRun:
    """A run by itself: its predictions as they are, all of them before the first is shown."""

    def __init__(self, folder: str | Path) -> None:
        self.notes: list[str] = []
        self._run = load_run(folder)

    def lines(self, texts: Sequence[str]) -> Iterator[str]:
        return map(json_line, predict(self._run, texts))

    def shown(self, texts: Sequence[str]) -> Iterator[str | Table]:
        return (visible(self._run.recipe.task.shown(prediction)) for prediction in predict(self._run, texts))

    def write(self, texts: Sequence[str], path: Path) -> None:
        _write((json_line(*predict(self._run, [text])) for text in _progress(texts)), path)


class _SeveralRuns:
    """Runs beside each other: for each text an object of their answers by name, or a table."""

    def __init__(self, runs: LoadedRuns) -> None:
        self.notes = [f"{name} {reason}: its passes are its own." for name, reason in runs.apart.items()]
        self._runs = runs

    def lines(self, texts: Sequence[str]) -> Iterator[str]:
        return map(json_line, self._values(self._told(texts)))

    def shown(self, texts: Sequence[str]) -> Iterator[str | Table]:
        answered = self._runs.predict(self._told(texts))
        return (self._table(text, answers) for text, answers in zip(texts, answered, strict=True))

    def write(self, texts: Sequence[str], path: Path) -> None:
        _write(map(json_line, self._values(_progress(texts))), path)

    def _told(self, texts: Sequence[str]) -> Any:
        """With a progress bar, unless the answers themselves come to the terminal."""
        return texts if sys.stdout.isatty() else _progress(texts)

    def _values(self, texts: Any) -> Iterator[dict[str, Any]]:
        for text in texts:
            (answers,) = self._runs.predict([text])
            yield {"text": text, "answers": {name: _beside(text, found) for name, found in answers.items()}}

    def _table(self, text: str, answers: dict[str, dict[str, Any]]) -> Table:
        table = Table(title=escape(visible(text)), title_justify="left", title_style="", show_header=False)
        table.add_column(style="bold", min_width=max(map(len, answers)))  # the same for all texts
        table.add_column(overflow="fold")
        for name, found in answers.items():
            table.add_row(escape(visible(name)), visible(self._runs.runs[name].recipe.task.answer(found)))
        return table


def _beside(text: str, prediction: dict[str, Any]) -> dict[str, Any]:
    """A prediction without its text where that stands beside it; of a pair the two texts stay."""
    return {key: value for key, value in prediction.items() if (key, value) != ("text", text)}


def _progress(texts: Sequence[str]) -> Any:
    return tqdm(texts, unit="text", desc="answers", disable=len(texts) < 2)


def _write(lines: Iterator[str], path: Path) -> None:
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
