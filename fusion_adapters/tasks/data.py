"""Readers of data files and hub sets: examples with string labels, and the label set."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..runs.recipe import DataRecipe, Task
from .tags import is_tag, to_bio

PACKAGED = "package:"
FORMATS = {
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".txt": "text",
}
TEXT_NAMES = {
    "token_classification": ("tokens", "words"),
    "sequence_classification": ("text", "sentence"),
    "masked_lm": ("text", "sentence"),
}
LABEL_NAMES = {
    "token_classification": ("tags", "ner_tags", "labels"),
    "sequence_classification": ("label", "category", "labels", "intent"),
}


@dataclass
class Example:
    """One example: a sentence of words with a tag each, a text with one label, or a text alone (`masked_lm`)."""

    words: list[str]
    labels: list[str]


@dataclass
class Splits:
    """The examples of a run and the label set, in the order of the model's outputs."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]
    labels: list[str]


def load_splits(recipe: DataRecipe, task: Task, seed: int) -> Splits:
    """Reads what a recipe names, cuts and draws by the seed, and checks the labels.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        ValueError: If a file is empty or not as its format asks, or a label lies outside the label set.
    """
    if task == "masked_lm" and (recipe.label is not None or recipe.labels is not None):
        raise ValueError(
            "The recipe sets data.label or data.labels, but task: masked_lm predicts pieces of the texts themselves and reads "
            "no labels. Remove them, or choose the task that has them."
        )
    if task == "token_classification":
        strange = [label for label in recipe.labels or () if label != "O" and label[:2] not in ("B-", "I-")]
        if strange:
            raise ValueError(
                f"data.labels holds {', '.join(map(repr, strange[:5]))}; tags become BIO when they are read (BIOES and BILOU too). "
                "Give O and, for each type, B-TYPE and I-TYPE."
            )
    names = {"train": recipe.train, "dev": recipe.dev, "test": recipe.test}
    if recipe.path.startswith(PACKAGED):
        folder = Path(str(resources.files("fusion_adapters.tasks") / recipe.path.removeprefix(PACKAGED)))
    else:
        folder = Path(recipe.path)
    given = [folder / name for name in names.values() if name is not None]
    if folder.is_dir() and (recipe.format is not None or any(path.suffix or path.is_file() for path in given)):
        read = {split: _read_file(folder / name, recipe, task) for split, name in names.items() if name is not None}
    else:
        read = _read_dataset(recipe, task, names)
    if "train" not in read:
        raise ValueError(f"data.train is not set: name the training file or split of {recipe.path!r}.")
    for split, examples in read.items():
        if not examples:
            name = names[split] or split
            raise ValueError(f"{recipe.path!r}: {name!r} holds no examples. Check that file or split (data.{split}).")
    train = read["train"]
    labels = recipe.labels or _label_set(train, task)
    for split, examples in read.items():
        _check_labels(examples, labels, f"{recipe.path}, {split}")
    order = random.Random(seed)
    if "test" not in read and recipe.test_fraction is not None:
        train, read["test"] = _cut(train, recipe.test_fraction, "test")
    if "dev" not in read:
        # the same cut for every seed: runs of one recipe are compared on the same development data
        train, read["dev"] = _cut(train, recipe.dev_fraction, "dev")
    if recipe.limit is not None:
        if recipe.limit > len(train):
            raise ValueError(
                f"data.limit={recipe.limit}, but there are {len(train)} training examples. Lower the limit or remove it."
            )
        train = order.sample(train, recipe.limit)
    return Splits(train, read["dev"], read.get("test", []), labels)


def read_conll(path: Path) -> list[Example]:
    """Reads a CoNLL file: a word and, in the last column, its tag on each line; blank lines between sentences.

    Columns are separated by tabs, or by spaces where a line has no tab. IOB1, BIOES and BILOU tags become BIO.

    Raises:
        ValueError: If a line has no tag, or a tag is of none of these forms.
    """
    examples: list[Example] = []
    words: list[str] = []
    tags: list[str] = []

    def finish() -> None:
        if words:
            examples.append(Example(words.copy(), tags.copy()))
            words.clear()
            tags.clear()

    # not splitlines: a word may be a character that Python takes for the end of a line
    for number, line in enumerate(_text_of(path).split("\n"), start=1):
        if not line.strip():
            finish()
            continue
        if line.startswith("-DOCSTART-"):
            continue
        # split at blanks alone: a no-break space belongs to its word
        columns = line.rstrip("\r").split("\t") if "\t" in line else re.split(" +", line.strip(" \r"))
        word, tag = columns[0], columns[-1].strip()
        if len(columns) < 2 or not is_tag(tag):
            raise ValueError(
                f"{path}, line {number}: {line.strip()!r} is not a word and a tag. A CoNLL file has a word and, in its last "
                "column, a tag (O, B-TYPE or I-TYPE) on each line, separated by a tab or spaces."
            )
        words.append(word)
        tags.append(tag)
    finish()
    return [Example(e.words, to_bio(e.labels)) for e in examples]


