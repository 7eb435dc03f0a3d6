"""Sequence classification: one class for a whole text, as an intent or a sentiment."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from rich.markup import escape
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from .base import Asking, Encoded, Example, FinishedRun, Measure, Task
from .data import DataRecipe
from .tables import Table, is_printed_list

NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]+)?")


class SequenceClassification(Task):
    """One class a text; a text that is too long is cut off."""

    name: ClassVar[str] = "sequence_classification"
    title: ClassVar[str] = "sequence classification"
    hub_task: ClassVar[str] = "text-classification"
    peft_type: ClassVar[str | None] = "SEQ_CLS"
    auto_model: ClassVar[Any] = AutoModelForSequenceClassification
    text_columns: ClassVar[tuple[str, ...]] = ("text", "sentence")
    label_columns: ClassVar[tuple[str, ...]] = ("label", "category", "labels", "intent")
    measures: ClassVar[tuple[Measure, ...]] = (Measure("accuracy"),)
    counts_classes: ClassVar[bool] = True
    why_zero: ClassVar[str] = (
        "No class is right, which is worse than guessing. Look whether the classes and texts of this split are those of the training data "
        "(another order of the rows, another column); with very few examples or steps, train longer or with a higher "
        "training.learning_rate."
    )

    def examples(self, table: Table, data: DataRecipe) -> list[Example]:
        texts = table.texts(self.text_column(table, data))
        return [Example([text], [label]) for text, label in zip(texts, self._labels(table, data), strict=True)]

    def _labels(self, table: Table, data: DataRecipe) -> list[str]:
        name = table.column(data.label, self.label_columns, "data.label")
        labels = [str(label) for label in table.values(name, empty=False)]
        printed = next((row for row, label in enumerate(labels) if is_printed_list(label)), None)
        if printed is not None:
            raise ValueError(
                f"{table.source}, row {printed}: {labels[printed]!r} in column {name!r} is a printed list, and a text has one class "
                "here. Name another column (data.label), or write one label for each text."
            )
        return labels

    def check_training(self, examples: Sequence[Example], source: str) -> None:
        counts = Counter(label for example in examples for label in example.labels)
        if len(counts) < 2:
            label, count = next(iter(counts.items()))
            raise ValueError(
                f"{source}: all {count} examples have the label {label!r}, and a classifier needs two classes at least. Check the "
                "file, the column (data.label), and what filtered the rows."
            )

    def label_set(self, examples: Sequence[Example], classes: Sequence[str] = ()) -> list[str]:
        """The data's own order; numbers by their value, and names by the alphabet."""
        return list(classes) or in_order({label for example in examples for label in example.labels})

    def encode(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        max_length: int,
        label_at: str = "first",
    ) -> Encoded:
        number = {label: i for i, label in enumerate(labels)}
        return encode_texts(examples, tokenizer, [number[example.labels[0]] for example in examples], max_length)

    def score(self, gold: Sequence[Any], predicted: Sequence[Any]) -> dict[str, Any]:
        """Accuracy and macro-F1, as fractions."""
        from sklearn.metrics import f1_score

        macro = float(f1_score(gold, predicted, average="macro", zero_division=0))
        return {**self.watched(gold, predicted), "macro_f1": macro}

    def watched(self, gold: Sequence[Any], predicted: Sequence[Any]) -> dict[str, float]:
        from sklearn.metrics import accuracy_score

        return {"accuracy": float(accuracy_score(gold, predicted))}

    def asking(self, run: FinishedRun, texts: Sequence[str]) -> Asking:
        """For each text `{"text", "label", "probability"}`."""
        found = yield from self._classified(run, [Example([text], [run.labels[0]]) for text in texts])
        return [{"text": text, **answer} for text, answer in zip(texts, found, strict=True)]

    def _classified(self, run: FinishedRun, examples: Sequence[Example]) -> Asking:
        answers = []
        for logits in (yield rows_to_predict(self, run, examples)):
            probabilities = logits.softmax(-1)
            best = int(probabilities.argmax())
            answers.append({"label": run.labels[best], "probability": round(float(probabilities[best]), 4)})
        return answers

    def shown(self, prediction: Mapping[str, Any]) -> str:
        """The text, and under it the class with its probability."""
        return f"{escape(prediction['text'])}\n  {self.answer(prediction)}"

    def answer(self, prediction: Mapping[str, Any]) -> str:
        """The class with its probability."""
        return f"[bold cyan]{escape(prediction['label'])}[/] {prediction['probability']:.2f}"


def in_order(labels: Iterable[str]) -> list[str]:
    """Labels by the alphabet; where all are numbers, by their value, so that 10 comes after 9."""
    found = sorted(labels)
    return sorted(found, key=float) if all(NUMBER.fullmatch(label) for label in found) else found


def encode_texts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, labels: Sequence[Any], max_length: int
) -> Encoded:
    """Rows of whole texts or pairs of them, cut off at `max_length` pieces (of a pair the longer text first).

    Args:
        examples: One text each, or two each.
        tokenizer: A fast tokenizer; for pairs its `token_type_ids`, if it makes them, become model inputs.
        labels: What each row has as `labels`.
        max_length: Word pieces per row.
    """
    encoded = Encoded(notes={"truncated_texts": 0})
    for index, (example, label) in enumerate(zip(examples, labels, strict=True)):
        whole = tokenizer(*example.words, verbose=False)
        batch = tokenizer(*example.words, truncation=True, max_length=max_length)
        encoded.notes["truncated_texts"] += len(whole["input_ids"]) > len(batch["input_ids"])
        names = ["input_ids", "attention_mask"]
        if len(example.words) > 1 and "token_type_ids" in batch:  # which of the two a piece belongs to
            names.append("token_type_ids")
        encoded.rows.append({**{name: batch[name] for name in names}, "labels": label})
        encoded.words.append((index, []))
    return encoded


def rows_to_predict(task: Task, run: FinishedRun, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """The rows of texts to predict. Raises ValueError for a text without word pieces."""
    rows = task.encode(examples, run.tokenizer, run.labels, run.data.max_length).rows
    for example, row in zip(examples, rows, strict=True):
        if not row["input_ids"]:
            raise ValueError(f"The text {example.words[0]!r} has no word pieces for this tokenizer. Give texts with words.")
    return rows
