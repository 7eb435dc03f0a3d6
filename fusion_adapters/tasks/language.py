"""What language models share: a frozen head over the vocabulary, and scores of the pieces that it predicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from transformers import DataCollatorForTokenClassification, PreTrainedTokenizerBase

from .base import IGNORED, Encoded, Example, Measure, Task

LARGEST_EXPONENT = 700.0  # beyond exp of it there is no such float
LOSS = Measure("loss", False, 1, "nats", 3, "mean negative log-likelihood of a predicted piece, in nats")
PERPLEXITY = Measure("perplexity", False, 1, "", 3, "exponential of the loss")


class LanguageTask(Task):
    """Texts that are their own labels; the labels of a row are the ids of the pieces that are to be predicted."""

    label_columns: ClassVar[tuple[str, ...]] = ()
    vocabulary_head: ClassVar[bool] = True
    refused_training: ClassVar[dict[str, str]] = {"label_smoothing_factor": "its loss is the likelihood of the pieces"}

    def label_set(self, examples: Sequence[Example], classes: Sequence[str] = ()) -> list[str]:
        return []

    def head_options(self, labels: Sequence[str]) -> dict[str, Any]:
        return {}

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Any]], Any]:
        return DataCollatorForTokenClassification(tokenizer)

    def compared(
        self, encoded: Encoded, rows: Sequence[Any], examples: Sequence[Example], labels: Sequence[str]
    ) -> tuple[list[Any], list[Any]]:
        """Gold pieces; and for each the likeliest piece with the negative log-likelihood of the right one (nats)."""
        pieces = [row["labels"] for row in encoded.rows]
        found = [p for own, row in zip(pieces, rows, strict=True) for p in row[: len(own)][np.array(own) != IGNORED]]
        return [piece for own in pieces for piece in own if piece != IGNORED], found

    def score(self, gold: Sequence[Any], predicted: Sequence[Any]) -> dict[str, Any]:
        """Accuracy of pieces, `loss` and `perplexity`; for the arguments see `compared`."""
        loss = math.fsum(nll for _, nll in predicted) / len(gold)
        accuracy = sum(int(piece) == right for right, (piece, _) in zip(gold, predicted, strict=True)) / len(gold)
        scores = {"accuracy": accuracy, "loss": loss, "perplexity": math.exp(min(loss, LARGEST_EXPONENT))}
        return {measure.name: scores[measure.name] for measure in self.measures}

    def depth_labels(self, labels: Sequence[str]) -> list[str]:
        return ["predicted pieces"]

    def depth_groups(self, labels: Tensor, shape: Any) -> Tensor:
        return labels.clamp(max=0)  # all pieces are one group; -100 stays
