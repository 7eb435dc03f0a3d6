"""What the YAML file of linear shortcuts may say."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..shortcuts import FitOptions
from ..tasks.data import DataRecipe
from ..tasks.registry import NamedTask
from .recipe import BackboneRecipe
from .yaml import apply_settings, read_yaml, validated

KNOWN_TASKS = ("causal_lm", "masked_lm", "sequence_classification")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ShortcutFields(_Section):
    """Which shortcuts are fitted, and how; see `FitOptions`."""

    sources: list[int] | None = Field(None, description="Layers to cast from; None for all below the last.")
    pairs: Literal["last", "all"] = Field("last", description="From each source to the last layer, or all pairs of layers.")
    fused: list[int] | str | None = Field(
        "every:6", description="Layers that a fused shortcut reads beside its source; None for no fused ones."
    )
    bias: bool = Field(True, description="Fit a constant too.")
    ridge: float = Field(0.0, ge=0, description="Weight of the squared matrix, in mean squares of the states.")
    rank: int | None = Field(None, ge=1, description="Rank of the matrices; None for whole ones.")
    positions: Literal["all", "one", "labelled"] | None = Field(
        None, description="Which positions count; None: those that the task predicts at."
    )
    skip: int | None = Field(None, ge=0, description="First positions of a row left out; None for 1 in a causal model.")
    batch_size: int = Field(8, ge=1, description="Rows of one call of the backbone.")


class JudgingFields(_Section):
    """By what shortcuts are judged."""

    split: Literal["dev", "test"] | None = Field(None, description="None for test, or dev where the data have no test.")
    rows: int | None = Field(None, ge=1, description="So many rows, spread evenly over the split; None for all.")


class ShortcutRecipe(_Section):
    """Linear shortcuts of one model: what they are fitted to, and judged by."""

    task: NamedTask
    backbone: BackboneRecipe | None = Field(None, description="The model with its head; or give `run`.")
    run: str | None = Field(None, description="A folder that train wrote, whose backbone, adapter and head are the model.")
    data: DataRecipe
    shortcuts: ShortcutFields = Field(default_factory=lambda: ShortcutFields.model_validate({}))
    evaluation: JudgingFields = Field(default_factory=lambda: JudgingFields.model_validate({}))
    seed: int = 1

    def options(self) -> FitOptions:
        """The options of the fit."""
        fields = self.shortcuts.model_dump()
        return FitOptions(**{**fields, "positions": fields["positions"] or self.task.positions}, seed=self.seed)


def load_shortcut_recipe(path: str | Path, settings: list[str] | None = None) -> ShortcutRecipe:
    """Reads and checks a recipe of shortcuts.

    Args:
        path: The YAML file.
        settings: Changes, `section.key=value`, the value in YAML.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no YAML mapping, or a key or a value does not fit; names near misses.
    """
    values = read_yaml(path)
    apply_settings(values, settings)
    return parse_shortcut_recipe(values, str(path))


def parse_shortcut_recipe(values: dict[str, Any], source: str) -> ShortcutRecipe:
    """Checks the content of a recipe of shortcuts. Raises ValueError if a key or a value does not fit."""
    recipe = validated(ShortcutRecipe, values, source)
    if recipe.task.name not in KNOWN_TASKS:
        raise ValueError(
            f"The recipe {source!r} sets task: {recipe.task.name}, and shortcuts are judged by what a head says of a position or of a "
            f"text as a whole. Choose one of {', '.join(KNOWN_TASKS)}."
        )
    if (recipe.backbone is None) == (recipe.run is None):
        raise ValueError(
            f"The recipe {source!r} names {'neither' if recipe.run is None else 'both'} backbone and run. Give one: backbone.model for a "
            "model as it is, run for one that fusion-adapters train made of it."
        )
    if recipe.shortcuts.positions == "labelled" and recipe.task.name == "sequence_classification":
        raise ValueError(
            f"The recipe {source!r} sets shortcuts.positions: labelled with task: {recipe.task.name}, whose texts have one label and no "
            "position of it. Leave positions out, for all of a text."
        )
    recipe.options()
    return recipe
