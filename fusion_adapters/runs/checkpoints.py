"""A checkpoint that is read once, for the models of several recipes, whose frozen weights are then the same tensors."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GgufConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..tuner.counts import skeleton
from .pretrained import load_pretrained, locate
from .recipe import BackboneRecipe

_SHARED: ContextVar[tuple[BackboneRecipe, dict[str, Tensor]] | None] = ContextVar("_SHARED", default=None)


@contextlib.contextmanager
def read_once(recipe: BackboneRecipe) -> Iterator[None]:
    """In the body, models of this backbone are made from tensors that are read now: alike, bit for bit, to those read from the file.

    A model that changes a weight of the checkpoint in place changes that of all; adapters and their heads are copies. Where the tensors
    cannot be told without transformers, of a checkpoint that is not safetensors or is quantised while it is loaded, each model is read
    by itself.

    Args:
        recipe: The backbone.
    """
    tensors = _tensors(recipe)
    token = _SHARED.set(None if tensors is None else (recipe, tensors))
    try:
        yield
    finally:
        _SHARED.reset(token)


def class_of(recipe: BackboneRecipe, auto_class: Any) -> Any:
    """The class by which models of a backbone are loaded: in the body of `read_once` one that takes the tensors from there."""
    shared = _SHARED.get()
    if shared is None or shared[0] != recipe:
        return auto_class
    return SharedClass(auto_class, shared[1])


@dataclass(frozen=True)
class SharedClass:
    """Stands for a class of transformers where models are loaded by one: its models take the tensors of a checkpoint from memory.

    Attributes:
        auto_class: The class.
        tensors: Those of the checkpoint.
    """

    auto_class: Any
    tensors: dict[str, Tensor]

    def from_pretrained(self, name: str, **options: Any) -> Any:
        """As `auto_class.from_pretrained`, with the options that recipes have."""
        where = {key: options.pop(key) for key in ("gguf_file", "revision") if key in options}
        loading = {
            key: options.pop(key) for key in ("dtype", "output_loading_info", "ignore_mismatched_sizes") if key in options
        }
        options.pop("quantization_config", None)  # of a GGUF file, whose tensors are unpacked
        config = options.pop("config", None)
        if config is None:
            config = AutoConfig.from_pretrained(name, **where, **options)
        kind: Any = type(skeleton(config, self.auto_class))
        found = kind.from_pretrained(None, config=config, state_dict=dict(self.tensors), **loading)
        model = found[0] if loading.get("output_loading_info") else found
        model.name_or_path = model.config._name_or_path = name
        if model.can_generate() and "gguf_file" not in where:
            with contextlib.suppress(OSError):  # most checkpoints have none
                model.generation_config = GenerationConfig.from_pretrained(name, **where)
        return found


def _tensors(recipe: BackboneRecipe) -> dict[str, Tensor] | None:
    """The tensors of a checkpoint under the names that they have there, by memory map; None where they cannot be told."""
    if recipe.bits is not None:
        return None
    name, where = locate(recipe)
    if "gguf_file" in where:
        return _unpacked(recipe)
    config = load_pretrained(AutoConfig, recipe)
    special = (
        getattr(config, "quantization_config", None),
        getattr(config, "transformers_weights", None),
        config.extra_files,
    )
    if any(special):  # read in other ways, or from further files
        return None
    found = dict[str, Tensor]()
    for file in _files(name, where):
        with safe_open(file, "pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    if recipe.dtype == "float32":  # widened once for all; what is narrowed is not, as some tensors may stay wide
        found = {
            key: value.float() if value.dtype in (torch.float16, torch.bfloat16) else value for key, value in found.items()
        }
    return found or None


def _files(name: str, where: dict[str, str]) -> list[str]:
    """The safetensors files of a checkpoint; none if it has another form."""
    raising = ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")
    wanted: dict[str, Any] = {**where, **dict.fromkeys(raising, False)}
    whole = cached_file(name, SAFE_WEIGHTS_NAME, **wanted)
    if whole is not None:
        return [whole]
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **wanted)
    if index is None:
        return []
    parts = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    files: list[str | None] = [cached_file(name, part, **wanted) for part in parts]
    return [] if None in files else [file for file in files if file is not None]


def _unpacked(recipe: BackboneRecipe) -> dict[str, Tensor] | None:
    """The tensors of a GGUF file, unpacked once, by way of a language model, which has all of them; None where it has not."""
    options = {"dtype": getattr(torch, recipe.dtype), "quantization_config": GgufConfig(dequantize=True)}
    try:
        model, info = load_pretrained(AutoModelForCausalLM, recipe, output_loading_info=True, **options)
    except ValueError:  # of another kind
        return None
    tensors: dict[str, Tensor] = model.state_dict()
    return None if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"] else tensors
