"""`adapter.fusion_depth: auto`: a sweep over depths from the layer states of all blocks, and the smallest that is as good as the best."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..backbone.blocks import find_backbones
from ..fusions import resolve_layers
from ..states import LayerStateCache
from ..tasks.base import Task
from ..tasks.splits import Splits
from ..tuner import FusionConfig
from .attaching import ADAPTER, Bare, adapter_config
from .fitting import Fit
from .memory import peak_of_process
from .recipe import Recipe, chooses_depth
from .states import open_states

STEPS = 6  # depths that are tried; the numbers of blocks of most backbones divide by it
LEAST_DEV = 10  # development examples, with fewer no two depths can be told apart
GROUPS = 20  # of development examples, each left out once for the standard error
ROUNDING = 1e-9
GIVEN_UP = 0.05  # of the best score at most: few development examples have large errors
RULE = (
    "the smallest depth whose development score is at most one standard error, and a twentieth of the best, below the best"
)


@dataclass
class Tried:
    """What came of one depth.

    Attributes:
        depth: The number of blocks.
        metrics: As in `metrics.json`, with the scores of the development data alone; None if the training failed.
        compared: Gold and predicted values of the development data.
        failed: Why it failed.
    """

    depth: int
    metrics: dict[str, Any] | None = None
    compared: tuple[list[Any], list[Any]] | None = None
    failed: str | None = None


def without_auto(recipe: Recipe) -> Recipe:
    """A recipe with all blocks in the place of `fusion_depth: auto`; any other as it is."""
    if not chooses_depth(recipe.adapter):
        return recipe
    return recipe.model_copy(update={"adapter": {k: v for k, v in recipe.adapter.items() if k != "fusion_depth"}})


def at_depth(recipe: Recipe, depth: int) -> Recipe:
    """A recipe with that number of blocks."""
    return recipe.model_copy(update={"adapter": {**recipe.adapter, "fusion_depth": depth}})


def check_auto(recipe: Recipe, dev: int | None = None) -> None:
    """Checks, before anything is loaded, that depths can be compared.

    Args:
        recipe: A recipe with `fusion_depth: auto`.
        dev: The number of development examples, if it is known.

    Raises:
        ValueError: If the adapter has LoRA, or there are too few development examples.
    """
    if adapter_config(without_auto(recipe)).has_lora:
        raise ValueError(
            "adapter.fusion_depth: auto and LoRA inside the backbone: depths are compared from layer states that are computed once, and "
            "with LoRA they change at every step. Give a number of blocks (a run, or a method of a comparison, for each that you want to "
            "try), or train the fusion alone, without r, target_modules and the other options of LoRA."
        )
    if dev is not None and dev < LEAST_DEV:
        there = f"data.dev_fraction={recipe.data.dev_fraction} cuts off" if recipe.data.dev is None else "data.dev holds"
        raise ValueError(
            f"adapter.fusion_depth: auto compares depths on development examples, of which {there} {dev}; at least {LEAST_DEV} are "
            "needed to tell depths apart, and more are better. Raise data.dev_fraction, name a larger file or split in data.dev, or give "
            "a number of blocks."
        )


def depths_to_try(config: FusionConfig, model: nn.Module) -> list[int]:
    """Sixths of a backbone's blocks, up to all of them; where `fusion_layers` names states, only depths that have these.

    Args:
        config: The adapter, of whatever depth.
        model: The backbone with its head.

    Raises:
        ValueError: If only one depth is possible, or the model is an encoder-decoder, whose states cannot be computed once.
    """
    backbones = find_backbones(model, config.fusion_blocks, config.fusion_stack)
    if len(backbones) > 1 or backbones[0].stack is not None:
        raise ValueError(
            f"adapter.fusion_depth: auto and an encoder-decoder ({backbones[0].model_type!r}): depths are compared from layer states that "
            "are computed once, and those of a decoder depend on the labels. Give a number of blocks, for one stack (fusion_stack)."
        )
    blocks, layers = backbones[0].num_layers, config.fusion_layers
    resolve_layers(layers, blocks)  # what no depth has raises
    possible = [depth for depth in range(1, blocks + 1) if _fits(layers, depth)]
    steps = (max(1, round(blocks * step / STEPS)) for step in range(1, STEPS + 1))
    depths = sorted({next(depth for depth in possible if depth >= step) for step in steps})
    if len(depths) < 2:
        why = (
            f"has {blocks} block"
            if blocks == 1
            else f"has all of fusion_layers={layers} only with its last block ({blocks})"
        )
        raise ValueError(
            f"adapter.fusion_depth: auto: the backbone {why}, so there is no smaller depth to choose. Leave fusion_depth out, or name "
            "states of lower blocks (negatives count from the depth, -1 is its block)."
        )
    return depths


def _fits(layers: list[int] | str | None, depth: int) -> bool:
    try:
        resolve_layers(layers, depth)
    except ValueError:  # one above, or two that mean the same
        return False
    return True


def sweep(
    bare: Bare, recipe: Recipe, depths: Sequence[int], splits: Splits, folder: Path, cache: str | Path | LayerStateCache
) -> tuple[Recipe, Any, dict[str, Any]]:
    """Trains a recipe's adapter at several depths from cached states of all blocks, and chooses one on development data.

    Every depth is trained as a run with that number would be from these states: the same seed, fresh head and settings. A depth
    whose training fails is left out. Test data are scored for the chosen depth alone.

    Args:
        bare: The backbone, whole.
        recipe: The recipe.
        depths: Numbers of blocks, ascending.
        splits: The data.
        folder: Where adapters are kept for the time of the sweep.
        cache: The layer states.

    Returns:
        The recipe with the chosen number, the model with the adapter that was trained at that depth, and its metrics with the sweep
        under `depths`.

    Raises:
        ValueError: If the trainings of all depths failed.
    """
    task, tried = recipe.task, []
    for depth in depths:
        tried.append(Tried(depth))
        fit = _fit(bare, at_depth(recipe, depth), splits, folder, cache, verify=len(tried) == 1)
        try:
            fit.train()
        except ValueError as error:
            tried[-1].failed = " ".join(str(error).split())
            continue
        tried[-1].metrics, tried[-1].compared = fit.metrics(["dev"]), fit.compared("dev")
        score = task.main.shown(tried[-1].metrics["scores"]["dev"][task.main.name])
        print(f"fusion_depth {depth} of {depths[-1]}: dev {task.main.name} {score}, {fit.seconds:.1f} s", flush=True)
        fit.model.save_pretrained(str(folder / str(depth)), save_embedding_layers=False)
    record = choose(tried, task)
    chosen = next(each for each in tried if each.depth == record["chosen"])
    recipe = at_depth(recipe, chosen.depth)
    fit = _fit(bare, recipe, splits, folder, cache)
    fit.model.load_adapter(str(folder / str(chosen.depth)), ADAPTER, is_trainable=True)
    metrics = {**(chosen.metrics or {}), "depths": record}
    metrics["scores"] |= fit.metrics(["test"])["scores"]
    metrics |= fit.details()
    metrics["peak_memory_mib"] = peak_of_process()
    return recipe, fit.model, metrics


def _fit(
    bare: Bare, recipe: Recipe, splits: Splits, folder: Path, cache: str | Path | LayerStateCache, verify: bool = False
) -> Fit:
    model = bare.attach(adapter_config(recipe))
    states = open_states(cache, model, bare.tokenizer, recipe.data.max_length, verify)
    return Fit(model, bare.tokenizer, recipe, splits, folder, states)


def choose(tried: Sequence[Tried], task: Task) -> dict[str, Any]:
    """Chooses a depth by `RULE`.

    Args:
        tried: The depths, ascending.
        task: Whose main score is compared.

    Returns:
        `chosen` and `best` (depths), `rule`, and `tried`: of each depth its development score under the score's own name,
        `below_best` and the `standard_error` of that difference, `parameters` and `seconds` of training; or why it `failed`.

    Raises:
        ValueError: If all failed.
    """
    name, main = task.main.name, task.main
    sign = 1 if main.higher_is_better else -1
    scores = {each.depth: each.metrics["scores"]["dev"][name] for each in tried if each.metrics is not None}
    if not scores:
        raise ValueError(f"The training failed at every depth that fusion_depth: auto tried. {tried[0].failed}")
    best = max(scores, key=lambda depth: (sign * scores[depth], -depth))
    parts = {each.depth: _scores_without(task, *each.compared) for each in tried if each.compared is not None}
    rows: list[dict[str, Any]] = []
    for each in tried:
        if each.metrics is None:
            rows.append({"depth": each.depth, "failed": each.failed})
            continue
        rows.append(
            {
                "depth": each.depth,
                name: scores[each.depth],
                "below_best": sign * (scores[best] - scores[each.depth]),
                "standard_error": standard_error([a - b for a, b in zip(parts[best], parts[each.depth], strict=True)]),
                "parameters": each.metrics["parameters"]["total"],
                "seconds": each.metrics["seconds"]["train"],
            }
        )
    # one example more or less is an error of just one example
    most = GIVEN_UP * abs(scores[best])
    within = (
        row for row in rows if "failed" not in row and row["below_best"] <= min(row["standard_error"], most) + ROUNDING
    )
    chosen = next(within)["depth"]
    return {"chosen": chosen, "best": best, "rule": RULE, "tried": rows}


def _scores_without(task: Task, gold: Sequence[Any], predicted: Sequence[Any]) -> list[float]:
    """The main score without each of up to `GROUPS` groups of examples, drawn alike for every depth."""
    order, groups, found = list(range(len(gold))), min(GROUPS, len(gold)), []
    random.Random(0).shuffle(order)  # examples of a file may come in some order
    for group in range(groups):
        kept = [i for place, i in enumerate(order) if place % groups != group]
        found.append(task.watched([gold[i] for i in kept], [predicted[i] for i in kept])[task.main.name])
    return found


def standard_error(values: Sequence[float]) -> float:
    """The jackknife's standard error of a statistic, from its values without each group of examples (Tukey, 1958)."""
    mean = sum(values) / len(values)
    return math.sqrt((len(values) - 1) / len(values) * sum((value - mean) ** 2 for value in values))
