"""Training, development and test examples of a recipe: read, cut, drawn by the seed, and encoded."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .base import Encoded, Example, Task
from .data import DataRecipe
from .hub import read_dataset
from .readers import reader_of
from .tables import Table
from .textfiles import Layout

PACKAGED = "package:"


@dataclass
class Splits:
    """The examples of a run and the label set, in the order of the model's outputs."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]
    labels: list[str]

    def encoded(self, task: Task, tokenizer: PreTrainedTokenizerBase, data: DataRecipe) -> dict[str, Encoded]:
        """The rows of `train`, `dev` and `test`, cut as a recipe says; without a split that is empty."""
        parts = {"train": self.train, "dev": self.dev, "test": self.test}
        return {name: task.encoded(part, tokenizer, self.labels, data) for name, part in parts.items() if part}


def load_splits(recipe: DataRecipe, task: Task, seed: int) -> Splits:
    """Reads what a recipe names, cuts and draws by the seed, and checks the labels.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        ValueError: If a file is empty or not as its format asks, or a label lies outside the label set.
    """
    task.check_keys(recipe)
    task.check_data(recipe)
    names = {"train": recipe.train, "dev": recipe.dev, "test": recipe.test}
    if recipe.path.startswith(PACKAGED):
        folder = Path(str(resources.files("fusion_adapters.tasks") / recipe.path.removeprefix(PACKAGED)))
    else:
        folder = Path(recipe.path)
    if folder.is_file():
        raise ValueError(
            f"data.path={recipe.path!r} is a file; it names the folder, and data.train, data.dev and data.test the files in it. Write "
            f"data.path: {folder.parent} and data.train: {folder.name}."
        )
    given = [folder / name for name in names.values() if name is not None]
    if folder.is_dir() and (recipe.format is not None or any(path.suffix or path.is_file() for path in given)):
        tables = {split: read_file(folder / name, recipe, task) for split, name in names.items() if name is not None}
    else:
        tables = read_dataset(recipe, task, names)
    if "train" not in tables:
        raise ValueError(f"data.train is not set: name the training file or split of {recipe.path!r}.")
    read = {split: task.examples(table, recipe) for split, table in tables.items()}
    for split, examples in read.items():
        if not examples:
            name = names[split] or split
            raise ValueError(f"{recipe.path!r}: {name!r} holds no examples. Check that file or split (data.{split}).")
    train = read["train"]
    task.check_training(train, f"{recipe.path}, train")
    classes = task.classes(tables["train"], recipe)
    labels = recipe.labels or task.label_set(train, classes)
    if not recipe.labels and not classes:
        _check_alike(train, f"{recipe.path}, train")
    if labels:
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
        drawn = order.sample(range(len(train)), recipe.limit)
        train = [train[i] for i in (sorted(drawn) if recipe.packing else drawn)]  # what is joined stays in its order
    return Splits(train, read["dev"], read.get("test", []), labels)


def read_file(path: Path, recipe: DataRecipe, task: Task) -> Table:
    """Reads a data file into columns.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the format is unknown or has no columns for the task, or the file is empty or not as its format asks.
    """
    reader, source = reader_of(path, recipe.format), str(path)
    if reader.columns:  # a file of another kind is told by what the format holds, not by its first line
        wanted = recipe.model_copy(update={"text": None, "label": None}) if reader.picks else recipe
        task.examples(Table(dict.fromkeys(reader.columns, ()), source, reader.holds), wanted)
    for key in ("delimiter", "quoting"):
        if getattr(recipe, key) is not None and key not in reader.heeds:
            raise ValueError(
                f"{source}: data.{key} says how columns of text are separated, which this format has not. Remove it."
            )
    text = None if isinstance(recipe.text, list) else recipe.text
    layout = Layout(text, recipe.label, recipe.delimiter, recipe.quoting)
    return Table(dict(reader.read(path, layout)), source, reader.holds)


def _check_alike(examples: Sequence[Example], source: str) -> None:
    """Raises ValueError if two labels differ in white space or case alone, where nobody says that they are two."""
    counts = Counter(label for example in examples for label in example.labels if isinstance(label, str))
    alike: dict[str, list[str]] = {}
    for label in counts:
        alike.setdefault(" ".join(label.split()).casefold(), []).append(label)
    twice = [labels for labels in alike.values() if len(labels) > 1]
    if twice:
        shown = "; ".join(" and ".join(f"{label!r} ({counts[label]:,} times)" for label in labels) for labels in twice[:5])
        raise ValueError(
            f"{source}: labels differ in white space or case alone: {shown}. Write them alike; if they are different labels, list the "
            "whole set as data.labels."
        )


def _check_labels(examples: Sequence[Example], labels: Sequence[str], source: str) -> None:
    known = set(labels)
    strange = [label for example in examples for label in example.labels if label not in known]
    if strange:
        raise ValueError(
            f"{source}: {len(strange)} labels lie outside the label set ({', '.join(map(_plain, sorted(set(strange))[:10]))}). The "
            f"set has {len(labels)} labels ({', '.join(labels[:15])}{', ...' if len(labels) > 15 else ''}). Correct the "
            "file, or give the whole set as data.labels."
        )


def _plain(label: str) -> str:
    return label if label == " ".join(label.split()) else repr(label)  # with white space that nobody sees


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
