"""Recipes of several tasks on one tiny backbone, some with the same texts."""

from __future__ import annotations

import csv
import json

import yaml
from support_text import SENTENCES, conll, save_model

from fusion_adapters.runs.recipe import load_recipe

TEXTS = [" ".join(word for word, _ in sentence) for sentence in SENTENCES]  # those of the entities, in running text
INTENTS = [(TEXTS[0], "place"), (TEXTS[1], "person"), ("the old man", "person"), ("oslo .", "place")]
PAIRS = [(TEXTS[0], "anna works in rome", "no"), ("bob", "bob man", "yes"), (TEXTS[2], TEXTS[2], "yes")]
TRAINING = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "disable_tqdm": True}
SECTIONS = {
    "entities": {
        "task": "token_classification",
        "adapter": {"fusion": "dwatt"},
        "data": {"train": "train.conll", "test": "test.conll"},
        "seed": 3,
    },
    "intents": {
        "task": "sequence_classification",
        "adapter": {"fusion": "concat", "fusion_bottleneck": 4, "fusion_layers": [0, 2, -1], "modules_to_save": ["pooler"]},
        "data": {"train": "intents.csv", "test": "intents.csv", "max_length": 64},
        "seed": 5,
    },
    "pooled": {
        "task": "sequence_classification",
        "adapter": {"fusion": "dwconcat", "fusion_pool": "mean", "modules_to_save": ["pooler"]},
        "data": {"train": "others.csv", "test": "others.csv"},
        "seed": 7,
    },
    "pairs": {
        "task": "sentence_pairs",
        "adapter": {"fusion": "last", "modules_to_save": ["pooler"]},
        "data": {"train": "pairs.csv", "test": "pairs.csv", "text": ["text1", "text2"]},
    },
    "low": {
        "task": "token_classification",
        "adapter": {"fusion": "deeper", "fusion_depth": 2},
        "data": {"train": "train.conll", "test": "test.conll"},
        "seed": 11,
    },
}


def write_recipes(folder, *names, **changes):
    """Writes backbone, data and recipes of these names, by default all; returns their paths."""
    save_model(folder / "model", "token")
    (folder / "train.conll").write_text(conll(SENTENCES * 4), encoding="utf-8")
    (folder / "test.conll").write_text(conll(SENTENCES), encoding="utf-8")
    _write(folder / "intents.csv", ["text", "label"], INTENTS * 4)
    # the same texts with other labels
    _write(folder / "others.csv", ["text", "label"], [(text, str(len(text) % 3)) for text, _ in INTENTS * 4])
    _write(folder / "pairs.csv", ["text1", "text2", "label"], PAIRS * 4)
    paths = []
    for name in names or SECTIONS:
        recipe = {"backbone": {"model": str(folder / "model")}, "training": dict(TRAINING), **SECTIONS[name]}
        recipe["data"] = {"path": str(folder), **recipe["data"]}
        for key, value in changes.get(name, {}).items():
            recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return paths


def recipes_of(paths):
    return {path.stem: load_recipe(path) for path in paths}


def result_of(folder):
    """What a run found, without times and memory, and the bytes of its adapter."""
    metrics = json.loads((folder / "metrics.json").read_text())
    adapter = {
        name: (folder / "adapter" / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")
    }
    return {**{key: metrics[key] for key in metrics.keys() - {"seconds", "peak_memory_mib", "bytes"}}, **adapter}


def _write(path, header, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
