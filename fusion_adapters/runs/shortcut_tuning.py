"""Shortcuts of a recipe are trained by what the head says, from fitted ones on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..shortcuts import ShortcutSet, TuneOptions, load_shortcuts, save_shortcuts, tune_shortcuts
from .environment import denormals_flushed, versions
from .files import check_output, json_text, written_aside
from .memory import forget_peak, peak_of_process
from .shortcut_models import backbone_recipe, load_subject, rows_of
from .shortcut_recipe import ShortcutRecipe
from .shortcut_runs import KIND, check_there, spread, write_run

TRAINING = "training.json"


@denormals_flushed()
def tune_recipe(
    recipe: ShortcutRecipe,
    shortcuts: str | Path,
    output: str | Path,
    layers: Sequence[int] | None = None,
    epochs: int = 4,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Trains shortcuts by the divergence of what the head says after the cast, see `tune_shortcuts`.

    The folder is one of shortcuts, as `fit_recipe` writes it, with the given ones and the trained ones (kinds `kl` and `kl fused`) in it,
    and `training.json`: the divergence of each after each pass. It appears when it is complete.

    Args:
        recipe: The recipe; it trains on the rows of `data.train`, and keeps of each map the state that is best on those of dev.
        shortcuts: A folder that `fit_recipe` wrote: where to start.
        output: The folder, new or empty.
        layers: Train those from these layers alone; None for all to the last layer, each of which costs several applications of the head
            a position and pass.
        epochs: Passes over the positions.
        overwrite: Replace earlier shortcuts in that folder.

    Returns:
        The content of `run.json`.

    Raises:
        FileNotFoundError: If there are no shortcuts in the folder, or a file of the data is missing.
        ValueError: If the task has no head over a vocabulary, no shortcut goes from one of the layers, or the shortcuts are of another
            backbone.
    """
    check_there(shortcuts)
    if not recipe.task.vocabulary_head:
        raise ValueError(
            f"task: {recipe.task.name}: shortcuts are trained by what a head over a vocabulary says at each position, and this task's says "
            "a class of a text. Use least squares (shortcuts fit), or a language model (task: causal_lm or masked_lm)."
        )
    output = check_output(output, overwrite, KIND)
    forget_peak()
    started = time.perf_counter()
    options = TuneOptions(epochs=epochs, seed=recipe.seed, positions=recipe.options().positions, skip=recipe.shortcuts.skip)
    subject = load_subject(recipe)
    maps = load_shortcuts(shortcuts, subject.model)
    last = maps.num_layers
    there = sorted({s.source for s in maps if s.target == last and s.kind in options.kinds})
    if layers is not None and (lacking := sorted(set(layers) - set(there))):
        raise ValueError(
            f"The shortcuts in {str(shortcuts)!r} have none to layer {last} from {', '.join(map(str, lacking))}; there are some from: "
            f"{', '.join(map(str, there)) or 'none'}. Choose among these, or fit them."
        )
    starts = ShortcutSet([s for s in maps if layers is None or s.source in layers], maps.hidden_size, last)
    encoded = rows_of(recipe, subject)
    watched = spread(encoded["dev"].rows, recipe.evaluation.rows) if "dev" in encoded else None
    with written_aside(output, overwrite, KIND) as folder:
        tuned = tune_shortcuts(subject.model, starts, encoded["train"].rows, subject.collator, options, watched=watched)
        for shortcut in tuned.shortcuts:
            maps.add(shortcut)
        subject.model.config._name_or_path = backbone_recipe(recipe).model  # not the folder of an installed package
        save_shortcuts(
            maps, subject.model, folder, {"start": Path(shortcuts).name, "positions": tuned.positions, "epochs": epochs}
        )
        told = [
            {"kind": t.kind, "source": t.source, "divergence": [round(d, 5) for d in t.divergences], "kept": t.best}
            for t in tuned.tunings
        ]
        (folder / TRAINING).write_text(json_text(told), encoding="utf-8")
        run = {
            "kind": KIND,
            "recipe": recipe.model_dump(),
            "positions": tuned.positions,
            "held_out": tuned.held_out,
            "trained": told,
            "shortcuts": len(maps),
            "seconds": {"training": round(tuned.seconds, 2), "total": round(time.perf_counter() - started, 2)},
            "peak_memory_mib": peak_of_process(),
            "versions": versions(),
        }
        write_run(folder, recipe, run)
    return run
