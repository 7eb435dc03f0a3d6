"""Recipes of linear shortcuts become folders: fitted, judged, looked at."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from ..shortcuts import Readout, fit_shortcuts, load_shortcuts, save_shortcuts
from ..shortcuts.evaluate import Score, evaluate_shortcuts
from ..shortcuts.lens import View, look
from ..shortcuts.saving import CONFIG, backbone_of
from ..shortcuts.stream import Rows
from ..shortcuts.texts import TextReadout
from ..tasks.base import Encoded
from .environment import denormals_flushed, versions
from .files import check_output, json_text, written_aside
from .memory import forget_peak, peak_of_process
from .predicting import check_text
from .shortcut_models import Subject, backbone_recipe, load_subject, rows_of
from .shortcut_recipe import ShortcutRecipe, parse_shortcut_recipe
from .shortcut_report import write_report
from .tokenizers import pieces_as_text

KIND, SCORES = "shortcuts", "shortcut scores"
EVALUATION = "evaluation"  # in the folder of the shortcuts


@denormals_flushed()
def fit_recipe(recipe: ShortcutRecipe, output: str | Path, overwrite: bool = False) -> dict[str, Any]:
    """Fits the shortcuts that a recipe describes and writes them to a folder.

    The folder holds `shortcuts.safetensors` and `shortcuts.json`, `recipe.yaml` and `run.json` (recipe, positions, seconds, versions).
    It appears when it is complete. The sums of a fit that was stopped stay beside it, and the next call for the same folder goes on
    with them.

    Args:
        recipe: The recipe; it fits to the rows of `data.train`.
        output: The folder, new or empty.
        overwrite: Replace earlier shortcuts in that folder.

    Returns:
        The content of `run.json`.

    Raises:
        SingularError: If the least squares have no one solution.
        StaleCacheError: If the sums beside the folder are those of another fit.
        ValueError: If data, options and model do not fit.
        OSError: If the model, the data or the output folder cannot be read or written.
    """
    output = check_output(output, overwrite, KIND)
    forget_peak()
    started = time.perf_counter()
    subject = load_subject(recipe)
    encoded = rows_of(recipe, subject)["train"]
    sums = output.with_name(f".{output.name}.sums")
    with written_aside(output, overwrite, KIND) as folder:
        fitted = fit_shortcuts(subject.model, encoded.rows, subject.collator, recipe.options(), folder=sums)
        notes = {
            "positions": fitted.positions,
            "rows": len(encoded.rows),
            "options": dataclasses.asdict(recipe.options()),
            "data": {"path": Path(recipe.data.path).name, "train": recipe.data.train},
            "run": None if recipe.run is None else Path(recipe.run).name,
        }
        subject.model.config._name_or_path = backbone_recipe(recipe).model  # not the folder of an installed package
        save_shortcuts(fitted.shortcuts, subject.model, folder, notes)
        run = {
            "kind": KIND,
            "recipe": recipe.model_dump(),
            "positions": fitted.positions,
            "rows": len(encoded.rows),
            "notes": encoded.notes,
            "shortcuts": len(fitted.shortcuts),
            "seconds": {"fit": round(fitted.seconds, 2), "total": round(time.perf_counter() - started, 2)},
            "peak_memory_mib": peak_of_process(),
            "bytes": {path.name: path.stat().st_size for path in sorted(folder.glob("shortcuts.*"))},
            "versions": versions(),
        }
        write_run(folder, recipe, run)
    shutil.rmtree(sums, ignore_errors=True)
    return run


@denormals_flushed()
def evaluate_recipe(
    recipe: ShortcutRecipe, shortcuts: str | Path, output: str | Path | None = None, overwrite: bool = False
) -> tuple[Path, list[Score]]:
    """Judges shortcuts on data that they were not fitted to, beside the states as they are (`identity`).

    The folder holds `scores.json`, `scores.csv`, `summary.md`, pictures, `recipe.yaml` and `run.json`. It appears when it is complete.

    Args:
        recipe: The recipe; `evaluation` in it says by which rows.
        shortcuts: A folder that `fit_recipe` or `save_shortcuts` wrote.
        output: The folder, new or empty; None for `evaluation` in that of the shortcuts.
        overwrite: Replace earlier scores in that folder.

    Returns:
        The folder, and the scores.

    Raises:
        FileNotFoundError: If there are no shortcuts in the folder, or a file of the data is missing.
        ValueError: If the shortcuts were fitted on another backbone, or data and model do not fit.
    """
    check_there(shortcuts)
    output = check_output(Path(shortcuts) / EVALUATION if output is None else output, overwrite, SCORES)
    started = time.perf_counter()
    subject = load_subject(recipe)
    maps = load_shortcuts(shortcuts, subject.model)
    name, rows = judged_rows(recipe, rows_of(recipe, subject))
    with written_aside(output, overwrite, SCORES) as folder:
        scores = evaluate_shortcuts(
            subject.model,
            maps,
            rows,
            subject.collator,
            recipe.options().choice(backbone_of(subject.model).causal),
            readout=readout_of(recipe, subject),
            batch_size=recipe.shortcuts.batch_size,
        )
        run = {
            "kind": SCORES,
            "recipe": recipe.model_dump(),
            "split": name,
            "rows": len(rows),
            "seconds": round(time.perf_counter() - started, 2),
            "versions": versions(),
        }
        write_report(scores, maps.num_layers, backbone_recipe(recipe).model, run, folder)
        write_run(folder, recipe, run)
    return output, scores


def judged_rows(recipe: ShortcutRecipe, encoded: dict[str, Encoded]) -> tuple[str, Rows]:
    """The split that shortcuts are judged by, and the rows of it.

    Raises:
        ValueError: If the data do not have that split.
    """
    name = recipe.evaluation.split or ("test" if "test" in encoded else "dev")
    if name not in encoded:
        raise ValueError(
            f"evaluation.split: {name}, and the data have no such examples. Name their file in data.{name}, or choose the other split."
        )
    return name, spread(encoded[name].rows, recipe.evaluation.rows)


def spread(rows: Rows, most: int | None) -> Rows:
    """So many of some rows, from all parts of them; None for all."""
    if most is None or most >= len(rows):
        return rows
    return [rows[i * len(rows) // most] for i in range(most)]


def readout_of(recipe: ShortcutRecipe, subject: Subject) -> Readout | TextReadout:
    """What the model's head says of a state."""
    return Readout(subject.model) if recipe.task.vocabulary_head else TextReadout(subject.model)


