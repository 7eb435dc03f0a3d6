"""Recipes: what the YAML file of a run may say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer
from transformers import TrainingArguments

from ..tasks.data import DataRecipe
from ..tasks.registry import NamedTask
from ..tuner import FusionConfig
from .yaml import apply_settings, nearest, read_yaml, validated


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in SECRETS}


# Fields of transformers' TrainingArguments; what must stay secret is in no file.
TrainingFields = Annotated[dict[str, Any], PlainSerializer(_without_secrets)]
SECRETS = ("hub_token",)
AUTO = "auto"  # of adapter.fusion_depth: the run chooses


class BackboneRecipe(_Section):
    """Which model, and how it is loaded."""

    model: str = Field(description="A hub id or a local folder.")
    gguf_file: str | None = Field(None, description="A GGUF file there; its weights are unpacked to dtype.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    bits: Literal[4, 8] | None = Field(None, description="Quantise the backbone with bitsandbytes.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Dtype of the backbone's weights.")


class BesideRecipe(_Section):
    """What is trained beside a run, to compare: another adapter on the same backbone and data."""

    adapter: dict[str, Any] = Field(default_factory=dict, description="Fields of FusionConfig, instead of the run's own.")
    training: TrainingFields = Field(default_factory=dict, description="Training arguments that differ from the run's.")


class Recipe(_Section):
    """One run: backbone, adapter, data and training."""

    task: NamedTask
    backbone: BackboneRecipe
    adapter: dict[str, Any] = Field(default_factory=dict, description="Fields of FusionConfig.")
    data: DataRecipe
    training: TrainingFields = Field(default_factory=dict, description="Fields of transformers' TrainingArguments.")
    beside: dict[str, BesideRecipe] = Field(
        default_factory=dict, description="By name, what is trained and scored beside the run, and not kept."
    )
    save_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="In which the adapter is stored; bfloat16 is half the bytes. Scores are of what is stored."
    )
    seed: int = 1


# Set by the run itself.
RESERVED_TRAINING = {
    "output_dir",
    "seed",
    "data_seed",
    "metric_for_best_model",
    "greater_is_better",
    "label_names",
    "push_to_hub",  # the folder of the Trainer is not the run's
    "prediction_loss_only",  # scores are of predictions
    "eval_do_concat_batches",
}
RESERVED_ADAPTER = {"task_type", "peft_type", "inference_mode"}


def load_recipe(path: str | Path, settings: list[str] | None = None) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: The YAML file.
        settings: Changes, `section.key=value`, the value in YAML.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no YAML mapping, or a key or a value does not fit; names near misses.
    """
    values = read_yaml(path)
    apply_settings(values, settings)
    return parse_recipe(values, str(path))


def parse_recipe(values: dict[str, Any], source: str, finished: bool = False) -> Recipe:
    """Checks the content of a recipe.

    Args:
        values: The content.
        source: Names it in errors.
        finished: Whether its run is done: how it was trained is history, and later versions may not know all of its arguments.

    Raises:
        ValueError: If a key or a value does not fit.
    """
    recipe = validated(Recipe, values, source)
    if finished and "label_at" not in values.get("data", {}):
        recipe.data.label_at = "first"  # of 0.1.0, which had no other
    fields = [f for f in dataclasses.fields(FusionConfig) if f.init]
    _check_keys(source, "adapter", recipe.adapter, {f.name for f in fields} - RESERVED_ADAPTER, RESERVED_ADAPTER)
    only = {f.name: f.default for f in fields if f.type in (int, float, bool, "int", "float", "bool")}
    _check_types(source, "adapter", recipe.adapter, only)
    if not finished:
        _check_training(recipe, source)
        if chooses_depth(recipe.adapter) and recipe.task.vocabulary_head:
            raise ValueError(
                f"The recipe {source!r} sets adapter.fusion_depth: auto with task: {recipe.task.name}, whose head over the vocabulary was "
                "made for the last block and cannot read a state below it. Leave fusion_depth out."
            )
        for name in recipe.beside:
            recipe_beside(recipe, name, source)
    return recipe


def recipe_beside(recipe: Recipe, name: str, source: str = "") -> Recipe:
    """The recipe of what is trained beside a run under that name. Raises ValueError if it does not fit."""
    other = recipe.beside[name]
    if chooses_depth(other.adapter):
        raise ValueError(
            f"The recipe {source!r} sets beside.{name}.adapter.fusion_depth: auto, and a depth is chosen for the run itself alone. Give "
            "a number of blocks there, or leave it out for all blocks."
        )
    values = recipe.model_dump(exclude={"beside", "adapter"})
    values |= {"adapter": other.adapter, "training": {**recipe.training, **other.training}}
    return parse_recipe(values, f"{source}, beside.{name}")


def chooses_depth(adapter: Mapping[str, Any]) -> bool:
    """Whether the fields of an adapter leave its depth to the run: `fusion_depth: auto`."""
    return adapter.get("fusion_depth") == AUTO


def _check_training(recipe: Recipe, source: str) -> None:
    arguments = {f.name: f.default for f in dataclasses.fields(TrainingArguments) if f.init}
    _check_keys(source, "training", recipe.training, arguments.keys() - RESERVED_TRAINING, RESERVED_TRAINING)
    for key, reason in recipe.task.refused_training.items():
        if recipe.training.get(key):
            raise ValueError(
                f"The recipe {source!r} sets training.{key}, which task: {recipe.task.name} does not know: {reason}. Remove it."
            )
    # YAML reads a bare no as false
    strategies = {k: "no" for k, v in recipe.training.items() if v is False and k.endswith("_strategy")}
    recipe.training.update(strategies)
    # transformers would find a text where a number belongs only in the middle of the run
    _check_types(source, "training", recipe.training, {k: v for k, v in arguments.items() if not isinstance(v, bool)})
    epochs, steps = recipe.training.get("num_train_epochs", 1), recipe.training.get("max_steps", -1)
    if epochs <= 0 and steps <= 0:
        raise ValueError(
            f"The recipe {source!r} does not fit. 'training.num_train_epochs' is {epochs}, with which nothing is trained and the run's "
            "scores would be those of a random head. Give a number above 0."
        )


def _check_types(source: str, section: str, given: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raises ValueError for a value of another type where the default is a number or a switch."""
    for key, value in given.items():
        default = defaults.get(key)
        if isinstance(default, bool):
            fits, wanted = isinstance(value, bool), "true or false"
        elif isinstance(default, (int, float)):
            fits, wanted = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
        else:
            continue
        if not fits:
            raise ValueError(f"The recipe {source!r} does not fit. '{section}.{key}' is {value!r}; it must be {wanted}.")


def _check_keys(source: str, section: str, given: dict[str, Any], known: set[str], reserved: set[str]) -> None:
    for key in given:
        if key in reserved:
            raise ValueError(
                f"The recipe {source!r} sets {section}.{key}, which the run sets itself (task, seed and --output). Remove it."
            )
        if key not in known:
            raise ValueError(
                f"The recipe {source!r} does not fit. '{section}.{key}' is not a key of this section.{nearest(key, known)}"
            )
