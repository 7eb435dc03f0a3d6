"""A small comparison, its table, and what it says when it refuses."""

import csv

import pytest
import yaml
from support_text import SENTENCES, conll, save_model

from fusion_adapters.cli import main

METHODS = {
    "deeper": {"adapter": {"fusion": "deeper", "fusion_budget": 6000}},
    "concat": {"adapter": {"fusion": "concat", "fusion_budget": 6000}},
    "dwatt": {"adapter": {"fusion": "dwatt", "fusion_bottleneck": 4}},
    "lora": {"adapter": {"fusion": "last", "r": 2, "target_modules": ["query"]}, "lora_rate_scale": 0.5},
}


def write_study(folder, **changes):
    save_model(folder / "model")
    (folder / "train.conll").write_text(conll(SENTENCES * 6), encoding="utf-8")
    (folder / "test.conll").write_text(conll(SENTENCES), encoding="utf-8")
    study = {
        "task": "token_classification",
        "backbone": {"model": str(folder / "model")},
        "data": {"toy": {"path": str(folder), "train": "train.conll", "test": "test.conll", "dev_fraction": 0.3}},
        "methods": METHODS,
        "sizes": [4, "all"],
        "seeds": [1, 2],
        "rates": [1e-3, 1e-2],
        "epochs": 2,
        "evaluations": 2,
        "training": {"per_device_train_batch_size": 4},
        "quick": {"sizes": [4], "seeds": [1]},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**study, **changes}, sort_keys=False), encoding="utf-8")
    return path


def scores(folder):
    with (folder / "results.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if "seconds" not in k and "memory" not in k} for row in csv.DictReader(file)]


def refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", *map(str, arguments), "--workers", "1"])
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())
