"""Scores of a model: examples with their rows, predictions by the Trainer, and how a saved adapter's answers compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer

from ..states import LayerStateCache
from ..tasks.base import Encoded, Example, Task
from ..tasks.splits import Splits
from ..tuner import fusion_layers


@dataclass
class Evaluation:
    """Examples with their rows; turns what a model predicts into scores.

    The dataset is sorted by length, so that a batch has little padding; with a cache it brings the layer states along.
    """

    task: Task
    labels: list[str]
    examples: Sequence[Example]
    encoded: Encoded
    cache: LayerStateCache | None = None
    positions: str = "all"

    def __post_init__(self) -> None:
        rows = self.encoded.rows
        self.order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]), reverse=True)
        ordered = [rows[i] for i in self.order]
        self.dataset: Any = (
            Dataset.from_list(ordered) if self.cache is None else self.cache.dataset(ordered, positions=self.positions)
        )

    def scores(self, predictions: Any, label_ids: Any) -> dict[str, Any]:
        """All scores; for arguments and errors see `watched_scores`."""
        return self.task.score(*self._compared(predictions, label_ids))

    def watched_scores(self, predictions: Any, label_ids: Any) -> dict[str, float]:
        """The scores by which epochs are compared, see `Task.watched`.

        Args:
            predictions: In the order of `dataset`, `(rows, positions)`, or `(rows,)` for whole texts; where the head predicts
                pieces of a vocabulary, the two arrays of `LabelledTrainer`.
            label_ids: The labels that came back with them, of the same shape.

        Raises:
            RuntimeError: If the labels show that the predictions come in another order.
        """
        return self.task.watched(*self._compared(predictions, label_ids))

    def predicted_scores(self, trainer: Trainer) -> dict[str, Any]:
        """All scores of a trainer's model."""
        return self.task.score(*self.predictions(trainer))

    def predictions(self, trainer: Trainer) -> tuple[list[Any], list[Any]]:
        """Gold and predicted values of a trainer's model, in the order of the examples."""
        watching, trainer.compute_metrics = trainer.compute_metrics, None  # it scores the development set
        try:
            result = trainer.predict(self.dataset)
        finally:
            trainer.compute_metrics = watching
        return self._compared(result.predictions, result.label_ids)

    def _compared(self, predictions: Any, label_ids: Any) -> tuple[list[Any], list[Any]]:
        """Gold and predicted values in the order of the examples."""
        if isinstance(predictions, tuple):
            predictions = np.stack(predictions, axis=-1)  # (rows, positions, 2)
        rows: list[Any] = [None] * len(self.order)
        for i, predicted, given in zip(self.order, predictions, label_ids, strict=True):
            expected = np.asarray(given)
            own = np.asarray(self.encoded.rows[i]["labels"], dtype=expected.dtype)
            if not np.array_equal(expected[: len(own)] if own.ndim else expected, own):
                raise RuntimeError("The Trainer returned predictions in another order than that of the dataset.")
            rows[i] = predicted
        return self.task.compared(self.encoded, rows, self.examples, self.labels)


def evaluations(
    model: nn.Module, task: Task, splits: Splits, encoded: dict[str, Encoded], cache: LayerStateCache | None = None
) -> dict[str, Evaluation]:
    """The parts of a data set by name, ready to be trained on and scored.

    Args:
        model: The attached model.
        task: Its task.
        splits: The examples.
        encoded: Their rows, from `Splits.encoded`.
        cache: Layer states to read instead of running the backbone.
    """
    return {
        name: Evaluation(
            task, splits.labels, getattr(splits, name), rows, cache, positions_for(model, task, training=name == "train")
        )
        for name, rows in encoded.items()
    }


def positions_for(model: nn.Module, task: Task, training: bool) -> str:
    """Which positions a cached dataset needs: without a label they do not count, unless positions are mixed."""
    if task.positions == "all" or any(layer.mixes_positions for layer in fusion_layers(model)):
        return "all"
    return "packed" if training else "labelled"


def reload_difference(
    model: Any, folder: Path, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], task: Task, length: int
) -> float:
    """Loads a saved adapter beside the one in the model and compares their answers to texts cut at `length` pieces.

    Returns:
        The largest difference of a logit over the first examples; 0 if everything came back.
    """
    options: dict[str, Any] = {"truncation": True, "max_length": length, "padding": True, "return_tensors": "pt"}
    batch = task.tokenize(examples[:8], tokenizer, **options).to(model.device)
    active = model.active_adapter
    model.eval()
    with torch.no_grad():
        before = model(**batch).logits
        model.load_adapter(str(folder), "reloaded")
        model.set_adapter("reloaded")
        after = model(**batch).logits
    model.set_adapter(active)
    model.delete_adapter("reloaded")
    return float((after - before).abs().max())
