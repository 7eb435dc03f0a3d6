"""The card that a run writes: what was trained, scores with intervals, which layers are read; and what `verify` says of a run."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard
from support_text import write_recipe

from fusion_adapters.cli import main
from fusion_adapters.runs.card import model_card
from fusion_adapters.runs.intervals import FEWEST, interval
from fusion_adapters.runs.recipe import load_recipe
from fusion_adapters.runs.training import run_recipe
from fusion_adapters.runs.verifying import verify
from fusion_adapters.tasks.registry import TASKS
from fusion_adapters.tuner import FusionConfig


@pytest.fixture
def run(tmp_path):
    """A finished run of tagged words, LoRA in it, and its metrics."""
    path = write_recipe(tmp_path, adapter={"fusion_budget": "5k", "r": 2, "target_modules": ["query"]})
    return tmp_path / "run", run_recipe(load_recipe(path), tmp_path / "run")


def test_a_card_says_what_was_trained_and_verify_reads_it(run, tmp_path, capsys):
    folder, metrics = run
    card = (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    inside = verify(folder).inside
    for part in (
        f"| data | {tmp_path.name}: 11 training, 1 development, 3 test examples |",
        "4 blocks of hidden size 32",
        f"`{inside['backbone']['fingerprint']}`",
        "LoRA of rank 2 in query",
        "at most 5k trainable parameters",
        "Without an interval: the test data are 3 examples.",
        "| file |",
    ):
        assert part in card, part
    assert f"{tmp_path}/train" not in card and card.count("import fusion_adapters") == 1
    lines = card[card.index("```text\n") :].splitlines()[1:9]
    assert lines[0].split() == ["layer", "1", "2", "3", "4"] and lines[1].split()[0] == "O"
    assert metrics["weights_over_depth"]["layers"] == [1, 2, 3, 4]
    assert sum(metrics["weights_over_depth"]["by_label"]["O"]) == pytest.approx(1, abs=1e-3)
    # what the hub reads of it
    results = ModelCard(card).data.eval_results
    told = {(r.dataset_split, r.metric_type): r.metric_value for r in results}
    assert (
        told["test", "f1"] == pytest.approx(metrics["scores"]["test"]["f1"])
        and results[0].task_type == "token-classification"
    )
    # of the adapter alone, the scores are the card's
    shutil.copytree(folder / "adapter", tmp_path / "alone")
    alone = verify(tmp_path / "alone").inside
    assert alone["scores"]["test"]["f1"] == pytest.approx(inside["scores"]["test"]["f1"])
    assert alone["labels"] == inside["labels"] and inside["budget"] == "5k" and alone["budget"] is None
    main(["verify", str(folder), "--backbone", str(tmp_path / "model")])
    assert "loading: PeftModel.from_pretrained takes it" in capsys.readouterr().out


def test_verify_compares_an_adapter_with_its_run(run):
    folder, metrics = run
    kept = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**kept, "labels": kept["labels"][::-1]}))
    (folder / "metrics.json").write_text(json.dumps({**metrics, "bytes": {"adapter_model.safetensors": 7}}))
    problems = verify(folder).problems
    assert (
        len(problems) == 2
        and "had 7 when the run was written" in problems[0]
        and "run.json names the outputs" in problems[1]
    )
    (folder / "metrics.json").write_text("{")
    (problem,) = verify(folder).problems
    assert "metrics.json' is damaged" in problem


def test_a_method_without_weights_over_depth_has_no_picture_and_many_labels_are_cut(run):
    folder, metrics = run
    recipe = load_recipe(folder / "recipe.yaml")
    config = FusionConfig.from_pretrained(folder / "adapter")
    without = {k: v for k, v in metrics.items() if k != "weights_over_depth"}
    assert "Which layers" not in model_card(recipe, without, [], config)
    many = {f"label{i}": [0.1, 0.9] for i in range(15)}
    intervals = {"test": {"f1": [0.25, 0.5]}}
    examples = {**metrics["examples"], "test": 1000}
    told = {
        **metrics,
        "intervals": intervals,
        "examples": examples,
        "weights_over_depth": {"layers": [4, 12], "by_label": many},
    }
    card = model_card(recipe, told, [], config)
    assert "| 25.0 to 50.0 |" in card and "over the 1,000 test examples, drawn anew 200 times" in card
    assert "3 more labels are left out" in card and "label11" in card and "label12" not in card


def test_an_interval_is_over_examples():
    task = TASKS["sequence_classification"]
    gold = ["a", "b"] * 50
    predicted = ["a" if i % 10 else "b" for i in range(100)]
    score = task.watched(gold, predicted)["accuracy"]
    low, high = interval(task, gold, predicted, 100)
    assert low < score < high and 0.1 < high - low < 0.3 and interval(task, gold, predicted, 100) == [low, high]
    assert interval(task, gold, gold, 100) == [1.0, 1.0]
    few = FEWEST - 1
    assert interval(task, gold[:few], predicted[:few], few) is None
    assert interval(task, gold, predicted, 30) is None  # pieces of thirty texts
    wide = interval(task, gold[:25], predicted[:25], 25)
    assert wide[1] - wide[0] > high - low
