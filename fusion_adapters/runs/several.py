"""One extraction, many tasks: recipes on one backbone, trained one after the other from the same layer states."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..states import LayerStateCache
from .checkpoints import read_once
from .environment import denormals_flushed, versions
from .files import check_output
from .recipe import AUTO, Recipe, chooses_depth, load_recipe
from .together import states_of, together
from .training import check_one_process, run_recipe


@dataclass(frozen=True)
class Outcome:
    """What came of one recipe.

    Attributes:
        metrics: The content of its `metrics.json`; None if its training failed.
        failed: Why it failed.
        kept: Whether the run was there before, of the same recipe.
    """

    metrics: dict[str, Any] | None = None
    failed: str | None = None
    kept: bool = False


def load_recipes(paths: Sequence[Path], settings: list[str] | None = None) -> dict[str, Recipe]:
    """Reads recipes; each has the name of its file, without the ending.

    Args:
        paths: The YAML files.
        settings: Changes of every one, see `load_recipe`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If one does not fit, or two have one name.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found:
            raise ValueError(
                f"The recipes {str(found[path.stem])!r} and {str(path)!r} have one name, {path.stem!r}, and their runs would be one "
                "folder. Rename one of the files."
            )
        found[path.stem] = path
    return {name: load_recipe(path, settings) for name, path in found.items()}


@denormals_flushed()
def run_recipes(
    recipes: Mapping[str, Recipe], output: str | Path, cache: str | Path, overwrite: bool = False
) -> dict[str, Outcome]:
    """Trains several recipes on one backbone from one extraction; each becomes the run that `run_recipe` makes from that cache.

    The backbone's checkpoint is read once, and each text is run through it once. States that are in the folder already, and serve all
    recipes, are taken as they are. The adapters are trained one after the other; one that fails does not stop the others.

    Args:
        recipes: By name.
        output: The folder of all; each run is the folder of its name in there.
        cache: The folder of the layer states.
        overwrite: Replace earlier runs. Without it, a finished run of the same recipe and versions is kept, and anything else is an
            error before anything is loaded.

    Returns:
        What came of each, in the order of the recipes.

    Raises:
        ValueError: See `together`; or the cache's folder is that of a run.
        FileExistsError: If something else is where a run belongs.
        StaleCacheError: If the cache's folder holds the states of something else.
    """
    check_one_process()
    output, cache = Path(output), Path(cache)
    folders = {name: output / name for name in recipes}
    for name, folder in folders.items():
        if cache.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"The layer states would stand in {str(cache)!r}, which is the folder of the run of {name!r} or in it. Give another folder "
                "with --cache."
            )
    outcomes: dict[str, Outcome] = {}
    for name, recipe in recipes.items():
        kept = None if overwrite else _finished(folders[name], recipe)
        if kept is not None:
            outcomes[name] = Outcome(kept, kept=True)
        else:
            check_output(folders[name], overwrite)
    todo = [name for name in recipes if name not in outcomes]
    if todo:
        group = together(recipes)
        with read_once(recipes[todo[0]].backbone):
            states = states_of(group, cache)
            for number, name in enumerate(todo, 1):
                print(f"{name}: training {number} of {len(todo)}", flush=True)
                outcomes[name] = _outcome(recipes[name], folders[name], overwrite, states)
                gc.collect()  # a Trainer and its model hold each other
    return {name: outcomes[name] for name in recipes}


@denormals_flushed()
def cache_recipes(recipes: Mapping[str, Recipe], folder: str | Path, dtype: str = "float16") -> LayerStateCache:
    """Computes the layer states of the data of several recipes once, for `run_recipes`, or `run_recipe` with each.

    Args:
        recipes: By name.
        folder: See `cache_layer_states`.
        dtype: See there.

    Raises:
        ValueError: See `together`.
    """
    return states_of(together(recipes), Path(folder), dtype)


def _outcome(recipe: Recipe, folder: Path, overwrite: bool, states: LayerStateCache) -> Outcome:
    try:
        return Outcome(run_recipe(recipe, folder, overwrite, states))
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        return Outcome(failed=" ".join(str(error).split()) or type(error).__name__)


def _finished(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The metrics of the run in a folder, if it is a finished one of the very same recipe, made with the same versions."""
    try:
        run, metrics = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("run.json", "metrics.json"))
        there, made_with = run["recipe"], metrics["versions"]
        if recipe.data.label_at == "auto":  # what a run settles itself
            there["data"]["label_at"] = "auto"
        if chooses_depth(recipe.adapter) and "depths" in run:
            there["adapter"]["fusion_depth"] = AUTO
    except (OSError, ValueError, KeyError, TypeError):
        return None
    same = there == json.loads(json.dumps(recipe.model_dump())) and made_with == versions()
    return metrics if same else None
