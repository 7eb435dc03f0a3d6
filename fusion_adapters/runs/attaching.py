"""A recipe's adapter on its backbone: one, or several in turn on one that was loaded once."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from ..tuner import FusionConfig
from ..tuner.undo import Before
from .loading import load_lower, settle_label_at
from .recipe import Recipe
from .tokenizers import load_tokenizer, match_padding

ADAPTER = "default"  # peft's own name of the first


def adapter_config(recipe: Recipe) -> FusionConfig:
    """The adapter that a recipe describes."""
    fields = copy.deepcopy(recipe.adapter)  # peft adds to the config's lists when it attaches
    try:
        return FusionConfig(task_type=recipe.task.peft_type, **fields)  # type: ignore[arg-type]
    except (TypeError, AttributeError, KeyError) as error:  # whatever a wrong type meets first
        raise ValueError(
            f"The recipe's section 'adapter' does not fit: {type(error).__name__}: {' '.join(str(error).split())}. Check the types of its "
            f"values ({', '.join(f'{key}: {value!r}' for key, value in recipe.adapter.items())})."
        ) from error


def load_attached(
    recipe: Recipe, config: FusionConfig, labels: list[str], cut: bool = True
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Seeds, loads backbone and tokenizer, and attaches the adapter with a fresh head.

    What the recipe leaves to the backbone (`data.label_at`) is settled in it.

    Args:
        recipe: The recipe.
        config: Its adapter; a fraction in `fusion_depth` becomes a number of blocks.
        labels: The label set.
        cut: Whether blocks above `fusion_depth` are left out of the model.
    """
    backbone, tokenizer = _load(recipe, config, labels, config.fusion_depth if cut else None)
    return get_peft_model(backbone, config), tokenizer  # type: ignore[arg-type]


class Bare:
    """The whole backbone of a recipe with a fresh head, to which adapters are attached in turn, each as if it were the first.

    Args:
        recipe: The recipe; what it leaves to the backbone is settled in it.
        config: Its adapter, of any depth.
        labels: The label set.

    Attributes:
        backbone: The model, with the adapter that was attached last.
        tokenizer: Its tokenizer.
    """

    def __init__(self, recipe: Recipe, config: FusionConfig, labels: list[str]) -> None:
        self.backbone, self.tokenizer = _load(recipe, config, labels, None)
        self._drawn = torch.get_rng_state()
        self._before: Before | None = None

    def attach(self, config: FusionConfig) -> Any:
        """A peft model with a fresh adapter and head, equal to that of `load_attached`. The model that was returned before ends."""
        if self._before is not None:
            self._before.restore()
        self._before = Before(self.backbone, ADAPTER)
        torch.set_rng_state(self._drawn)
        return get_peft_model(self.backbone, config, ADAPTER)  # type: ignore[arg-type]


def _load(
    recipe: Recipe, config: FusionConfig, labels: list[str], depth: int | float | None
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    set_seed(recipe.seed)
    tokenizer = load_tokenizer(recipe.backbone, recipe.task)
    backbone, blocks = load_lower(recipe.backbone, recipe.task, labels, config.modules_to_save or (), depth)
    if blocks is not None:  # a fraction was one of all blocks
        config.fusion_depth = blocks
    match_padding(backbone, tokenizer)
    settle_label_at(recipe.data, recipe.task, backbone, config)
    return backbone, tokenizer
