"""Cached layer states as a run reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from ..states import LayerStateCache
from ..states.storage import read_manifest
from .pretrained import load_pretrained
from .recipe import Recipe


def open_states(
    cache: str | Path | LayerStateCache,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    verify: bool = True,
) -> LayerStateCache:
    """Opens a cache for a model. Whether it has the rows is seen when they are looked for, by their pieces.

    Args:
        cache: The folder, or a cache that is open.
        model: The attached model.
        tokenizer: That of the rows.
        max_length: The length at which they are cut.
        verify: Of a folder: see `LayerStateCache`.

    Raises:
        StaleCacheError: If it belongs to another backbone, or lacks layers.
    """
    states = cache.serving(model) if isinstance(cache, LayerStateCache) else LayerStateCache(cache, model, verify)
    states.rows_cut_by(tokenizer, max_length)
    return states


def holds_all_blocks(cache: str | Path | LayerStateCache, recipe: Recipe) -> bool:
    """Whether a cache was made of all blocks of a recipe's backbone; a model without the upper ones cannot tell that it fits."""
    manifest = cache.manifest if isinstance(cache, LayerStateCache) else read_manifest(Path(cache))
    whole = load_pretrained(AutoConfig, recipe.backbone).get_text_config().num_hidden_layers
    return bool(manifest["layers"][-1] == whole)
