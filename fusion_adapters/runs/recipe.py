"""Recipes: what a YAML file may say, read strictly, so that a misspelt key is an error and not a silent default."""

from __future__ import annotations

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import TrainingArguments

from ..tuner.config import FusionConfig

Model = TypeVar("Model", bound=BaseModel)
Task = Literal["token_classification", "sequence_classification", "masked_lm"]


class _Loader(yaml.SafeLoader):
    """YAML as people write it: PyYAML alone reads 1e-3 as text, because YAML 1.1 wants 1.0e-3, and drops repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key.value, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class BackboneRecipe(_Section):
    """Which model, and how it is loaded."""

    model: str = Field(description="A hub id or a local folder.")
    bits: Literal[4, 8] | None = Field(None, description="Quantise the backbone with bitsandbytes.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Dtype of the backbone's weights.")


class DataRecipe(_Section):
    """Where the examples are, and how they are cut."""

    path: str = Field(description="A folder, a hub dataset id, or package:quickstart.")
    train: str | None = Field(None, description="Training file in the folder, or split of the hub dataset.")
    dev: str | None = Field(None, description="Development file or split; without one, dev_fraction of train is cut off.")
    test: str | None = Field(None, description="Test file or split.")
    config_name: str | None = Field(None, description="Configuration of a hub dataset.")
    format: Literal["conll", "csv", "json", "text"] | None = Field(
        None, description="Format of the files; None reads it from the name."
    )
    text: str | None = Field(None, description="Column of the text (or of the tokens); None takes the usual names.")
    label: str | None = Field(None, description="Column of the label (or of the tags); None takes the usual names.")
    labels: list[str] | None = Field(None, description="The label set; None takes the labels of the training data.")
    dev_fraction: float = Field(
        0.1, gt=0, lt=1, description="Share of train to cut off for development, if there is no dev."
    )
    test_fraction: float | None = Field(
        None, gt=0, lt=1, description="Share of train to cut off for testing, if there is no test; the same for every seed."
    )
    limit: int | None = Field(None, ge=1, description="Use this many training examples, drawn by the seed.")
    max_length: int = Field(
        256, ge=8, description="Word pieces per row; longer sentences of tokens, and texts of masked_lm, are split."
    )


class Recipe(_Section):
    """One run: backbone, adapter, data and training."""

    task: Task
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


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The content of a YAML file that holds a mapping; see `load_recipe`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no recipe {str(path)!r}. Give the path of a YAML file, for example one of recipes/."
        )
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The recipe {str(path)!r} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"The recipe {str(path)!r} must hold sections with keys (for example task, backbone, data); it is empty or a list."
        )
    return _unshared(values)


def _unshared(value: Any) -> Any:
    """A copy in which nothing is shared: what a YAML alias repeats is the same object, and a change would reach all of it."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def apply_settings(values: dict[str, Any], settings: list[str] | None) -> None:
    """Applies changes, `section.key=value`, the value in YAML. Raises ValueError if one does not fit."""
    for setting in settings or []:
        _apply(values, setting)


def parse_recipe(values: dict[str, Any], source: str) -> Recipe:
    """Checks the content of a recipe; `source` names it in errors. Raises ValueError."""
    recipe = validated(Recipe, values, source)
    adapter_fields = {f.name for f in dataclasses.fields(FusionConfig) if f.init} - RESERVED_ADAPTER
    arguments = {f.name: f.default for f in dataclasses.fields(TrainingArguments) if f.init}
    training_fields = arguments.keys() - RESERVED_TRAINING
    _check_keys(source, "adapter", recipe.adapter, adapter_fields, RESERVED_ADAPTER)
    _check_keys(source, "training", recipe.training, training_fields, RESERVED_TRAINING)
    if recipe.task == "masked_lm" and recipe.training.get("label_smoothing_factor"):
        raise ValueError(
            f"The recipe {source!r} sets training.label_smoothing_factor, which task: masked_lm does not know: its loss is the "
            "likelihood of the hidden pieces. Remove it."
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


def validated(model: type[Model], values: dict[str, Any], source: str) -> Model:
    """The content of a YAML file as a pydantic model. Raises ValueError with all that does not fit."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        explained = " ".join(_explain(e, model) for e in error.errors())
        raise ValueError(f"The recipe {source!r} does not fit. {explained}") from error


def _apply(values: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ValueError(
            f"--set {setting!r} must have the form section.key=value, for example --set training.learning_rate=1e-3."
        )
    section = values
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ValueError(f"--set {setting!r}: {part!r} is a value in the recipe, not a section with keys.")
    try:
        section[parts[-1]] = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {setting!r}: the value is not valid YAML ({' '.join(str(error).split())}).") from error


def _explain(error: Any, model: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        inner: Any = model
        for part in error["loc"][:-1]:
            fields = getattr(inner, "model_fields", {})
            # a mapping of sections: its names are the user's
            inner = fields[str(part)].annotation if str(part) in fields else get_args(inner)[-1]
        return f"{where!r} is not a key of a recipe.{_nearest(str(error['loc'][-1]), set(inner.model_fields))}"
    if error["type"] == "missing":
        return f"{where!r} is missing."
    return f"{where!r} is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}."


def _check_keys(source: str, section: str, given: dict[str, Any], known: set[str], reserved: set[str]) -> None:
    for key in given:
        if key in reserved:
            raise ValueError(
                f"The recipe {source!r} sets {section}.{key}, which the run sets itself (task, seed and --output). Remove it."
            )
        if key not in known:
            raise ValueError(
                f"The recipe {source!r} does not fit. '{section}.{key}' is not a key of this section.{_nearest(key, known)}"
            )


def _nearest(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" The keys are: {', '.join(sorted(known))}." if len(known) < 20 else ""
