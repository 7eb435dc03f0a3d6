"""Which comparison a folder holds: it goes on with that one, and with no other."""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import psutil
import yaml
from torch import nn

from ..backbone.atomic import temporary_of, write_text_whole
from ..backbone.blocks import find_backbones
from ..backbone.fingerprint import weights_signature
from ..backbone.sampled import sampled_signature
from ..backbone.settings import settings
from ..runs.attaching import adapter_config
from ..runs.loading import load_model
from ..runs.tokenizers import load_tokenizer
from ..runs.yaml import validated
from ..states.key import tokenizer_signature
from ..tuner.budget import default_budget, has_own_width
from ..tuner.config import FusionConfig
from ..tuner.lower import lower_backbones
from ..tuner.sizes import UNFITTED
from .examples import splits_of
from .recipe import StudyRecipe

STUDY_FILE = "study.yaml"
DATA_FILE = "data.json"
BACKBONE_FILE = "backbone.json"
# What parameters and states count for in adapters that do not say, those of 0.1.0; and their width, if they say none either.
OF_0_1_0: dict[str, Any] = {"fusion_alpha": 1.0, "fusion_norm": "none", "fusion_budget": UNFITTED}
# What may differ between two calls on one folder: a run belongs to its method, size, seed and rate, and stays as it is.
GROWING = ("methods", "sizes", "seeds", "rate_seeds", "rate_sizes", "rates", "baseline", "reference")


def begin_or_resume(study: StudyRecipe, output: Path) -> None:
    """Writes recipe, data and backbone signatures into a folder, or checks that those there are the same.

    Args:
        study: The comparison.
        output: New, empty, or with this comparison begun. While it holds no run, the recipe may still change.

    Raises:
        ValueError: If the folder holds another comparison, or one of other data or of another backbone.
        FileExistsError: If it holds something else.
    """
    _remove_unfinished(output)
    values = json.loads(study.model_dump_json(exclude={"quick"}))
    signatures = {data: data_signature(study, data) for data in study.data}
    backbone = backbone_signatures(study)
    path = output / STUDY_FILE
    if path.is_file():
        if any((output / "runs").rglob("*.json")):
            # methods that are left out today keep their place: they may come back
            values["methods"] = {**_check_same(values, signatures, backbone, output), **values["methods"]}
            backbone = {**_read(output / BACKBONE_FILE), **backbone}
    elif output.exists() and any(not found.name.startswith(".") for found in output.iterdir()):
        raise FileExistsError(
            f"The folder {str(output)!r} is not empty and holds no comparison. Give a new or empty folder."
        )
    # first of all the file that says what the folder is
    write_text_whole(path, yaml.safe_dump(values, sort_keys=False))
    write_text_whole(output / DATA_FILE, json.dumps(signatures, indent=1) + "\n")
    write_text_whole(output / BACKBONE_FILE, json.dumps(backbone, indent=1) + "\n")


def settle_scales(study: StudyRecipe, output: Path, model: nn.Module) -> None:
    """Writes `fusion_alpha`, `fusion_norm` and the budget into every method that leaves them out.

    So a comparison stays when a default changes.

    One that was begun by 0.1.0, which knew neither, goes on without them, in methods that are added today too.

    Args:
        study: The comparison, whose methods are changed.
        output: Its folder.
        model: Its backbone, with or without weights.
    """
    path = output / STUDY_FILE
    begun: dict[str, Any] = {}
    if path.is_file() and any((output / "runs").rglob("*.json")):
        begun = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("methods") or {}
    for name, method in study.methods.items():
        config = adapter_config(study.recipe_of(next(iter(study.data)), name))
        causal = all(b.causal for b in lower_backbones(config, model))
        today: dict[str, Any] = {"fusion_alpha": config.alpha_on(causal), "fusion_norm": config.norm_on(causal)}
        if not has_own_width(config):
            today["fusion_budget"] = default_budget(config, model) or UNFITTED
        for field, value in today.items():
            old = any(field in _unsaid(other.get("adapter") or {}) for other in begun.values())
            method.adapter.setdefault(field, OF_0_1_0[field] if old else value)


