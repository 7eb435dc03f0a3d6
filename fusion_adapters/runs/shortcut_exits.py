"""Early exit from a recipe of shortcuts: thresholds for an agreement on development data, and what they save on test data."""

from __future__ import annotations

import csv
import dataclasses
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..shortcuts import (
    IDENTITY,
    Calibration,
    Margins,
    Readout,
    Saving,
    ShortcutSet,
    calibrate,
    choose_exits,
    exit_curve,
    exit_margins,
    load_shortcuts,
    text_margins,
)
from ..shortcuts.saving import backbone_of
from ..shortcuts.stream import Rows
from .environment import denormals_flushed, versions
from .files import check_output, json_text, written_aside
from .shortcut_figures import draw_exits
from .shortcut_models import Subject, backbone_recipe, load_subject, rows_of
from .shortcut_recipe import ShortcutRecipe
from .shortcut_runs import check_there, spread, write_run

EXITS = "shortcut exits"
COLUMNS = ("kind", "threshold", "agreement", "saved", "layers", "looks", "positions")


@denormals_flushed()
def exit_recipe(
    recipe: ShortcutRecipe,
    shortcuts: str | Path,
    output: str | Path,
    agreement: float = 0.95,
    count: int = 3,
    overwrite: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Finds, for each kind of shortcut, when to leave the model early, and judges it on test data.

    The folder holds `exits.json` (calibrations, and the options for `EarlyExit`), `exits.csv` and `exits.png` (layers saved over
    agreement), `summary.md`, `recipe.yaml` and `run.json`. It appears when it is complete.

    Args:
        recipe: The recipe; its dev rows are those of the calibration, its test rows those of the judgement, `evaluation.rows` of each.
        shortcuts: A folder that `fit_recipe` wrote.
        output: The folder, new or empty.
        agreement: The share of positions (of a classifier: texts) that keep the full model's choice.
        count: Also choose so many layers to leave at, by what a look at the head costs.
        overwrite: Replace earlier exits in that folder.

    Returns:
        The folder, and the content of `exits.json`.

    Raises:
        FileNotFoundError: If there are no shortcuts in the folder, or a file of the data is missing.
        ValueError: If there is no test data, or agreement, count, shortcuts, data and model do not fit.
    """
    check_there(shortcuts)
    if not 0 < agreement <= 1 or count < 1:
        raise ValueError(
            f"agreement={agreement}, exits={count}: the agreement is a share above 0 and at most 1 (0.95 is the usual one), and there is "
            "at least one layer to leave at."
        )
    output = check_output(output, overwrite, EXITS)
    started = time.perf_counter()
    subject = load_subject(recipe)
    maps = load_shortcuts(shortcuts, subject.model)
    encoded = rows_of(recipe, subject)
    if "test" not in encoded:
        raise ValueError(
            "The data have no test examples, and what a threshold saves is told on others than those that it was chosen on. Name them in "
            "data.test, or set data.test_fraction."
        )
    rows = {name: spread(encoded[name].rows, recipe.evaluation.rows) for name in ("dev", "test")}
    look_cost = _look_cost(subject) if recipe.task.vocabulary_head else 0.0
    with written_aside(output, overwrite, EXITS) as folder:
        found: dict[str, Any] = {}
        curves: dict[str, list[Saving]] = {}
        for kind in dict.fromkeys((IDENTITY, *maps.kinds())):
            dev, test = (_margins(recipe, subject, maps, rows[name], kind) for name in ("dev", "test"))
            few = choose_exits(dev, count, agreement, look_cost)
            found[kind] = {
                "all": _as_json(calibrate(dev, agreement, test)),
                "few": _as_json(calibrate(dev.only(few), agreement, test)),
            }
            curves[kind] = exit_curve(test, mean_length=dev.mean_length)
        result = {"agreement": agreement, "look_cost": look_cost, "kinds": found}
        (folder / "exits.json").write_text(json_text(result), encoding="utf-8")
        (folder / "exits.csv").write_text(_csv(curves), encoding="utf-8")
        model = backbone_recipe(recipe).model
        (folder / "summary.md").write_text(_summary(result, model, maps.num_layers), encoding="utf-8")
        draw_exits(curves, agreement, folder / "exits.png", f"{model}: early exit on test data")
        run = {
            "kind": EXITS,
            "recipe": recipe.model_dump(),
            "rows": {name: len(some) for name, some in rows.items()},
            "seconds": round(time.perf_counter() - started, 2),
            "versions": versions(),
        }
        write_run(folder, recipe, run)
    return output, result


def _margins(recipe: ShortcutRecipe, subject: Subject, maps: ShortcutSet, rows: Rows, kind: str) -> Margins:
    size = recipe.shortcuts.batch_size
    if not recipe.task.vocabulary_head:
        return text_margins(subject.model, maps, rows, subject.collator, kind, batch_size=size)
    choice = recipe.options().choice(backbone_of(subject.model).causal)
    readout = Readout(subject.model)
    return exit_margins(subject.model, maps, rows, subject.collator, kind, None, choice, readout=readout, batch_size=size)


def _look_cost(subject: Subject) -> float:
    """What a look at the head over the vocabulary costs, in blocks, by the parameters that are multiplied."""
    head, block = Readout(subject.model).head, backbone_of(subject.model).blocks[0]
    return sum(p.numel() for p in head.parameters()) / sum(p.numel() for p in block.parameters())


def _as_json(found: Calibration) -> dict[str, Any]:
    options = found.options()
    said = {"layers": list(options.layers), "threshold": options.threshold, "kind": options.kind}
    return {"options": {**said, "mean_length": options.mean_length}, **found.as_json()}


def _csv(curves: Mapping[str, list[Saving]]) -> str:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows({"kind": kind, **dataclasses.asdict(point)} for kind, curve in curves.items() for point in curve)
    return table.getvalue()


def _summary(result: dict[str, Any], model: str, num_layers: int) -> str:
    """The calibrations as Markdown."""
    share = f"{100 * result['agreement']:g} %"
    lines = [
        f"# Early exit of {model}, {num_layers} blocks",
        "",
        f"Thresholds are the lowest with an agreement of {share} on dev; agreement and layers saved are on test, 95 % intervals over rows, "
        "where there are twenty or more.",
        "`all`: a look at the head after every block, the paper's measure, which counts no looks; `few`: at the chosen layers alone.",
        "",
        "| kind | exits | lambda | agreement | layers saved | looks that end nothing |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, each in result["kinds"].items():
        for name, found in each.items():
            test, layers = found["test"], found["layers"]
            exits = "all" if name == "all" else f"few: {', '.join(map(str, layers))}"
            agreement = _percent(test["agreement"], test["agreement_interval"])
            saved = _percent(test["saved"], test["saved_interval"])
            threshold = found["dev"]["threshold"]
            lines.append(f"| {kind} | {exits} | {threshold:.3f} | {agreement} | {saved} | {test['looks']:.2f} |")
    return "\n".join(lines) + "\n"


def _percent(value: float, interval: tuple[float, float] | None) -> str:
    between = "" if interval is None else f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
    return f"{100 * value:.1f} %{between}"
