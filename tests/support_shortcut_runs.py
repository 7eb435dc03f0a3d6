"""Recipes of linear shortcuts on tiny models, with their files: a causal and a masked language model, and a classifier."""

from __future__ import annotations

import torch
from support_causal import save_model as save_causal
from support_causal import write_data
from support_text import save_model as save_bert
from support_text import write_changed
from transformers import AutoModelForSequenceClassification

SENTENCES = [
    "anna lives in oslo .",
    "bob works at acme corp in rome .",
    "the old man lives at the corp",
    "anna works in rome",
]


def write_causal(folder, **changes):
    """Model, texts packed to rows of 16, and a recipe; returns its path."""
    save_causal(folder / "model")
    write_data(folder)
    data = {"path": str(folder), "train": "train.txt", "test": "test.txt", "packing": True, "max_length": 16}
    recipe = {"task": "causal_lm", "backbone": {"model": str(folder / "model")}, "data": data}
    # fewer positions than dimensions in the fused ones
    return write_changed(folder, {**recipe, "shortcuts": {"ridge": 1e-3, "fused": "every:1", "batch_size": 4}}, changes)


def write_masked(folder, **changes):
    save_bert(folder / "model", "mlm", mask=True)
    for name, times in (("train", 40), ("test", 4)):
        (folder / f"{name}.txt").write_text("\n".join(SENTENCES * times) + "\n", encoding="utf-8")
    recipe = {
        "task": "masked_lm",
        "backbone": {"model": str(folder / "model")},
        "data": {"path": str(folder), "train": "train.txt", "test": "test.txt"},
        "shortcuts": {"ridge": 1e-3, "fused": None},
    }
    return write_changed(folder, recipe, changes)


def write_classes(folder, model=True, **changes):
    """A classifier of three classes with a head that prefers some of them, or the backbone that a recipe names."""
    if model:
        save_bert(folder / "model", "sequence", labels=3)
        bert = AutoModelForSequenceClassification.from_pretrained(folder / "model")
        torch.manual_seed(3)
        bert.classifier.weight.data.normal_()
        bert.save_pretrained(folder / "model")
    rows = [f"{sentence},{'place' if i % 2 else 'person'}" for i, sentence in enumerate(SENTENCES)]
    for name, times in (("train", 20), ("test", 4)):
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows * times]) + "\n", encoding="utf-8")
    recipe = {
        "task": "sequence_classification",
        "backbone": {"model": str(folder / "model")},
        "data": {"path": str(folder), "train": "train.csv", "test": "test.csv"},
        "shortcuts": {"ridge": 1e-3},
    }
    return write_changed(folder, recipe, changes)
