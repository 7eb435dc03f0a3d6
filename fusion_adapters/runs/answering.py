"""Several runs that answer together: the backbone is loaded once, and runs once for each row that they have in common."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tasks.base import Asking
from ..tuner import fusion_layers
from ..tuner.active import adapters_in_use
from ..tuner.many import ManyAdapters
from .loading import check_lengths
from .predicting import TrainedRun, attach_run, check_text
from .sharing import Described, SharedBackbone, describe

Row = Mapping[str, Any]


def load_runs(folders: Sequence[str | Path] | Mapping[str, str | Path]) -> LoadedRuns:
    """Reloads runs that `fusion-adapters train` wrote on one backbone, which is loaded once.

    ```python
    runs = load_runs(["outputs/entities", "outputs/intent"])
    for answers in runs.predict(["Farouk bought a Mistral 2."]):
        answers["entities"]["entities"], answers["intent"]["label"]
    ```

    Args:
        folders: The folders of the runs; each is named by its folder, with as much of the path before it as makes it unique. Or
            folders by names of your own.

    Raises:
        OSError: If a folder holds no run, or the backbone is not to be had.
        ValueError: If there is no folder, one is given twice, the runs stand on different backbones, or one of them is damaged or
            does not fit; the message names its folder.
    """
    if not folders:
        raise ValueError("There is no run to load. Give at least one folder that was --output of fusion-adapters train.")
    named = folders if isinstance(folders, Mapping) else dict(zip(names_of(folders), folders, strict=True))
    described = {name: describe(folder) for name, folder in named.items()}
    backbone = SharedBackbone(list(described.values()))
    return LoadedRuns({name: _loaded(run, backbone, i) for i, (name, run) in enumerate(described.items())})


class LoadedRuns:
    """Reloaded runs on one backbone.

    Args:
        runs: By name. The adapter of each has a name that no other has.

    Attributes:
        runs: The same. Each is a run like any other (`predict`, `depth_map`), in memory with no backbone of its own.
        apart: By the name of a run that does not share passes, why not.
    """

    def __init__(self, runs: dict[str, TrainedRun]) -> None:
        self.runs = runs
        self.apart = {name: reason for name, run in runs.items() if (reason := _apart(run)) is not None}
        self._adapters = {name: str(run.model.active_adapter) for name, run in runs.items() if name not in self.apart}
        self._many = ManyAdapters(*(runs[name].model for name in self._adapters)) if self._adapters else None

    @property
    def names(self) -> list[str]:
        """The names of the runs, in the order in which they were given."""
        return list(self.runs)

    def predict(self, texts: Iterable[str]) -> Iterator[dict[str, dict[str, Any]]]:
        """What each run predicts of each text, one text after the other.

        The answers of a run are those that it gives alone, see `predict`. The backbone runs once for each row of a text that is
        the same for all who ask for it: the same pieces, as runs whose tasks cut the text alike have them.

        Args:
            texts: Plain texts; they are read one by one.

        Yields:
            For each text the predictions by the name of the run.

        Raises:
            ValueError: If a text does not fit a run's task, or is longer than the backbone has positions; the message names the run.
        """
        for text in texts:
            check_text(text)
            yield self._answers(text)

    def to(self, device: Any) -> LoadedRuns:
        """Moves the runs to a device, the weights that they share once; returns this."""
        for module in (*(run.model for run in self.runs.values()), *([] if self._many is None else [self._many.host])):
            module.to(device)
        return self

    def _answers(self, text: str) -> dict[str, dict[str, Any]]:
        asking = {name: run.recipe.task.asking(run, [text]) for name, run in self.runs.items()}
        answers: dict[str, dict[str, Any]] = {}
        given: dict[str, list[Tensor] | None] = dict.fromkeys(asking)
        while given:
            asked = {}
            for name, logits in given.items():
                rows = self._step(name, asking[name], logits, answers)
                if rows is not None:
                    asked[name] = rows
            given = dict(self._logits(asked))
        return {name: answers[name] for name in self.runs}

    def _step(
        self, name: str, asking: Asking, logits: list[Tensor] | None, answers: dict[str, dict[str, Any]]
    ) -> list[dict[str, Any]] | None:
        """The rows that a run asks for next; None once it has answered."""
        try:
            rows = next(asking) if logits is None else asking.send(logits)
            check_lengths(self.runs[name].model, rows)
            return rows
        except StopIteration as done:
            (answers[name],) = done.value
            return None
        except ValueError as error:
            raise ValueError(f"The run {name!r} cannot answer: {error}") from error

    def _logits(self, asked: Mapping[str, Sequence[Row]]) -> dict[str, list[Tensor]]:
        """What `TrainedRun.logits` of each run gives for the rows that it asks for."""
        found = {name: self.runs[name].logits(rows) for name, rows in asked.items() if name not in self._adapters}
        wanted: dict[Any, list[str]] = {}
        inputs: dict[Any, Row] = {}
        for name, rows in asked.items():
            for row in rows if name in self._adapters else ():
                key = _key(row)
                inputs.setdefault(key, row)
                names = wanted.setdefault(key, [])
                if name not in names:
                    names.append(name)
        logits = {key: self._pass(inputs[key], names) for key, names in wanted.items()}
        shared = {n: [logits[_key(row)][n] for row in rows] for n, rows in asked.items() if n in self._adapters}
        return {**found, **shared}

    def _pass(self, row: Row, names: Sequence[str]) -> dict[str, Tensor]:
        """The logits of a row for those runs, by one pass; rows are never batched, see `TrainedRun.logits`."""
        assert self._many is not None
        device = self.runs[names[0]].model.device
        batch: dict[str, Any] = {k: torch.tensor([v], device=device) for k, v in row.items() if k != "labels"}
        outputs = self._many(adapters=[self._adapters[name] for name in names], **batch)
        return {name: outputs[self._adapters[name]].logits[0].float().cpu() for name in names}


def names_of(folders: Sequence[str | Path]) -> list[str]:
    """The names of runs: of each folder as much of the end of its path as no other has.

    Raises:
        ValueError: If a folder is given twice.
    """
    real = [os.path.realpath(folder) for folder in folders]
    twice = next((i for i, path in enumerate(real) if path in real[:i]), None)
    if twice is not None:
        first = folders[real.index(real[twice])]
        as_well = "" if str(first) == str(folders[twice]) else f", as {str(first)!r} too"
        raise ValueError(f"The run {str(folders[twice])!r} is given twice{as_well}. Give each run once.")
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    names = []
    for own in parts:
        lengths = range(1, len(own) + 1)
        length = next(n for n in lengths if n == len(own) or sum(other[-n:] == own[-n:] for other in parts) == 1)
        names.append(Path(*own[-length:]).as_posix())
    return names


def _loaded(run: Described, backbone: SharedBackbone, number: int) -> TrainedRun:
    try:
        # a folder may have dots in its name, which an adapter may not
        return attach_run(backbone.model(run), backbone.tokenizer(run), run.folder, run.recipe, run.labels, f"run{number}")
    except ValueError as error:
        raise ValueError(f"The run {str(run.folder)!r} cannot be loaded beside the others: {error}") from error


def _apart(run: TrainedRun) -> str | None:
    """Why a run has passes of its own, in words that go after its name; None if it shares those of the others."""
    layers = fusion_layers(run.model)
    if run.recipe.task.predicts_next:
        return "writes text, and what comes after each piece depends on it"
    if len(layers) > 1 or layers[0].backbone.stack is not None:
        return "is on an encoder-decoder, whose decoder reads what the encoder's fusion answers"
    if layers[0].calls is not None and layers[0].calls.layerwise:
        return "has LoRA in the blocks, which changes them"
    if adapters_in_use(layers[0].running) != "none":
        return "trained modules before or in the blocks (modules_to_save), which changes them"
    return None


def _key(row: Row) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(row[name])) for name in sorted(row) if name != "labels")
