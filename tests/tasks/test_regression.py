"""Regression: numbers are read, learned, scored by correlation, and predicted as numbers."""

import json
import math

import pytest
import torch
import yaml
from support_pairs import PAIRS, write_recipe, write_table
from support_study import scores

from fusion_adapters.cli import main
from fusion_adapters.runs.predicting import load_run, predict
from fusion_adapters.runs.recipe import load_recipe
from fusion_adapters.runs.training import cache_recipe, run_recipe
from fusion_adapters.tasks.data import DataRecipe
from fusion_adapters.tasks.registry import TASKS
from fusion_adapters.tasks.splits import load_splits

TASK = TASKS["regression"]
BOTH = ["premise", "hypothesis"]


def read(folder, **fields):
    return load_splits(DataRecipe(path=str(folder), **{"train": "train.csv", **fields}), TASK, 1)


def test_one_text_or_two_with_a_number(tmp_path):
    write_table(tmp_path / "train.csv", ("sentence1", "sentence2", "score"), number=True)
    splits = read(tmp_path, text=["sentence1", "sentence2"])
    assert splits.labels == []
    assert {(*e.words, *e.labels) for e in splits.train + splits.dev} == {(a, b, y) for a, b, _, y in PAIRS}
    single = read(tmp_path, text="sentence1")
    assert {tuple(e.words) for e in single.train} <= {(a,) for a, *_ in PAIRS}


@pytest.mark.parametrize("value", ["high", "", "nan", "inf", "1,5"])
def test_what_is_no_number_is_named_with_its_row(tmp_path, value):
    (tmp_path / "train.csv").write_text(f'text,label\na,1.5\nb,"{value}"\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"train\.csv, row 1: .*label"):
        read(tmp_path)


def test_what_has_no_place_in_it(tmp_path):
    write_table(tmp_path / "train.csv", number=True)
    with pytest.raises(ValueError, match="predicts numbers, and there is no label set"):
        read(tmp_path, labels=["a"])
    with pytest.raises(ValueError, match="reads one text or a pair"):
        read(tmp_path, text=["a", "b", "c"])
    path = write_recipe(tmp_path, "regression", training={"label_smoothing_factor": 0.1})
    with pytest.raises(ValueError, match=r"label_smoothing_factor, which task: regression does not know"):
        load_recipe(path)


def test_scores_against_values_worked_out_by_hand():
    found = TASK.score([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 8.0])
    # deviations from the means 2.5 and 3.5: products 10, squares 5 and 29; ranks 1 3 2 4 against 1 2 3 4
    assert found["pearson"] == pytest.approx(10 / math.sqrt(5 * 29))
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert found["loss"] == pytest.approx((0 + 1 + 1 + 16) / 4)
    constant = TASK.score([1.0, 2.0], [3.0, 3.0])
    assert (constant["pearson"], constant["spearman"], constant["loss"]) == (0.0, 0.0, 2.5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that has learned something, its folder and its metrics."""
    folder = tmp_path_factory.mktemp("regression")
    changes = {"data": {"text": BOTH}, "training": {"num_train_epochs": 3, "learning_rate": 1.25e-3}}
    recipe = load_recipe(write_recipe(folder, "regression", **changes))
    return folder, recipe, run_recipe(recipe, folder / "run")


def test_a_run_learns_and_reports_loss_and_correlations(trained):
    _, _, metrics = trained
    assert metrics["reload_difference"] == 0
    assert set(metrics["scores"]["dev"]) == {"pearson", "spearman", "loss"}
    mean = sum(y for *_, y in PAIRS) / len(PAIRS)
    variance = sum((y - mean) ** 2 for *_, y in PAIRS) / len(PAIRS)
    losses = [epoch["loss"] for epoch in metrics["dev_by_epoch"]]
    assert losses[-1] < losses[0] and metrics["scores"]["test"]["loss"] < 2 * variance
    best = max(epoch["pearson"] for epoch in metrics["dev_by_epoch"])
    assert metrics["scores"]["dev"]["pearson"] == pytest.approx(best)


def test_cached_training_gives_the_numbers_of_live_training(trained):
    folder, recipe, live = trained
    cache_recipe(recipe, folder / "states", "float32")
    cached = run_recipe(recipe, folder / "cached", cache=folder / "states")
    losses = [[epoch["loss"] for epoch in m["dev_by_epoch"]] for m in (live, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_predictions_are_the_models_numbers(trained, capsys):
    folder, _, _ = trained
    run = load_run(folder / "run")
    assert run.model.config.num_labels == 1 and run.model.config.problem_type == "regression"
    (found,) = predict(run, ["anna lives in oslo\tbob works in rome"])
    with torch.no_grad():
        expected = run.model(**run.tokenizer("anna lives in oslo", "bob works in rome", return_tensors="pt")).logits
    assert found["value"] == pytest.approx(float(expected), abs=1e-4) and found["second"] == "bob works in rome"
    main(["predict", str(folder / "run"), "--text", "anna\tbob"])
    told = capsys.readouterr().out
    assert "anna" in told and "bob" in told
    with pytest.raises(ValueError, match="was trained on pairs"):
        predict(run, ["anna lives in oslo"])
    main(["inspect", str(folder / "run"), "--text", "anna\tbob", "--output", str(folder / "depth.png")])
    assert (folder / "depth.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_on_single_texts_takes_them_as_they_are(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, "regression", data={"text": "premise"}))
    run_recipe(recipe, tmp_path / "run")
    (found,) = predict(load_run(tmp_path / "run"), ["anna lives\tin oslo"])
    assert set(found) == {"text", "value"}


def test_a_comparison_reports_correlation_loss_and_depth(tmp_path, capsys):
    write_recipe(tmp_path, "regression")
    study = {
        "task": "regression",
        "backbone": {"model": str(tmp_path / "model")},
        "data": {"toy": {"path": str(tmp_path), "train": "train.csv", "test": "train.csv", "text": BOTH}},
        "methods": {name: {"adapter": {"fusion": name}} for name in ("deeper", "concat", "dwatt")},
        "sizes": [16],
        "seeds": [1, 2],
        "rates": [1e-3, 1e-2],
        "epochs": 2,
        "evaluations": 2,
        "training": {"per_device_train_batch_size": 8},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "1"])
    told = capsys.readouterr().out
    assert "mean squared error of a prediction; less is better" in told
    rows = scores(tmp_path / "out")
    assert len(rows) == 3 * (2 + 2) and all(row["dev_loss"] for row in rows)
    runs = [json.loads(p.read_text()) for p in (tmp_path / "out").glob("runs/toy/dwatt/*.json")]
    (depth,) = [run["depth"] for run in runs if run.get("depth")]
    assert list(depth) == ["all tokens"] and sum(depth["all tokens"]) == pytest.approx(1, abs=1e-3)
