"""The cached layer states of a comparison: one extraction that all frozen methods share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import get_peft_model
from torch import nn
from transformers import AutoTokenizer, DataCollatorWithPadding

from ..backbone.blocks import find_backbones
from ..fusions import fusion_class, resolve_layers
from ..runs.attaching import adapter_config
from ..runs.files import written_aside
from ..runs.loading import check_lengths, load_model, settle_label_at
from ..runs.pretrained import load_pretrained, locate
from ..runs.recipe import Recipe
from ..runs.tokenizers import load_tokenizer
from ..states import cache_layer_states
from ..states.key import made_by_other_versions
from ..states.storage import has_manifest, read_manifest
from ..tuner.config import FusionConfig
from ..tuner.lower import lower_backbones
from .examples import splits_of
from .recipe import StudyRecipe


def states_folder(study: StudyRecipe, data: str, method: str, root: Path) -> Path:
    """Where the layer states of a data set are, for the quantisation of a method: those of tokens, or one mean a text."""
    bits = study.methods[method].bits or study.backbone.bits
    name = data if bits is None else f"{data}-{bits}bit"
    return root / (f"{name}-means" if _reads_means(adapter_config(study.recipe_of(data, method))) else name)


def with_local_backbone(study: StudyRecipe, root: Path) -> StudyRecipe:
    """A comparison whose backbone is quick to load: one from a GGUF file is unpacked once, into a folder beside the layer states.

    Args:
        study: The comparison.
        root: The folder of the layer states.

    Returns:
        The comparison with that folder as its backbone; of others, itself.
    """
    if "gguf_file" not in locate(study.backbone)[1]:
        return study
    folder = root / "backbone"
    if not folder.is_dir():
        recipe = study.recipe_of(next(iter(study.data)), next(iter(study.methods)))
        labels = splits_of(study, next(iter(study.data))).labels
        model = load_model(recipe.backbone, recipe.task, labels)
        # a head over the vocabulary is the checkpoint's own; any other is fresh in every run
        base: Any = model if recipe.task.vocabulary_head else find_backbones(model, None, None)[0].base
        with written_aside(folder, overwrite=False) as unfinished:
            base.save_pretrained(unfinished)
            load_pretrained(AutoTokenizer, recipe.backbone).save_pretrained(unfinished)
    return study.model_copy(
        update={"backbone": study.backbone.model_copy(update={"model": str(folder), "gguf_file": None, "revision": None})}
    )


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
            config = adapter_config(recipe)
            tokenizer = load_tokenizer(recipe.backbone, recipe.task)
            model = load_model(recipe.backbone, recipe.task, splits.labels, config.modules_to_save or ())
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
            settle_label_at(recipe.data, recipe.task, model, config)
            if _reads_means(config):  # whatever its fusion
                model = get_peft_model(model, _pooling(config))
            encoded = splits.encoded(recipe.task, tokenizer, recipe.data)
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


def _reads_means(config: FusionConfig) -> bool:
    """Whether a method reads one mean of each text, where its head allows it."""
    return config.fusion_pool is not None and not config.has_lora and not fusion_class(config.fusion).mixes_positions


def _pooling(config: FusionConfig) -> FusionConfig:
    """An adapter that pools as a method's does and does nothing else."""
    return FusionConfig(
        fusion="last",
        fusion_pool=config.fusion_pool,
        task_type=config.task_type,
        modules_to_save=config.modules_to_save,
        fusion_blocks=config.fusion_blocks,
        fusion_stack=config.fusion_stack,
    )


def _layers(recipe: Recipe, model: nn.Module) -> tuple[int, ...]:
    config = adapter_config(recipe)
    depth = lower_backbones(config, model)[0].num_layers
    return tuple(sorted({*resolve_layers(config.fusion_layers, depth), depth}))
