"""The examples of a comparison: read once a process, and drawn for a seed the same for every method."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Sequence

from ..runs.recipe import BackboneRecipe
from ..runs.tokenizers import load_tokenizer
from ..tasks.base import Encoded, Task
from ..tasks.data import DataRecipe
from ..tasks.splits import Splits, load_splits
from .recipe import ALL, StudyRecipe


@functools.lru_cache(maxsize=8)
def encoded_part(data_json: str, task: Task, tokenizer_json: str, name: str) -> Encoded:
    """Development or test data in word pieces; they are the same in every run of a process."""
    splits = _splits(data_json, task)
    tokenizer = load_tokenizer(BackboneRecipe.model_validate_json(tokenizer_json), task)
    data = DataRecipe.model_validate_json(data_json)
    return task.encoded(getattr(splits, name), tokenizer, splits.labels, data)


@functools.lru_cache(maxsize=8)
def _splits(data_json: str, task: Task) -> Splits:
    return load_splits(DataRecipe.model_validate_json(data_json), task, seed=0)


def forget() -> None:
    """Lets the next reader read the files again, which may have changed since."""
    _splits.cache_clear()
    encoded_part.cache_clear()


def splits_of(study: StudyRecipe, data: str) -> Splits:
    """A data set, all of its training examples, read once a process."""
    return _splits(study.data[data].model_dump_json(), study.task)


def training_sizes(study: StudyRecipe) -> dict[str, list[int]]:
    """For each data set the numbers of training examples, `all` and sizes per class turned into numbers.

    Raises:
        ValueError: If a size is larger than the data set.
    """
    return {data: list(dict.fromkeys(count_examples(study, data, s) for s in study.sizes)) for data in study.data}


def count_examples(study: StudyRecipe, data: str, size: int | str) -> int:
    """The number of training examples that an entry of `sizes` means on a data set; see `training_sizes`."""
    train = splits_of(study, data).train
    if size == ALL:
        return len(train)
    if study.per_class:
        counts = Counter(example.labels[0] for example in train)
        available, number = max(counts.values()), sum(min(int(size), n) for n in counts.values())
    else:
        available = number = len(train)
    if int(size) > available:
        unit = "of the largest class" if study.per_class else "training examples"
        raise ValueError(f"sizes: {size} is more than the {available} {unit} of {data!r}. Lower it, or say all.")
    return number if study.per_class else int(size)


def subset(labels: Sequence[str] | None, total: int, size: int, seed: int) -> list[int]:
    """The training examples of a seed, the same for every method; smaller sizes are parts of larger ones.

    Args:
        labels: The class of each example, to draw one of each class in turn; None draws from all alike.
        total: The number of training examples.
        size: How many to take.
        seed: Of the draw.
    """
    order = random.Random(seed).sample(range(total), total)
    if labels is not None:
        seen: Counter[str] = Counter()
        turns = []
        for i in order:
            turns.append((seen[labels[i]], i))
            seen[labels[i]] += 1
        order = [i for _, i in sorted(turns, key=lambda turn: turn[0])]  # stable: within a turn the order of the draw
    return order[:size]
