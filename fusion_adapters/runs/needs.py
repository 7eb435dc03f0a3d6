"""What a recipe asks of cached layer states, told from configurations alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from peft import get_peft_model

from ..fusions import resolve_layers
from ..states import source_of
from ..tuner import FusionConfig
from ..tuner.counts import skeleton
from .attaching import adapter_config
from .depths import depths_to_try, without_auto
from .environment import quiet
from .loading import settle_label_at
from .pretrained import locate
from .recipe import Recipe, chooses_depth, recipe_beside


def layers_at(config: FusionConfig, depths: Iterable[int]) -> set[int]:
    """The layer states that an adapter needs at these depths."""
    return {i for depth in depths for i in (*resolve_layers(config.fusion_layers, depth), depth)}


@dataclass(frozen=True)
class Needs:
    """What a recipe asks of a cache.

    Attributes:
        layers: The layer states that it reads.
        depths: The blocks whose output a fusion replaces: one, or more with what is trained beside.
        means: Whether of each text it reads one mean over its positions alone.
    """

    layers: frozenset[int]
    depths: frozenset[int]
    means: bool


def needs(recipe: Recipe, labels: list[str]) -> Needs:
    """What a recipe, and what it trains beside without LoRA, asks of a cache. No weights are loaded.

    What the recipe leaves to the backbone (`data.label_at`) is settled in it.

    Args:
        recipe: The recipe.
        labels: Its label set.

    Raises:
        ValueError: If it cannot train from cached states, or the adapter does not fit the backbone.
        OSError: If the backbone's configuration is not to be had.
    """
    found = _needs(recipe, labels)
    for other in (recipe_beside(recipe, name) for name in recipe.beside):
        if not adapter_config(other).has_lora:
            also = _needs(other, labels)
            found = Needs(found.layers | also.layers, found.depths | also.depths, found.means and also.means)
    return found


def _needs(recipe: Recipe, labels: list[str]) -> Needs:
    config = adapter_config(without_auto(recipe))
    name, where = locate(recipe.backbone)
    with quiet():
        bare = skeleton(name, recipe.task.auto_model, **where, **recipe.task.head_options(labels))
        settle_label_at(recipe.data, recipe.task, bare, config)
        depths = depths_to_try(config, bare) if chooses_depth(recipe.adapter) else None
        with init_empty_weights(), torch.device("meta"):
            model = get_peft_model(bare, copy.deepcopy(config), low_cpu_mem_usage=True)  # type: ignore[arg-type]
        source = source_of(model)
    layers = set(source.layers or ()) if depths is None else layers_at(config, depths)
    return Needs(frozenset(layers), frozenset([source.backbone.num_layers]), source.means)