def _unsaid(adapter: dict[str, Any]) -> list[str]:
    """The fields of `OF_0_1_0` that a method's adapter should say and does not."""
    width = has_own_width(FusionConfig(**adapter))
    return [field for field in OF_0_1_0 if field not in adapter and not (field == "fusion_budget" and width)]


def _remove_unfinished(output: Path) -> None:
    """Removes files that a process was killed over: a report's, or a run's, in the making."""
    for found in [*output.glob(".*"), *output.glob("runs/*/*/.*")]:
        writer = temporary_of(found.name)
        if writer is not None and found.is_file() and not psutil.pid_exists(writer[1]):
            found.unlink(missing_ok=True)


def data_signature(study: StudyRecipe, data: str) -> str:
    """A hash over all examples of a data set, their labels and their place in training, development and test data."""
    splits = splits_of(study, data)
    found = [[astuple(example) for example in part] for part in (splits.train, splits.dev, splits.test)]
    return hashlib.sha256(json.dumps([found, splits.labels]).encode()).hexdigest()


def backbone_signatures(study: StudyRecipe) -> dict[str, str]:
    """Hashes over the tokenizer, over the weights that run before or in the blocks, and over the settings that change answers.

    The weights once for each quantisation that a method asks for: a folder or a hub name can hold others than yesterday. Comparisons
    of 0.1.0 know values sampled from them alone.
    """
    data = next(iter(study.data))
    recipes = [study.recipe_of(data, method) for method in study.methods]
    configs = [adapter_config(recipe) for recipe in recipes]
    named = next((config.fusion_blocks for config in configs if config.fusion_blocks), None)
    found = {"tokenizer": tokenizer_signature(load_tokenizer(study.backbone, study.task))}
    for recipe, config in zip(recipes, configs, strict=True):
        bits = recipe.backbone.bits
        part = "weights" if bits is None else f"weights in {bits} bits"
        if part not in found:
            labels = splits_of(study, data).labels
            model = load_model(recipe.backbone, recipe.task, labels, config.modules_to_save or ())
            backbone = find_backbones(model, named)[0]
            found[part] = sampled_signature(backbone)
            found[f"all {part}"] = weights_signature(backbone)
            found["settings"] = hashlib.sha256(json.dumps(settings(backbone), sort_keys=True).encode()).hexdigest()[:16]
    return found


def _check_same(
    values: dict[str, Any], signatures: dict[str, str], backbone: dict[str, str], output: Path
) -> dict[str, Any]:
    """The methods of the comparison in the folder. Raises ValueError if it is another one."""
    path = output / STUDY_FILE
    # with today's defaults for keys that came later
    began = validated(StudyRecipe, yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    for data in began.data.values():
        if began.task.of_words and "label_at" not in data.model_fields_set:
            data.label_at = "first"  # of 0.1.0, which had no other
    for method in began.methods.values():
        method.adapter.update({field: OF_0_1_0[field] for field in _unsaid(method.adapter)})
    there = json.loads(began.model_dump_json(exclude={"quick"}))
    before, known = _read(output / DATA_FILE), _read(output / BACKBONE_FILE)
    # where the files are does not matter, what is in them does
    wrong = [f"the examples of {name!r}" for name in before if name in signatures and before[name] != signatures[name]]
    old, new = (_without_paths(study) if before else study for study in (there, values))
    wrong += [k for k in {**old, **new} if old.get(k) != new.get(k) and k not in GROWING]
    wrong += [f"the backbone's {part}" for part in known if part in backbone and known[part] != backbone[part]]
    methods = there["methods"]
    now = values["methods"]
    wrong += [f"methods.{n}" for n in methods if n in now and {**methods[n], "rates": None} != {**now[n], "rates": None}]
    if wrong:
        raise ValueError(
            f"The folder {str(output)!r} holds another comparison: {', '.join(wrong)} differ from its {STUDY_FILE}. Give another "
            "folder. (Methods, sizes, seeds and rates may be added to a comparison; what is there may not change.)"
        )
    return methods


def _read(path: Path) -> dict[str, str]:
    """The signatures in a file; folders of earlier versions have none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _without_paths(values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "data": {name: {**data, "path": None} for name, data in values["data"].items()}}
