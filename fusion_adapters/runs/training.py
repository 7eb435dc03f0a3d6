"""A recipe becomes a run: load, attach, train with transformers' Trainer, score, save."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from ..backbone.truncate import blocks_of_fraction
from ..fusions import fusion_class
from ..states import LayerStateCache, cache_layer_states, source_of
from ..tasks.splits import Splits, load_splits
from .attaching import Bare, adapter_config, load_attached
from .card import model_card
from .depths import check_auto, depths_to_try, sweep, without_auto
from .environment import denormals_flushed
from .evaluation import reload_difference
from .files import check_output, json_text, written_aside
from .fitting import Fit
from .loading import check_lengths
from .memory import forget_peak
from .needs import layers_at
from .recipe import Recipe, chooses_depth, recipe_beside
from .states import holds_all_blocks, open_states
from .storing import held_in

STATES, DEPTHS = "states", "depths"  # in the folder of a run that is being made


@denormals_flushed()
def run_recipe(
    recipe: Recipe, output: str | Path, overwrite: bool = False, cache: str | Path | LayerStateCache | None = None
) -> dict[str, Any]:
    """Trains what a recipe describes and writes the run to a folder.

    The folder holds `adapter/` (what peft saves), `metrics.json`, `run.json` (what `predict` needs: recipe, labels) and
    `recipe.yaml`. It appears when the run is complete. What stands in `recipe.beside` is trained and scored too, from the same layer
    states where nothing trains inside the backbone; its metrics are in `metrics.json`.

    Args:
        recipe: The recipe.
        output: The folder, new or empty.
        overwrite: Replace an earlier run in that folder.
        cache: A folder of cached layer states to train from, see `cache_recipe`; or such a cache, open.

    Returns:
        The content of `metrics.json`.

    Raises:
        StaleCacheError: If the cache belongs to something else.
        ValueError: If data, adapter and backbone do not fit.
        OSError: If the model, the data or the output folder cannot be read or written.
    """
    check_one_process()
    output = check_output(output, overwrite)
    forget_peak()
    started = time.perf_counter()
    for each in _all_of(recipe):
        adapter_config(without_auto(each))  # a wrong one is told before anything is trained
    if chooses_depth(recipe.adapter):
        check_auto(recipe)
    splits = load_splits(recipe.data, recipe.task, recipe.seed)
    with written_aside(output, overwrite) as folder:
        if chooses_depth(recipe.adapter):
            recipe, model, tokenizer, metrics, cache = _swept(recipe, splits, folder, cache)
        else:
            if recipe.beside and cache is None and _share_states(recipe):
                cache = folder / STATES
                cache_recipe(recipe, cache)  # one pass through the backbone for all of them
            model, tokenizer, metrics = _trained(recipe, splits, folder, cache)
        _save(model, tokenizer, recipe, splits, metrics, folder)
        if recipe.beside:
            whole = "depths" in metrics  # so is then the model of which the states are
            metrics["beside"] = {name: _beside(recipe, name, splits, folder, cache, whole) for name in recipe.beside}
        for aside in (STATES, DEPTHS):
            shutil.rmtree(folder / aside, ignore_errors=True)
        metrics["bytes"] = {p.name: p.stat().st_size for p in sorted((folder / "adapter").iterdir())}
        metrics["seconds"]["total"] = round(time.perf_counter() - started, 2)
        run = {"recipe": recipe.model_dump(), "labels": splits.labels}
        if "depths" in metrics:
            run["depths"] = metrics["depths"]
        (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(), sort_keys=False), encoding="utf-8")
        (folder / "metrics.json").write_text(json_text(metrics), encoding="utf-8")
    return metrics


def check_one_process() -> None:
    """Raises ValueError under a launcher of several processes."""
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:  # set by torchrun, accelerate and their like
        raise ValueError(
            f"A recipe is trained in one process, and this is one of {processes}, which would write over each other's run. Start it "
            "without a launcher; on several processes, train with transformers' Trainer in a script of your own (README)."
        )


def _trained(
    recipe: Recipe, splits: Splits, folder: Path, cache: str | Path | LayerStateCache | None, cut: bool = True
) -> tuple[Any, PreTrainedTokenizerBase, dict[str, Any]]:
    """The model of a recipe, trained, its tokenizer, and its metrics."""
    config = adapter_config(recipe)
    if cache is not None and config.fusion_depth is not None:
        cut = cut and not holds_all_blocks(cache, recipe)
    model, tokenizer = load_attached(recipe, config, splits.labels, cut)
    states = None if cache is None else open_states(cache, model, tokenizer, recipe.data.max_length)
    fit = Fit(model, tokenizer, recipe, splits, folder, states)
    fit.train()
    return model, tokenizer, {**fit.metrics(), **fit.details()}


def _swept(
    recipe: Recipe, splits: Splits, folder: Path, cache: str | Path | LayerStateCache | None
) -> tuple[Recipe, Any, PreTrainedTokenizerBase, dict[str, Any], str | Path | LayerStateCache]:
    """As `_trained`, of a recipe that leaves its depth to the run. Before these the recipe with the number, after them the states."""
    check_auto(recipe, len(splits.dev))
    config = adapter_config(without_auto(recipe))
    bare = Bare(recipe, config, splits.labels)
    depths = depths_to_try(config, bare.backbone)
    begun = time.perf_counter()
    if cache is None:
        cache = folder / STATES
        _extract(bare.attach(config), bare.tokenizer, recipe, splits, cache)
    extracted = time.perf_counter()
    recipe, model, metrics = sweep(bare, recipe, depths, splits, folder / DEPTHS, cache)
    metrics["seconds"] |= {
        "states": round(extracted - begun, 2),
        "depths": round(time.perf_counter() - extracted, 2),
    }
    return recipe, model, bare.tokenizer, metrics, cache


def _save(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    splits: Splits,
    metrics: dict[str, Any],
    folder: Path,
) -> None:
    """Saves a trained adapter with its card, and looks whether it comes back."""
    # the name to record is the recipe's, not the folder of an installed package
    base = model.get_base_model()
    config = model.active_peft_config
    base.name_or_path = base.config._name_or_path = config.base_model_name_or_path = recipe.backbone.model
    (folder / "adapter").mkdir()
    (folder / "adapter" / "README.md").write_text(model_card(recipe, metrics, splits.labels, config), encoding="utf-8")
    with held_in(model, getattr(torch, recipe.save_dtype)):
        model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    length = min(64, recipe.data.max_length)  # a look at the beginnings is enough
    metrics["reload_difference"] = reload_difference(model, folder / "adapter", tokenizer, splits.dev, recipe.task, length)


def _share_states(recipe: Recipe) -> bool:
    """Whether a run and what stands beside it read the states of one backbone, in which nothing trains."""
    configs = [adapter_config(each) for each in _all_of(recipe)]
    return not any(c.has_lora for c in configs) and len({c.fusion_depth for c in configs}) == 1


def _all_of(recipe: Recipe) -> list[Recipe]:
    return [recipe, *(recipe_beside(recipe, name) for name in recipe.beside)]


def _beside(
    recipe: Recipe, name: str, splits: Splits, folder: Path, cache: str | Path | LayerStateCache | None, whole: bool
) -> dict[str, Any]:
    """Trains and scores what stands beside a run; of it the metrics stay, or, where it fails, why: the run itself is done."""
    other = recipe_beside(recipe, name)
    try:
        if whole and adapter_config(other).has_lora:
            cache = None  # it trains live
        return _trained(other, splits, folder, cache, cut=not whole)[2]
    except (ValueError, RuntimeError) as error:
        return {"failed": " ".join(str(error).split())}


@denormals_flushed()
def cache_recipe(recipe: Recipe, folder: str | Path, dtype: str = "float16") -> LayerStateCache:
    """Computes the layer states of a recipe's data once, for `run_recipe(..., cache=folder)`.

    Args:
        recipe: The recipe; its backbone must stay as it is, so no LoRA. With `fusion_depth: auto` the states are those of all depths
            that are tried.
        folder: See `cache_layer_states`.
        dtype: See there.
    """
    if chooses_depth(recipe.adapter):
        check_auto(recipe)
    config = adapter_config(without_auto(recipe))
    splits = load_splits(recipe.data, recipe.task, recipe.seed)
    model, tokenizer = load_attached(recipe, config, splits.labels)
    return _extract(model, tokenizer, recipe, splits, folder, dtype)


def _extract(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    splits: Splits,
    folder: str | Path,
    dtype: str = "float16",
) -> LayerStateCache:
    length = recipe.data.max_length
    rows = [row for part in splits.encoded(recipe.task, tokenizer, recipe.data).values() for row in part.rows]
    check_lengths(model, rows)
    if recipe.backbone.bits is None:  # a quantised model is where it was loaded
        model.to(PartialState().device)
    beside = [adapter_config(other) for other in _all_of(recipe)[1:]]
    beside = [config for config in beside if not config.has_lora]
    means = all(c.fusion_pool is not None and not fusion_class(c.fusion).mixes_positions for c in beside)
    layers, blocks = None, source_of(model).backbone.num_layers
    if chooses_depth(recipe.adapter):  # the model is whole
        config = adapter_config(without_auto(recipe))
        read = layers_at(config, depths_to_try(config, model.get_base_model()))
        layers = read.union(*(layers_at(c, [blocks_of_fraction(c.fusion_depth or blocks, blocks)]) for c in beside))
    elif beside:  # those that any of them reads
        layers = set().union(*(layers_at(c, [blocks]) for c in (adapter_config(recipe), *beside)))
    return cache_layer_states(
        model,
        rows,
        folder,
        DataCollatorWithPadding(tokenizer),
        dtype=dtype,
        layers=None if layers is None else sorted(layers),
        means=means,
        tokenizer=tokenizer,
        max_length=length,
    )