def _text_of(path: Path) -> str:
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*") if p.is_file()) if path.parent.is_dir() else []
        raise FileNotFoundError(
            f"There is no file {str(path)!r}. " + (f"The folder holds: {', '.join(near)}." if near else "Check data.path.")
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}). Convert it to UTF-8.") from error
    if not text.strip():
        raise ValueError(f"{path} is empty ({path.stat().st_size} bytes, no examples). Check the file, or data.path.")
    return text


def _read_file(path: Path, recipe: DataRecipe, task: Task) -> list[Example]:
    kind = recipe.format or FORMATS.get(path.suffix)
    if kind is None:
        raise ValueError(
            f"The format of {str(path)!r} cannot be told from its name. Set data.format to conll, csv, json or text."
        )
    if kind == "conll":
        if task != "token_classification":
            raise ValueError(f"{path}: CoNLL files hold tagged words, for task: token_classification; the task is {task}.")
        return read_conll(path)
    text = _text_of(path)
    if kind == "text":
        if task != "masked_lm":
            raise ValueError(
                f"{path}: plain text holds no labels, only texts for task: masked_lm; the task is {task}. Set data.format to "
                "conll, csv or json if the file is one of these."
            )
        return _texts(text.split("\n"))
    try:
        table = _csv_columns(text, path) if kind == "csv" else _json_columns(text, path)
    except (csv.Error, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid {kind.upper()}: {' '.join(str(error).split())}.") from error
    return _examples(table, str(path), recipe, task)


def _csv_columns(text: str, path: Path) -> dict[str, list[str]]:
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True))
    header, rows = rows[0], [row for row in rows[1:] if row]
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"{path}: the header has the column {twice[0]!r} twice. Give every column a name of its own.")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise ValueError(
                f"{path}, row {number} has {len(row)} fields, but the header has {len(header)} ({', '.join(header)})."
            )
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def _json_columns(text: str, path: Path) -> dict[str, list[Any]]:
    rows = [json.loads(line) for line in text.split("\n") if line.strip()] if path.suffix == ".jsonl" else json.loads(text)
    if (
        not isinstance(rows, list)
        or not rows
        or not all(isinstance(row, dict) and row.keys() == rows[0].keys() for row in rows)
    ):
        raise ValueError(f"{path} must hold objects with the same keys: a list of them (.json) or one a line (.jsonl).")
    return {name: [row[name] for row in rows] for name in rows[0]}


def _read_dataset(recipe: DataRecipe, task: Task, names: dict[str, str | None]) -> dict[str, list[Example]]:
    """Reads a hub dataset, or a local folder laid out like one."""
    from datasets import ClassLabel, load_dataset

    try:
        dataset = load_dataset(recipe.path, recipe.config_name)
    except Exception as error:
        raise FileNotFoundError(
            f"The data {recipe.path!r} cannot be read: it is neither a folder that holds the files named in the recipe "
            f"({', '.join(n for n in names.values() if n) or 'none are named'}) nor a dataset that could be loaded "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). Set data.path."
        ) from error
    read = {}
    for split, default in (("train", "train"), ("dev", "validation"), ("test", "test")):
        name = names[split] or default
        if name not in dataset:
            if names[split] is not None or split == "train":
                raise ValueError(f"{recipe.path!r} has no split {name!r}; it has {', '.join(map(repr, dataset))}.")
            continue
        part = dataset[name]
        source = f"{recipe.path}, {name}"
        columns = {column: list(part[column]) for column in part.column_names}
        if split == "test" and names[split] is None and _is_unlabelled(columns, recipe, task):
            continue  # as in GLUE, whose test labels are kept secret
        for column, feature in part.features.items():
            inner = getattr(feature, "feature", feature)
            if isinstance(inner, ClassLabel):
                columns[column] = [_label_name(inner, value, f"{source}, column {column!r}") for value in columns[column]]
        read[split] = _examples(columns, source, recipe, task)
    return read


def _is_unlabelled(columns: dict[str, Any], recipe: DataRecipe, task: Task) -> bool:
    label = next((c for c in (recipe.label, *LABEL_NAMES.get(task, ())) if c in columns), None)
    return label is not None and all(value in (-1, None) for value in columns[label])


