"""Texts, a recipe and a comparison of masked language modelling."""

import yaml
from support_text import save_model, write_changed

from fusion_adapters.tasks.registry import TASKS

TASK = TASKS["masked_lm"]
TEXTS = [
    "Anna lives in Oslo .",
    "Bob works at Acme Corp in the old Rome .",
    "the old man lives",
    "zebra quick fox at the corp",
    "anna",
    "Bob Man and Anna lives in the old Oslo at unusual places .",
]


def write_files(folder, head="token", **changes):
    """A model without a head for words, texts and a recipe; returns the recipe's path."""
    save_model(folder / "model", head, mask=True)
    (folder / "train.txt").write_text(" \n" + " \n\n".join(TEXTS * 5) + "\n", encoding="utf-8")
    (folder / "test.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    recipe = {
        "task": TASK.name,
        "backbone": {"model": str(folder / "model")},
        "adapter": {"fusion": "dwatt", "modules_to_save": ["transform"]},
        "data": {"path": str(folder), "train": "train.txt", "test": "test.txt", "max_length": 10},
        "training": {"num_train_epochs": 2, "per_device_train_batch_size": 4, "disable_tqdm": True},
    }
    return write_changed(folder, recipe, changes)


def write_study(folder, **changes):
    write_files(folder)
    fresh = {"modules_to_save": ["transform"]}
    study = {
        "task": TASK.name,
        "backbone": {"model": str(folder / "model")},
        "data": {"toy": {"path": str(folder), "train": "train.txt", "test": "test.txt", "max_length": 10}},
        "methods": {n: {"adapter": {"fusion": n, **fresh}} for n in ("deeper", "concat", "dwatt")},
        "sizes": [8],
        "seeds": [1, 2],
        "rates": [1e-3, 2e-3],
        "epochs": 2,
        "evaluations": 2,
        "training": {"per_device_train_batch_size": 4},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**study, **changes}, sort_keys=False), encoding="utf-8")
    return path
