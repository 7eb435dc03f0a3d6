"""How far a score would move with other test examples: the bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..tasks.base import Task

MOST, LEAST = 1000, 200  # resamples
WORK = 40_000  # examples that are scored for one interval, but for the least number of resamples
FEWEST = 20  # examples: of fewer, resamples say little of others


def interval(task: Task, gold: Sequence[Any], predicted: Sequence[Any], examples: int) -> list[float] | None:
    """The 95 % interval (percentiles) of the main score over examples drawn with replacement, the model as it is.

    What another seed, or other training data, would change is not in it.

    Args:
        task: Whose score.
        gold: As `Task.score` takes them, one for each example.
        predicted: Likewise.
        examples: Their number.

    Returns:
        Low and high; None for fewer than twenty examples, and where the values are not of whole examples, as in masked language
        modelling, whose pieces of one text are no independent draws.
    """
    if len(gold) != examples or examples < FEWEST:
        return None
    generator, scores = np.random.default_rng(0), []
    for _ in range(resamples(examples)):
        drawn = generator.integers(examples, size=examples)
        scores.append(task.watched([gold[i] for i in drawn], [predicted[i] for i in drawn])[task.main.name])
    low, high = np.percentile(scores, (2.5, 97.5))
    return [float(low), float(high)] if np.isfinite([low, high]).all() else None


def resamples(examples: int) -> int:
    """How many resamples an interval over so many examples has."""
    return max(LEAST, min(MOST, WORK // examples))
