"""Pairs of texts with a class or a number, and recipes of them."""

from __future__ import annotations

import csv

from support_text import save_model, write_changed

PEOPLE, PLACES = ("anna", "bob", "the old man"), ("oslo", "rome", "acme")
# a class and a number that only both texts together tell
PAIRS = [
    (f"{a} lives in {p}", f"{b} works in {q}", "same" if p == q else "other", float(p == q) * 3 + float(a == b) * 2)
    for a in PEOPLE
    for b in PEOPLE
    for p in PLACES
    for q in PLACES
]


def write_table(path, columns=("premise", "hypothesis", "label"), number=False):
    """Pairs as a CSV file; the label is the class, or the number."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows((a, b, f"{y:g}" if number else label) for a, b, label, y in PAIRS)


def write_recipe(folder, task, data=None, **changes):
    """A model, a table and a recipe of one epoch; returns the recipe's path."""
    save_model(folder / "model", "sequence", dropout=0.0)
    write_table(folder / "train.csv", number=task == "regression")
    recipe = {
        "task": task,
        "backbone": {"model": str(folder / "model")},
        "adapter": {"fusion": "dwatt"},
        "data": {"path": str(folder), "train": "train.csv", "test": "train.csv", **(data or {})},
        "training": {"num_train_epochs": 1, "per_device_train_batch_size": 8, "disable_tqdm": True},
    }
    return write_changed(folder, recipe, changes)