@dataclasses.dataclass
class TextView:
    """What the layers of a language model say of a text.

    Attributes:
        pieces: The pieces of the text, `T` of them.
        view: What the `N` layers say.
        said: Its tokens as text, `N` lists of `T`.
        model: The model's name.
        skip: So many positions at the beginning were left out of the fit.
        next: Whether what is said at a position is the piece after it.
    """

    pieces: list[str]
    view: View
    said: list[list[str]]
    model: str
    skip: int
    next: bool


def view_text(folder: str | Path, text: str, kind: str | None = None) -> TextView:
    """What each layer of a language model would say at each position of a text.

    Args:
        folder: A folder that `fit_recipe` wrote.
        text: The text; of a masked language model with its mask token where something is to be said.
        kind: The kind of shortcuts, see `look`.

    Raises:
        FileNotFoundError: If there are no shortcuts in the folder.
        ValueError: If they are those of a classifier, or the text is empty.
    """
    check_text(text)
    recipe = read_fitted(folder)
    if not recipe.task.vocabulary_head:
        raise ValueError(
            f"The shortcuts in {str(folder)!r} are of task: {recipe.task.name}, whose head says a class of a whole text and no token of a "
            "position. Look at those of a language model (task: causal_lm or masked_lm)."
        )
    subject = load_subject(recipe)
    maps = load_shortcuts(folder, subject.model)
    pieces = subject.tokenizer(text, truncation=True, max_length=recipe.data.max_length)["input_ids"]
    view = look(subject.model, maps, pieces, readout=Readout(subject.model), kind=kind)
    names = [str(name) for name in subject.tokenizer.convert_ids_to_tokens(pieces)]
    said = [[_as_text(subject, token) for token in row] for row in view.tokens.tolist()]
    shown, skip = pieces_as_text(subject.tokenizer, names), recipe.options().choice(backbone_of(subject.model).causal).skip
    return TextView(shown, view, said, backbone_recipe(recipe).model, skip, recipe.task.predicts_next)


def read_fitted(folder: str | Path) -> ShortcutRecipe:
    """The recipe of shortcuts that `fit_recipe` wrote.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If their description is damaged.
    """
    check_there(folder)
    description = Path(folder) / "run.json"
    if not description.is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} holds shortcuts without run.json, which says for what model and data they are. Give a folder that "
            "fusion-adapters shortcuts fit wrote."
        )
    try:
        values = json.loads(description.read_text(encoding="utf-8"))["recipe"]
        assert isinstance(values, dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{str(description)!r} is damaged. Fit the shortcuts again, or restore the file.") from error
    return parse_shortcut_recipe(values, str(description))


def check_there(folder: str | Path) -> None:
    """Raises FileNotFoundError if a folder holds no shortcuts."""
    if not (Path(folder) / CONFIG).is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} holds no shortcuts: there is no {CONFIG} in it. Give the folder that was --output of fusion-adapters "
            "shortcuts fit."
        )


def _as_text(subject: Subject, token: int) -> str:
    # alone: what layers say at neighbouring positions are no pieces of one word
    return pieces_as_text(subject.tokenizer, [str(subject.tokenizer.convert_ids_to_tokens(token))])[0]


def write_run(folder: Path, recipe: ShortcutRecipe, run: dict[str, Any]) -> None:
    """Writes what was done, and the recipe of it."""
    (folder / "run.json").write_text(json_text(run), encoding="utf-8")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(), sort_keys=False), encoding="utf-8")
