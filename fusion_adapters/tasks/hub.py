"""Data sets of the hub, and local folders laid out like one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Task
from .data import DataRecipe
from .tables import Table


def read_dataset(recipe: DataRecipe, task: Task, names: Mapping[str, str | None]) -> dict[str, Table]:
    """Reads a data set by the `datasets` library.

    Args:
        recipe: Its `path` is the data set's name or folder.
        task: Whose usual label columns tell a test split without labels (as in GLUE), which is left out.
        names: For `train`, `dev` and `test` the split that the recipe names, or None for the usual one.

    Returns:
        A table for each split that is there; classes by their names.

    Raises:
        FileNotFoundError: If it cannot be loaded.
        ValueError: If a split that is asked for is not there, or a label has no name.
    """
    from datasets import ClassLabel, load_dataset

    try:
        dataset = load_dataset(recipe.path, recipe.config_name)
    except Exception as error:
        raise FileNotFoundError(
            f"The data {recipe.path!r} cannot be read: it is neither a folder that holds the files named in the recipe "
            f"({', '.join(n for n in names.values() if n) or 'none are named'}) nor a dataset that could be loaded "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). Set data.path."
        ) from error
    read = {}
    for split, default in (("train", "train"), ("dev", "validation"), ("test", "test")):
        name = names[split] or default
        if name not in dataset:
            if names[split] is not None or split == "train":
                raise ValueError(f"{recipe.path!r} has no split {name!r}; it has {', '.join(map(repr, dataset))}.")
            continue
        part = dataset[name]
        source = f"{recipe.path}, {name}"
        columns: dict[str, Any] = {column: list(part[column]) for column in part.column_names}
        if split == "test" and names[split] is None and _is_unlabelled(columns, recipe, task):
            continue
        classes = {}
        for column, feature in part.features.items():
            inner = getattr(feature, "feature", feature)
            if isinstance(inner, ClassLabel):
                classes[column] = list(inner.names)
                columns[column] = [_label_name(inner, value, f"{source}, column {column!r}") for value in columns[column]]
        read[split] = Table(columns, source, classes=classes)
    return read


def _is_unlabelled(columns: Mapping[str, Any], recipe: DataRecipe, task: Task) -> bool:
    label = next((c for c in (recipe.label, *task.label_columns) if c in columns), None)
    return label is not None and all(value in (-1, None) for value in columns[label])


def _label_name(feature: Any, value: Any, source: str) -> Any:
    if value is None:
        return None  # reported with its row
    try:
        return feature.int2str(value)
    except ValueError as error:
        raise ValueError(
            f"{source}: {value!r} is the number of none of the {feature.num_classes} classes; a split without labels cannot be "
            "scored. Name another split, or leave data.test unset."
        ) from error
