"""Sentence pairs: both texts of a pair reach the model, live, from a cache and in predictions."""

import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from support_pairs import PAIRS, write_recipe, write_table
from support_text import tokenizer

from fusion_adapters.cli import main
from fusion_adapters.runs.predicting import load_run, predict
from fusion_adapters.runs.recipe import load_recipe
from fusion_adapters.runs.training import cache_recipe, run_recipe
from fusion_adapters.tasks.base import Example
from fusion_adapters.tasks.data import DataRecipe
from fusion_adapters.tasks.registry import TASKS
from fusion_adapters.tasks.splits import load_splits

TASK = TASKS["sentence_pairs"]


def read(folder, **fields):
    return load_splits(DataRecipe(path=str(folder), **{"train": "train.csv", **fields}), TASK, 1)


@pytest.mark.parametrize(
    "names", [("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("a", "b")]
)
def test_columns_by_their_usual_names_or_as_named(tmp_path, names):
    write_table(tmp_path / "train.csv", (*names, "label"))
    splits = read(tmp_path, **({"text": list(names)} if names == ("a", "b") else {}))
    assert splits.labels == ["other", "same"] and len(splits.train) + len(splits.dev) == len(PAIRS)
    assert {(*e.words, *e.labels) for e in splits.train + splits.dev} == {pair[:3] for pair in PAIRS}


def test_columns_that_are_not_there_or_not_two(tmp_path):
    write_table(tmp_path / "train.csv", ("left", "right", "label"))
    with pytest.raises(
        ValueError, match=r"no column 'premise and hypothesis'.*it has 'left', 'right', 'label'\. Set data\.text"
    ):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"no column 'rihgt'; it has 'left', 'right'"):
        read(tmp_path, text=["left", "rihgt"])
    for text in ("left", ["left"], ["left", "right", "label"]):
        with pytest.raises(ValueError, match=r"task: sentence_pairs reads two columns"):
            read(tmp_path, text=text)
    with pytest.raises(
        ValueError, match=r"data\.text names 2 columns \(left, right\), but task: sequence_classification reads one"
    ):
        load_splits(
            DataRecipe(path=str(tmp_path), train="train.csv", text=["left", "right"]), TASKS["sequence_classification"], 1
        )


def test_a_dataset_with_classes_by_number(tmp_path):
    features = Features(
        {
            "sentence1": Value("string"),
            "sentence2": Value("string"),
            "label": ClassLabel(names=["not_entailment", "entailment"]),
        }
    )
    rows = {"sentence1": ["a", "b", "c"], "sentence2": ["d", "e", "f"], "label": [0, 1, 1]}
    (tmp_path / "set").mkdir()
    for split, labels in (("train", [0, 1, 1]), ("validation", [1, 0, 0]), ("test", [-1, -1, -1])):  # as GLUE's
        part = Dataset.from_dict({**rows, "label": labels}, features=features)
        part.to_parquet(tmp_path / "set" / f"{split}-00000-of-00001.parquet")
    splits = read(tmp_path / "set", train=None)
    assert splits.train[1] == Example(["b", "e"], ["entailment"])
    assert [e.labels for e in splits.dev] == [["entailment"], ["not_entailment"], ["not_entailment"]] and not splits.test


def test_both_texts_are_in_a_row_and_the_longer_one_is_cut_first():
    words = tokenizer()
    words.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # as BERT's own
    encoded = TASK.encode([Example(["anna lives in oslo", "bob"], ["b"])] * 2, words, ["a", "b"], 32)
    (row, _) = encoded.rows
    pieces = words.convert_ids_to_tokens(row["input_ids"])
    assert pieces == ["[CLS]", "anna", "lives", "in", "oslo", "[SEP]", "bob", "[SEP]"] and row["labels"] == 1
    assert row["token_type_ids"] == [0] * 6 + [1, 1]
    assert encoded.notes == {"truncated_texts": 0}
    cut = TASK.encode([Example(["anna lives in oslo", "bob"], ["b"])], words, ["a", "b"], 6)
    assert words.convert_ids_to_tokens(cut.rows[0]["input_ids"]) == ["[CLS]", "anna", "lives", "[SEP]", "bob", "[SEP]"]
    assert cut.notes == {"truncated_texts": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few epochs, its folder and its metrics."""
    folder = tmp_path_factory.mktemp("pairs")
    recipe = load_recipe(write_recipe(folder, "sentence_pairs", training={"num_train_epochs": 2, "learning_rate": 1e-2}))
    return folder, recipe, run_recipe(recipe, folder / "run")


def test_a_run_is_scored_reloaded_and_described(trained):
    folder, _, metrics = trained
    assert metrics["reload_difference"] == 0 and set(metrics["scores"]["test"]) == {"accuracy", "macro_f1"}
    card = (folder / "run" / "adapter" / "README.md").read_text()
    assert "classification of sentence pairs" in card and "`other`, `same`" in card


def test_cached_training_gives_the_numbers_of_live_training(trained):
    folder, recipe, live = trained
    cache_recipe(recipe, folder / "states", "float32")
    cached = run_recipe(recipe, folder / "cached", cache=folder / "states")
    losses = [[epoch["loss"] for epoch in m["dev_by_epoch"]] for m in (live, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][0] != losses[0][1]


def test_predictions_are_those_of_the_model_and_read_both_texts(trained, capsys):
    folder, _, _ = trained
    run = load_run(folder / "run")
    first, _ = predict(run, ["anna lives in oslo\tbob works in oslo", "bob works in oslo\tanna lives in oslo"])
    with torch.no_grad():
        logits, swapped, cut = (
            run.model(**run.tokenizer(*texts, return_tensors="pt")).logits[0]
            for texts in (
                ("anna lives in oslo", "bob works in oslo"),
                ("bob works in oslo", "anna lives in oslo"),
                ("anna lives in oslo",),
            )
        )
    expected = logits.softmax(-1)
    assert not torch.equal(logits, swapped) and not torch.equal(logits, cut)
    assert (first["text"], first["second"]) == ("anna lives in oslo", "bob works in oslo")
    assert first["label"] == run.labels[int(expected.argmax())]
    assert first["probability"] == pytest.approx(float(expected.max()), abs=1e-4)
    main(["predict", str(folder / "run"), "--text", "anna\tbob", "--json"])
    assert json.loads(capsys.readouterr().out)["second"] == "bob"
    for text in ("anna lives", "a\tb\tc", "anna\t "):
        with pytest.raises(ValueError, match="a tab between them"):
            predict(run, [text])
