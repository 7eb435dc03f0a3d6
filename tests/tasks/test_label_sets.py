"""Label sets: the data's own order is kept, and data with nothing to tell apart are refused with the numbers."""

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from support_text import SENTENCES, conll

from fusion_adapters.tasks.data import DataRecipe
from fusion_adapters.tasks.registry import TASKS
from fusion_adapters.tasks.splits import load_splits

TOKENS, TEXTS, PAIRS, NUMBERS = (
    TASKS[name] for name in ("token_classification", "sequence_classification", "sentence_pairs", "regression")
)


def labels_of(path, task=TEXTS, **fields):
    return load_splits(DataRecipe(path=str(path), **fields), task, 1).labels


def csv_of(folder, labels):
    (folder / "train.csv").write_text("text,label\n" + "".join(f"text {i},{label}\n" for i, label in enumerate(labels)))
    return folder


def test_numbered_classes_of_a_data_set_keep_their_numbers(tmp_path):
    names = ["positive", "negative", "mixed"]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = {"text": ["a", "b", "c", "d"], "label": [1, 0, 1, 0]}  # the third is not in the training data
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    assert labels_of(tmp_path) == names
    assert labels_of(tmp_path, labels=["mixed", "negative", "positive"]) == ["mixed", "negative", "positive"]


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG"], None),
        (["B-PER", "B-LOC", "B-ORG", "O"], ["B-PER", "B-LOC", "B-ORG", "O", "I-PER", "I-LOC", "I-ORG"]),
        (  # tags become BIO: the numbers cannot be kept
            ["O", "B-PER", "S-LOC", "S-ORG"],
            ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"],
        ),
    ],
)
def test_numbered_tags_of_a_data_set_keep_their_numbers(names, labels, tmp_path):
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))})
    rows = {"tokens": [["a"]] * len(names), "ner_tags": [[i] for i in range(len(names))]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    assert labels_of(tmp_path, TOKENS) == (labels or names)


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        ([10, 9, 0, 1, 2], ["0", "1", "2", "9", "10"]),
        ([1, -1, 10], ["-1", "1", "10"]),
        (["10.0", "9.5"], ["9.5", "10.0"]),
        (["b", "a10", "a9"], ["a10", "a9", "b"]),  # names by the alphabet, as ever
        (["10", "9", "none"], ["10", "9", "none"]),
    ],
)
def test_numbers_by_value_and_names_by_the_alphabet(given, labels, tmp_path):
    assert labels_of(csv_of(tmp_path, given), train="train.csv") == labels


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        (
            TEXTS,
            "train.csv",
            "text,label\na,yes\nb,yes\nc,yes\n",
            r"train: all 3 examples have the label 'yes'.*two classes",
        ),
        (PAIRS, "train.csv", "text1,text2,label\na,b,0\nb,c,0\n", r"train: all 2 examples have the label '0'.*two classes"),
        (NUMBERS, "train.csv", "text,label\na,2.50\nb,2.5\n", r"train: all 2 examples have the number 2\.5"),
        (
            TOKENS,
            "train.conll",
            conll([[("a", "O"), ("b", "O")], [("c", "O")]]),
            r"all 3 words of 2 sentences have the tag O",
        ),
    ],
)
@pytest.mark.parametrize("fields", [{}, {"labels": ["O", "B-X", "yes", "no", "0", "1"]}], ids=["", "labels"])
def test_data_with_nothing_to_tell_apart_are_refused(task, name, content, message, fields, tmp_path):
    (tmp_path / name).write_text(content)
    if fields and task is not NUMBERS:
        fields = {"labels": [v for v in fields["labels"] if (v == "O" or "-" in v) == (task is TOKENS)]}
    with pytest.raises(ValueError, match=message):
        labels_of(tmp_path, task, train=name, **({} if task is NUMBERS else fields))


def test_one_type_of_entity_is_enough(tmp_path):
    (tmp_path / "train.conll").write_text(conll([SENTENCES[2]] * 2))
    assert labels_of(tmp_path, TOKENS, train="train.conll", dev_fraction=0.5) == ["O", "B-LOC", "I-LOC"]
