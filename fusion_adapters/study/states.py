"""The cached layer states of a comparison: one extraction that all frozen methods share."""

from __future__ import annotations

import shutil
from pathlib import Path

from accelerate import PartialState
from torch import nn
from transformers import DataCollatorWithPadding

from ..fusions import resolve_layers
from ..runs.loading import check_lengths, load_model
from ..runs.recipe import Recipe
from ..runs.tokenizers import load_tokenizer
from ..runs.training import adapter_config
from ..states import cache_layer_states
from ..states.key import made_by_other_versions
from ..states.storage import has_manifest, read_manifest
from ..tuner.lower import lower_backbones
from .examples import splits_of
from .recipe import StudyRecipe


def states_folder(study: StudyRecipe, data: str, method: str, root: Path) -> Path:
    """Where the layer states of a data set are, for the quantisation of a method."""
    bits = study.methods[method].bits or study.backbone.bits
    return root / (data if bits is None else f"{data}-{bits}bit")


def prepare_states(study: StudyRecipe, root: Path) -> None:
    """Computes the layer states that the methods without LoRA read, once for all runs."""
    for data in study.data:
        splits = splits_of(study, data)
        folders: dict[Path, list[str]] = {}
        for method in study.methods:
            if not adapter_config(study.recipe_of(data, method)).has_lora:
                folders.setdefault(states_folder(study, data, method, root), []).append(method)
        for folder, methods in folders.items():
            recipe = study.recipe_of(data, methods[0])
            tokenizer = load_tokenizer(recipe.backbone, recipe.task)
            fresh = adapter_config(recipe).modules_to_save or ()
            model = load_model(recipe.backbone, recipe.task, splits.labels, fresh)
            if recipe.backbone.bits is None:  # a quantised model is where it was loaded
                model.to(PartialState().device)
            layers = {i for m in methods for i in _layers(study.recipe_of(data, m), model)}
            if has_manifest(folder):
                manifest = read_manifest(folder)
                there = set(manifest["layers"])
                if made_by_other_versions(manifest["key"]):  # the runs that are done say theirs, and stay
                    layers |= there
                    shutil.rmtree(folder)
                elif layers <= there:  # methods were left out
                    layers = there
                else:  # methods were added that read more; the states of the others come out as before
                    layers |= there
                    shutil.rmtree(folder)
            encoded = splits.encoded(recipe.task, tokenizer, recipe.data.max_length)
            rows = [row for part in encoded.values() for row in part.rows]
            check_lengths(model, rows)
            cache_layer_states(
                model,
                rows,
                folder,
                DataCollatorWithPadding(tokenizer),
                dtype=study.states_dtype,
                layers=sorted(layers),
                tokenizer=tokenizer,
                max_length=recipe.data.max_length,
            )


def _layers(recipe: Recipe, model: nn.Module) -> tuple[int, ...]:
    config = adapter_config(recipe)
    depth = lower_backbones(config, model)[0].num_layers
    return tuple(sorted({*resolve_layers(config.fusion_layers, depth), depth}))
