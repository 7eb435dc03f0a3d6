"""Which comparison a folder holds: it goes on with that one, and with no other."""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import yaml

from ..files import write_text_whole
from ..recipe import validated
from .examples import splits_of
from .recipe import StudyRecipe

STUDY_FILE = "study.yaml"
DATA_FILE = "data.json"
# What may differ between two calls on one folder: a run belongs to its method, size, seed and rate, and stays as it is.
GROWING = ("methods", "sizes", "seeds", "rate_seeds", "rate_sizes", "rates", "baseline", "reference")


def claim(study: StudyRecipe, output: Path) -> None:
    """Writes recipe and data signatures into a folder, or checks that those there are the same.

    Args:
        study: The comparison.
        output: New, empty, or with this comparison begun. While it holds no run, the recipe may still change.

    Raises:
        ValueError: If the folder holds another comparison, or other data.
        FileExistsError: If it holds something else.
    """
    values = json.loads(study.model_dump_json(exclude={"quick"}))
    signatures = {data: data_signature(study, data) for data in study.data}
    path = output / STUDY_FILE
    if path.is_file():
        if any((output / "runs").rglob("*.json")):
            # methods that are left out today keep their place: they may come back
            values["methods"] = {**_check_same(values, signatures, output), **values["methods"]}
    elif output.exists() and any(output.iterdir()):
        raise FileExistsError(
            f"The folder {str(output)!r} is not empty and holds no comparison. Give a new or empty folder."
        )
    write_text_whole(output / DATA_FILE, json.dumps(signatures, indent=1) + "\n")
    write_text_whole(path, yaml.safe_dump(values, sort_keys=False))


def data_signature(study: StudyRecipe, data: str) -> str:
    """A hash over all examples of a data set, their labels and their place in training, development and test data."""
    splits = splits_of(study, data)
    found = [[astuple(example) for example in part] for part in (splits.train, splits.dev, splits.test)]
    return hashlib.sha256(json.dumps([found, splits.labels]).encode()).hexdigest()


def _check_same(values: dict[str, Any], signatures: dict[str, str], output: Path) -> dict[str, Any]:
    """The methods of the comparison in the folder. Raises ValueError if it is another one."""
    path, known = output / STUDY_FILE, output / DATA_FILE
    # with today's defaults for keys that came later
    began = validated(StudyRecipe, yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    there = json.loads(began.model_dump_json(exclude={"quick"}))
    before = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    # where the files are does not matter, what is in them does
    wrong = [f"the examples of {name!r}" for name in before if name in signatures and before[name] != signatures[name]]
    old, new = (_without_paths(study) if before else study for study in (there, values))
    wrong += [k for k in {**old, **new} if old.get(k) != new.get(k) and k not in GROWING]
    methods = there["methods"]
    wrong += [f"methods.{n}" for n in methods if n in values["methods"] and methods[n] != values["methods"][n]]
    if wrong:
        raise ValueError(
            f"The folder {str(output)!r} holds another comparison: {', '.join(wrong)} differ from its {STUDY_FILE}. Give another "
            "folder. (Methods, sizes, seeds and rates may be added to a comparison; what is there may not change.)"
        )
    return methods


def _without_paths(values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "data": {name: {**data, "path": None} for name, data in values["data"].items()}}
