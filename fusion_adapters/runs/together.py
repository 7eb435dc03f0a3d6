"""Several recipes on one backbone: whether they go together, and one extraction of the layer states of all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from accelerate import PartialState
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from ..states import LayerStateCache, Source, cache_layer_states, source_of
from ..states.key import completed, input_names, tokenizer_signature
from ..states.storage import has_manifest, read_manifest
from ..tasks.splits import Splits, load_splits
from .attaching import adapter_config, load_attached
from .depths import check_auto, without_auto
from .loading import check_lengths
from .needs import Needs, needs
from .recipe import Recipe, chooses_depth
from .tokenizers import load_tokenizer

HELD = 0.5  # of the memory that is free: the states are read into it if they fit there


@dataclass(frozen=True)
class Together:
    """Recipes that can train from the same layer states.

    Attributes:
        recipes: By name; what they leave to the backbone is settled.
        splits: Their data.
        needs: What each asks of the states.
    """

    recipes: dict[str, Recipe]
    splits: dict[str, Splits]
    needs: dict[str, Needs]

    @property
    def layers(self) -> list[int]:
        """The layer states that any of them reads."""
        return sorted(frozenset[int]().union(*(each.layers for each in self.needs.values())))

    @property
    def means(self) -> bool:
        """Whether all read one mean of each text alone."""
        return all(each.means for each in self.needs.values())


def together(recipes: Mapping[str, Recipe]) -> Together:
    """Checks that recipes can train from one extraction, before any weights are loaded.

    Args:
        recipes: By name. They are not changed.

    Raises:
        ValueError: If they name different backbones, or one cannot train from cached states or does not fit; names it.
        OSError: If data or configuration are not to be had.
    """
    first = next(iter(recipes))
    for name, recipe in recipes.items():
        _check_backbone(first, recipes[first], name, recipe)
        with _of(name):
            if adapter_config(without_auto(recipe)).has_lora:
                raise ValueError(
                    "it trains LoRA inside the backbone, whose layer states change with every step and cannot be computed once. "
                    "Train it by a command of its own, without --cache."
                )
            if chooses_depth(recipe.adapter):
                check_auto(recipe)
    own = {name: recipe.model_copy(update={"data": recipe.data.model_copy()}) for name, recipe in recipes.items()}
    splits, asked = {}, {}
    for name, recipe in own.items():
        with _of(name):
            splits[name] = load_splits(recipe.data, recipe.task, recipe.seed)
            asked[name] = needs(recipe, splits[name].labels)
    return Together(own, splits, asked)


def states_of(group: Together, folder: Path, dtype: str | None = None) -> LayerStateCache:
    """Layer states of the texts of all recipes: those in the folder if they serve all, else computed there; a text is run once.

    Where recipes end at different depths (`fusion_depth`), the states are those of the whole backbone.

    Args:
        group: The recipes.
        folder: See `cache_layer_states`.
        dtype: In which they are computed. None is for a training: states of any dtype that are there are taken, others are computed in
            float16, and the shards are read into memory if they take at most half of what is free there.

    Returns:
        The cache, its checksums verified.

    Raises:
        StaleCacheError: If the folder holds the states of something else.
    """
    first = next(iter(group.recipes))
    recipe, config = group.recipes[first], adapter_config(without_auto(group.recipes[first]))
    alike = len(frozenset[int]().union(*(each.depths for each in group.needs.values()))) == 1
    model, tokenizer = load_attached(recipe, config, group.splits[first].labels, cut=alike)
    source = source_of(model) if alike else source_of(model).whole
    rows, tokenizers, lengths = _rows(group, model, source)
    there = dtype is None and has_manifest(folder)
    if there and (found := _serving(group, folder, source, rows)) is not None:
        print(f"{folder}: holds the states of all {len(rows):,} rows; nothing is extracted", flush=True)
        return found
    if recipe.backbone.bits is None:  # a quantised model is where it was loaded
        model.to(PartialState().device)
    states = cache_layer_states(
        source,
        rows,
        folder,
        DataCollatorWithPadding(tokenizer),
        dtype=read_manifest(folder)["dtype"] if there else dtype or "float16",  # an extraction that was stopped goes on
        layers=group.layers,
        means=group.means,
        tokenizer=tokenizer if tokenizers == 1 else None,
        max_length=lengths.pop() if len(lengths) == 1 else None,
    )
    if dtype is None:
        _hold(states)
    return states


def _check_backbone(first: str, reference: Recipe, name: str, recipe: Recipe) -> None:
    wanted, given = reference.backbone.model_dump(), recipe.backbone.model_dump()
    other = [f"{key}: {wanted[key]!r} and {given[key]!r}" for key in wanted if wanted[key] != given[key]]
    if other:
        raise ValueError(
            f"The recipes {first!r} and {name!r} name different backbones ({'; '.join(other)}), and one extraction has the states of "
            "one. Give both the same section 'backbone', or train them by two commands."
        )


@contextlib.contextmanager
def _of(name: str) -> Iterator[None]:
    """Says in an error of the body which recipe it is about."""
    try:
        yield
    except (ValueError, OSError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"The recipe {name!r} cannot be trained together with others: {error}") from error


def _rows(group: Together, model: Any, source: Source) -> tuple[list[dict[str, Any]], int, set[int]]:
    """The model inputs of all rows, how many different tokenizers made them, and to which lengths they are cut."""
    found: list[Mapping[str, Any]] = []
    tokenizers: dict[str, PreTrainedTokenizerBase] = {}
    for name, recipe in group.recipes.items():
        with _of(name):
            tokenizer = load_tokenizer(recipe.backbone, recipe.task)
            tokenizers[tokenizer_signature(tokenizer)] = tokenizer
            parts = group.splits[name].encoded(recipe.task, tokenizer, recipe.data)
            own = [row for part in parts.values() for row in part.rows]
            check_lengths(model, own)
            found += own
    # rows of pairs say which of the two texts a piece is of; in others all are of the first
    inputs = input_names(source.backbone, {name for row in found for name in row})
    rows = [{name: row[name] for name in inputs} for row in (completed(row, inputs) for row in found)]
    return rows, len(tokenizers), {recipe.data.max_length for recipe in group.recipes.values()}


def _serving(group: Together, folder: Path, source: Source, rows: list[dict[str, Any]]) -> LayerStateCache | None:
    """What is in the folder, if it serves all recipes and is whole."""
    try:
        states = LayerStateCache(folder, verify=False)
        states.check(source)
        states.find(rows)
        if not set(group.layers) <= set(states.layers) or (states.manifest["means"] and not group.means):
            return None
        if not _hold(states):
            LayerStateCache(folder)  # compares the checksums
    except (ValueError, FileNotFoundError):  # what is wrong is told, or mended, by the extraction
        return None
    return states


def _hold(states: LayerStateCache) -> bool:
    """Reads states into memory if they fit; returns whether they do."""
    fits: bool = states.bytes <= HELD * psutil.virtual_memory().available
    if fits:
        states.hold()
    return fits