def _label_name(feature: Any, value: Any, source: str) -> Any:
    if value is None:
        return None  # told with its row
    try:
        return feature.int2str(value)
    except ValueError as error:
        raise ValueError(
            f"{source}: {value!r} is the number of none of the {feature.num_classes} classes; a split without labels cannot be "
            "scored. Name another split, or leave data.test unset."
        ) from error


def _check_complete(values: Iterable[Any], column: str, source: str, lists: bool, empty: bool = True) -> None:
    for row, value in enumerate(values):
        parts = value if lists and isinstance(value, list) else [value]
        if any(_is_missing(part) or (part == "" and not empty) for part in parts):
            raise ValueError(
                f"{source}, row {row}: column {column!r} has no value (null, NaN or empty). Remove the row, or fill it in."
            )
        if not lists and isinstance(value, (list, dict)):
            raise ValueError(
                f"{source}, row {row}: column {column!r} holds a {type(value).__name__} where one text belongs. Name another "
                "column (data.text, data.label), or join its parts."
            )


def _is_missing(value: Any) -> bool:
    """None, or NaN, which Python and pandas write for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _examples(columns: dict[str, Any], source: str, recipe: DataRecipe, task: Task) -> list[Example]:
    text = _column(columns, recipe.text, TEXT_NAMES[task], source, "data.text")
    words = task == "token_classification"
    _check_complete(columns[text], text, source, lists=words)
    if task == "masked_lm":
        return _texts(columns[text])
    label = _column(columns, recipe.label, LABEL_NAMES[task], source, "data.label")
    _check_complete(columns[label], label, source, lists=words, empty=False)
    if task == "sequence_classification":
        return [Example([str(t)], [str(y)]) for t, y in zip(columns[text], columns[label], strict=True)]
    examples = []
    for row, (words, tags) in enumerate(zip(columns[text], columns[label], strict=True)):
        if not isinstance(words, list) or not isinstance(tags, list) or len(words) != len(tags):
            raise ValueError(
                f"{source}, row {row}: {text!r} and {label!r} must be lists of equal length, a tag for each word."
            )
        if strange := next((tag for tag in tags if not is_tag(str(tag))), None):
            raise ValueError(
                f"{source}, row {row}: {strange!r} in column {label!r} is no tag of an entity (O, B-TYPE or I-TYPE). Where every "
                f"word has a class of its own, as a part of speech, write B-{strange}: entity F1 then counts words."
            )
        if words:
            examples.append(Example([str(w) for w in words], to_bio([str(t) for t in tags])))
    return examples


def _texts(lines: Iterable[Any]) -> list[Example]:
    """A text for each line that is not blank."""
    return [Example([str(line).strip()], []) for line in lines if str(line).strip()]


def _column(columns: dict[str, Any], wanted: str | None, usual: tuple[str, ...], source: str, key: str) -> str:
    for name in (wanted,) if wanted else usual:
        if name in columns:
            return name
    looked_for = repr(wanted) if wanted else ", ".join(map(repr, usual))
    raise ValueError(
        f"{source} has no column {looked_for}; it has {', '.join(map(repr, columns))}. Set {key} to one of these."
    )


def _label_set(examples: list[Example], task: Task) -> list[str]:
    found = {label for example in examples for label in example.labels}
    if task == "token_classification":
        # whole BIO pairs, so that a type which only occurs as B- in the data can also go on
        types = sorted({label[2:] for label in found if label != "O"})
        return ["O", *(f"{mark}-{kind}" for kind in types for mark in "BI")]
    return sorted(found)


def _check_labels(examples: list[Example], labels: list[str], source: str) -> None:
    known = set(labels)
    strange = [label for example in examples for label in example.labels if label not in known]
    if strange:
        raise ValueError(
            f"{source}: {len(strange)} labels lie outside the label set ({', '.join(sorted(set(strange))[:10])}). The "
            f"set has {len(labels)} labels ({', '.join(labels[:15])}{', ...' if len(labels) > 15 else ''}). Correct the "
            "file, or give the whole set as data.labels."
        )


def _cut(examples: list[Example], fraction: float, part: str) -> tuple[list[Example], list[Example]]:
    size = max(1, round(fraction * len(examples)))
    if size >= len(examples):
        raise ValueError(
            f"{len(examples)} training examples are too few to cut {size} of them off as data.{part}_fraction={fraction} asks. "
            f"Lower it, or name a file or split in data.{part}."
        )
    chosen = set(random.Random(0).sample(range(len(examples)), size))
    train = [e for i, e in enumerate(examples) if i not in chosen]
    return train, [examples[i] for i in sorted(chosen)]
