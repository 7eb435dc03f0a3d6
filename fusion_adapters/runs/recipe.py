"""Recipes: what the YAML file of a run may say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from transformers import TrainingArguments

from ..tasks.data import DataRecipe
from ..tasks.registry import NamedTask
from ..tuner import FusionConfig
from .yaml import apply_settings, nearest, read_yaml, validated


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class BackboneRecipe(_Section):
    """Which model, and how it is loaded."""

    model: str = Field(description="A hub id or a local folder.")
    bits: Literal[4, 8] | None = Field(None, description="Quantise the backbone with bitsandbytes.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Dtype of the backbone's weights.")


class Recipe(_Section):
    """One run: backbone, adapter, data and training."""

    task: NamedTask
    backbone: BackboneRecipe
    adapter: dict[str, Any] = Field(default_factory=dict, description="Fields of FusionConfig.")
    data: DataRecipe
    training: dict[str, Any] = Field(default_factory=dict, description="Fields of transformers' TrainingArguments.")
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


def parse_recipe(values: dict[str, Any], source: str) -> Recipe:
    """Checks the content of a recipe; `source` names it in errors. Raises ValueError."""
    recipe = validated(Recipe, values, source)
    adapter_fields = {f.name for f in dataclasses.fields(FusionConfig) if f.init} - RESERVED_ADAPTER
    arguments = {f.name: f.default for f in dataclasses.fields(TrainingArguments) if f.init}
    training_fields = arguments.keys() - RESERVED_TRAINING
    _check_keys(source, "adapter", recipe.adapter, adapter_fields, RESERVED_ADAPTER)
    _check_keys(source, "training", recipe.training, training_fields, RESERVED_TRAINING)
    for key, reason in recipe.task.refused_training.items():
        if recipe.training.get(key):
            raise ValueError(
                f"The recipe {source!r} sets training.{key}, which task: {recipe.task.name} does not know: {reason}. Remove it."
            )
    # YAML reads a bare no as false
    strategies = {k: "no" for k, v in recipe.training.items() if v is False and k.endswith("_strategy")}
    recipe.training.update(strategies)
    for key, value in recipe.training.items():
        # transformers would find a text where a number belongs only in the middle of the run
        number = isinstance(arguments[key], (int, float)) and not isinstance(arguments[key], bool)
        if number and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"The recipe {source!r} does not fit. 'training.{key}' is {value!r}; it must be a number.")
    return recipe


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
