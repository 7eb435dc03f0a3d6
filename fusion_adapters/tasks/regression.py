"""Regression: one number for a text or a pair of texts, as in semantic similarity (STS-B)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from rich.markup import escape
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from .base import Asking, Encoded, Example, FinishedRun, Measure, Task
from .data import DataRecipe
from .pairs import pair_columns, split_pair
from .sequences import encode_texts, rows_to_predict
from .tables import Table


class Regression(Task):
    """A head with one output, trained by squared error; scored by its correlation with the given numbers.

    A correlation that is not defined, because all predictions are the same, counts as 0.
    """

    name: ClassVar[str] = "regression"
    title: ClassVar[str] = "regression"
    hub_task: ClassVar[str] = "text-classification"
    peft_type: ClassVar[str | None] = "SEQ_CLS"
    auto_model: ClassVar[Any] = AutoModelForSequenceClassification
    text_columns: ClassVar[tuple[str, ...]] = ("text", "sentence")
    label_columns: ClassVar[tuple[str, ...]] = ("label", "score", "similarity", "labels")
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("pearson"),
        Measure("loss", False, 1, "squared error", 3, "mean squared error of a prediction"),
    )
    why_zero: ClassVar[str] = (
        "All predictions are the same, or all numbers of this split are. Train longer (training.num_train_epochs) or with another "
        "training.learning_rate; BERT's head also needs adapter.modules_to_save: [pooler]."
    )
    refused_training: ClassVar[dict[str, str]] = {"label_smoothing_factor": "its loss is the squared error of a number"}

    def check_data(self, data: DataRecipe) -> None:
        if isinstance(data.text, list) and len(data.text) != 2:
            raise ValueError(
                f"data.text names {len(data.text)} columns, but task: {self.name} reads one text or a pair. Name one column, or a "
                "list of two."
            )
        if data.labels is not None:
            raise ValueError(
                f"The recipe sets data.labels, but task: {self.name} predicts numbers, and there is no label set. Remove it, or "
                "choose task: sequence_classification."
            )

    def examples(self, table: Table, data: DataRecipe) -> list[Example]:
        if isinstance(data.text, list):
            texts = pair_columns(table, data.text)
        else:
            texts = [[text] for text in table.texts(self.text_column(table, data))]
        label = table.column(data.label, self.label_columns, "data.label")
        examples = []
        for row, (words, value) in enumerate(zip(texts, table.values(label, empty=False), strict=True)):
            try:
                number = math.nan if isinstance(value, bool) else float(value)
            except ValueError:
                number = math.nan
            if not math.isfinite(number):
                raise ValueError(
                    f"{table.source}, row {row}: {value!r} in column {label!r} is not a finite number, which task: {self.name} "
                    "predicts. Correct it, name another column (data.label), or choose task: sequence_classification."
                )
            examples.append(Example(words, [number]))
        return examples

    def check_training(self, examples: Sequence[Example], source: str) -> None:
        if len({example.labels[0] for example in examples}) < 2:
            raise ValueError(
                f"{source}: all {len(examples)} examples have the number {examples[0].labels[0]:g}, so there is nothing to learn. Check "
                "the file, the column (data.label), and what filtered the rows."
            )

    def label_set(self, examples: Sequence[Example], classes: Sequence[str] = ()) -> list[str]:
        return []

    def head_options(self, labels: Sequence[str]) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def encode(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        max_length: int,
        label_at: str = "first",
    ) -> Encoded:
        return encode_texts(examples, tokenizer, [example.labels[0] for example in examples], max_length)

    def tokenize(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
        return tokenizer(*(list(texts) for texts in zip(*(e.words for e in examples), strict=True)), **options)

    def predicted(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The numbers themselves, `(B,)`."""
        return logits.squeeze(-1)

    def compared(
        self, encoded: Encoded, rows: Sequence[Any], examples: Sequence[Example], labels: Sequence[str]
    ) -> tuple[list[Any], list[Any]]:
        return [example.labels[0] for example in examples], [float(row) for row in rows]

    def score(self, gold: Sequence[Any], predicted: Sequence[Any]) -> dict[str, Any]:
        """Pearson's and Spearman's correlation as fractions, and `loss`, the mean squared error."""
        from scipy.stats import pearsonr, spearmanr

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant input: what it means stands in the class
            found = {"pearson": pearsonr, "spearman": spearmanr} if len(gold) > 1 else {}
            scores = {name: float(function(gold, predicted).statistic) for name, function in found.items()}
        scores = {name: scores.get(name, 0.0) for name in ("pearson", "spearman")}
        loss = float(np.mean(np.square(np.subtract(gold, predicted))))
        return {**{name: 0.0 if math.isnan(value) else value for name, value in scores.items()}, "loss": loss}

    def depth_labels(self, labels: Sequence[str]) -> list[str]:
        return ["all tokens"]

    def depth_groups(self, labels: Tensor, shape: torch.Size) -> Tensor:
        return torch.zeros(shape, dtype=torch.long)

    def parts(self, text: str, data: DataRecipe) -> list[str]:
        return split_pair(text, self.name) if isinstance(data.text, list) else [text]

    def asking(self, run: FinishedRun, texts: Sequence[str]) -> Asking:
        """For each text `{"text", "value"}`; for a pair, written with a tab between its texts, also `"second"`."""
        parts = [self.parts(text, run.data) for text in texts]
        values = yield rows_to_predict(self, run, [Example(part, [0.0]) for part in parts])
        return [
            {**dict(zip(("text", "second"), part, strict=False)), "value": round(float(value), 4)}
            for part, value in zip(parts, values, strict=True)
        ]

    def shown(self, prediction: Mapping[str, Any]) -> str:
        """The text or the two texts, a line each, and under them the number."""
        lines = [escape(prediction[name]) for name in ("text", "second") if name in prediction]
        return "\n".join([*lines, f"  {self.answer(prediction)}"])

    def answer(self, prediction: Mapping[str, Any]) -> str:
        """The number."""
        return f"[bold cyan]{prediction['value']:.3f}[/]"
