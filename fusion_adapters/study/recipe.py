"""What the YAML file of a comparison may say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..runs.recipe import BackboneRecipe, Recipe, TrainingFields, chooses_depth, parse_recipe
from ..runs.yaml import apply_settings, read_yaml, validated
from ..tasks.data import DataRecipe
from ..tasks.registry import NamedTask

ALL = "all"


# TrainingArguments that follow from the grid.
SET_BY_STUDY = (
    "learning_rate",
    "max_steps",
    "num_train_epochs",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "logging_strategy",
    "load_best_model_at_end",
    "disable_tqdm",
)


class MethodRecipe(BaseModel):
    """One row of the comparison."""

    model_config = ConfigDict(extra="forbid")

    adapter: dict[str, Any] = Field(default_factory=dict, description="Fields of FusionConfig.")
    training: TrainingFields = Field(default_factory=dict, description="TrainingArguments of this method alone.")
    bits: Literal[4, 8] | None = Field(None, description="Quantise the backbone for this method.")
    rates: list[float] | None = Field(None, description="A grid of its own; the same for all methods is fairer.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps at most, of this method alone.")
    evaluations: int | None = Field(
        None, ge=1, description="Times that the development data are scored, of this method alone."
    )
    start_from: str | None = Field(
        None, description="Begin with another method's trained weights, of the same size and seed, where they fit."
    )
    lora_rate_scale: float = Field(1.0, gt=0, description="LoRA's learning rate, as a multiple of the fusion's.")


class StudyRecipe(BaseModel):
    """A comparison: every method at every size with every seed on every data set.

    The learning rate of a method is chosen on development data for each data set and size, by runs with `rate_seeds`;
    the reported runs have other seeds, and score the test data once.
    """

    model_config = ConfigDict(extra="forbid")

    task: NamedTask
    backbone: BackboneRecipe
    data: dict[str, DataRecipe] = Field(description="Data sets by name.")
    methods: dict[str, MethodRecipe] = Field(description="Methods by name.")
    baseline: str = Field("deeper", description="The method whose paired difference is reported.")
    reference: str | None = Field("concat", description="A second one.")
    sizes: list[int | Literal["all"]] = Field(description="Numbers of training examples, or 'all'.")
    per_class: bool = Field(False, description="Whether sizes count the training examples of each class (sequences).")
    seeds: list[int] = Field(description="Seeds of the reported runs.")
    rate_seeds: list[int] = Field(default=[0], description="Seeds of the runs that choose the learning rate.")
    rate_sizes: list[int | Literal["all"]] | None = Field(
        None,
        description="Sizes at which rates are chosen, for themselves and the sizes up to the next. None means all sizes.",
    )
    rates: list[float] = Field(default=[3e-4, 1e-3, 3e-3, 1e-2], description="The grid, the same for all methods.")
    epochs: int = Field(
        30, ge=1, description="Passes, counted in examples before long ones are split into rows, as far as max_steps allows."
    )
    max_steps: int = Field(1500, ge=1, description="Optimizer steps at most.")
    evaluations: int = Field(
        6, ge=1, description="Times that the development data are scored in a run, evenly spread, the last at its end."
    )
    training: TrainingFields = Field(default_factory=dict, description="TrainingArguments of all methods.")
    states_dtype: str = Field("float16", description="How layer states are cached.")
    quick: dict[str, Any] = Field(default_factory=dict, description="What --quick changes in this recipe.")

    def recipe_of(self, data: str, method: str, seed: int = 0) -> Recipe:
        """The recipe of a single run, checked as `fusion-adapters train` checks it."""
        chosen = self.methods[method]
        backbone = self.backbone.model_copy(update={} if chosen.bits is None else {"bits": chosen.bits})
        values = {
            "task": self.task.name,
            "backbone": backbone.model_dump(),
            "adapter": chosen.adapter,
            "data": self.data[data].model_dump(),
            "training": {**self.training, **chosen.training},
            "seed": seed,
        }
        return parse_recipe(values, f"{data}, {method}")


def load_study(path: str | Path, settings: list[str] | None = None, quick: bool = False) -> StudyRecipe:
    """Reads and checks the recipe of a comparison.

    Args:
        path: The YAML file.
        settings: Changes, `key=value`, the value in YAML.
        quick: Apply what the recipe's section `quick` changes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a key or a value does not fit.
    """
    values = read_yaml(path)
    of_quick = [s for s in settings or [] if s.strip().startswith("quick.")]
    apply_settings(values, of_quick)
    if quick and isinstance(values.get("quick"), dict):  # anything else is refused below
        values = {**values, **values["quick"]}
    apply_settings(values, [s for s in settings or [] if s not in of_quick])
    study = validated(StudyRecipe, values, str(path))
    if study.per_class and not study.task.counts_classes:
        raise ValueError(
            f"The recipe {str(path)!r} sets per_class, which counts texts of each class; its task is {study.task.name}."
        )
    for name in (study.baseline, study.reference):
        if name is not None and name not in study.methods:
            raise ValueError(
                f"The recipe {str(path)!r} compares with {name!r}, which is none of its methods ({', '.join(study.methods)}). Set "
                "baseline and reference to methods of the recipe."
            )
    _check_lists(study, str(path))
    packed = [name for name, data in study.data.items() if data.packing]
    if packed and study.sizes != [ALL]:
        raise ValueError(
            f"The recipe {str(path)!r} packs the texts of {packed[0]!r} (data.{packed[0]}.packing), and its sizes are {study.sizes}: rows "
            "of joined texts are not parts of each other, and layer states are cached for one way to join them. Set sizes: [all], and "
            "data.limit for fewer texts."
        )
    for name, own in study.methods.items():
        if chooses_depth(own.adapter):
            raise ValueError(
                f"The recipe {str(path)!r} sets methods.{name}.adapter.fusion_depth: auto, which `fusion-adapters train` chooses for one "
                "run. In a comparison write a method for each depth, with a number of blocks in its fusion_depth: all of them read the "
                "same layer states."
            )
    sections = {"training": study.training, **{f"methods.{n}.training": m.training for n, m in study.methods.items()}}
    for where, given in sections.items():
        taken = sorted(set(given) & set(SET_BY_STUDY))
        if taken:
            raise ValueError(
                f"The recipe {str(path)!r} sets {where}.{taken[0]}, which a comparison sets itself: from rates, epochs, "
                "max_steps and evaluations. Set those."
            )
        for count in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if not isinstance(given.get(count, 1), int) or given.get(count, 1) < 1:
                raise ValueError(
                    f"The recipe {str(path)!r} sets {where}.{count} to {given[count]!r}. Give a whole number from 1."
                )
    for name, own in study.methods.items():
        source = own.start_from
        if source is not None and (source not in study.methods or study.methods[source].start_from is not None):
            raise ValueError(
                f"The recipe {str(path)!r} lets {name!r} start from {source!r}, which is not a method of the recipe "
                "that starts afresh."
            )
    unknown = [s for s in study.rate_sizes or [] if s not in study.sizes]
    if unknown:
        raise ValueError(
            f"The recipe {str(path)!r} chooses rates at the sizes {unknown}, which are none of its sizes {study.sizes}."
        )
    repeated = set(study.seeds) & set(study.rate_seeds)
    if repeated:
        raise ValueError(
            f"The recipe {str(path)!r} chooses learning rates with seeds that it also reports ({sorted(repeated)}). Give rate_seeds "
            "that are not among seeds."
        )
    for data in study.data:
        for method in study.methods:
            study.recipe_of(data, method)
    return study


def _check_lists(study: StudyRecipe, source: str) -> None:
    """Raises ValueError for a list of the grid that is empty, repeats itself, or holds what cannot be."""
    grids = {name: own.rates for name, own in study.methods.items() if own.rates is not None}
    lists: dict[str, list[Any]] = {"seeds": study.seeds, "rate_seeds": study.rate_seeds, "sizes": study.sizes}
    lists |= {"rates": study.rates, **{f"methods.{name}.rates": rates for name, rates in grids.items()}}
    lists |= {"methods": list(study.methods), "data": list(study.data)}
    lists |= {} if study.rate_sizes is None else {"rate_sizes": study.rate_sizes}
    for name, values in lists.items():
        shown = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]  # as in the names of files
        least = 0 if name.endswith("seeds") else 1 if name.endswith("sizes") else None
        if not values:
            problem = "is empty"
        elif len(set(shown)) < len(shown):
            problem = f"holds the same twice ({', '.join(shown)})"
        elif least is not None and any(isinstance(v, int) and v < least for v in values):
            problem = f"holds a number below {least} ({', '.join(shown)})"
        elif name.endswith("rates") and not all(0 < rate < math.inf for rate in values):
            problem = f"holds a rate that is not a finite number above 0 ({', '.join(shown)})"
        else:
            continue
        raise ValueError(f"The recipe {source!r} does not fit. '{name}' {problem}. Correct that list.")
