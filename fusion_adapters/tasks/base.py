"""What a task is: the class that every task fills in, and what passes between its parts."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from .data import OF_GENERATION, DataRecipe
from .tables import Table

IGNORED = nn.CrossEntropyLoss().ignore_index  # -100, the label of positions without one


@dataclass
class Example:
    """One example.

    Attributes:
        words: The words of a sentence; or whole texts, one, or two of a pair.
        labels: A tag for each word; or one label, or one number; or who says each part of a conversation; empty where the text is
            its own label.
    """

    words: list[str]
    labels: list[Any]


@dataclass
class Encoded:
    """Examples as rows of model inputs.

    Attributes:
        rows: `input_ids`, `attention_mask` and `labels` (and `token_type_ids` for pairs), one dictionary a row, not padded.
        words: For each row the example and, at each labelled position, the index of the word.
        notes: What was split, cut off or left out, with the number of examples.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    words: list[tuple[int, list[int]]] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Measure:
    """A score: how it is compared and shown.

    Attributes:
        name: Its key in `metrics.json`.
        higher_is_better: Which of two values is the better one.
        scale: Factor from the stored value to the shown one.
        unit: Of the shown value.
        digits: Decimal places of the shown value.
        meaning: One clause for reports.
    """

    name: str
    higher_is_better: bool = True
    scale: float = 100
    unit: str = "points of 100"
    digits: int = 1
    meaning: str = ""

    def better(self, first: float, second: float) -> bool:
        """Whether the first of two values is the better one."""
        return first > second if self.higher_is_better else first < second

    def shown(self, value: float) -> str:
        """A value as tables show it."""
        return f"{self.scale * value:.{self.digits}f}"


# The steps of a prediction: gives rows, is sent the logits of each, and returns what is predicted.
Asking = Generator[list[dict[str, Any]], list[Tensor], list[dict[str, Any]]]


class FinishedRun(Protocol):
    """What a task asks of a trained model to predict."""

    tokenizer: PreTrainedTokenizerBase
    labels: list[str]

    @property
    def data(self) -> DataRecipe:
        """The recipe's section `data`."""

    def logits(self, rows: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """The logits of each row, float32 on the CPU, `(T, K)` or `(K,)`; `labels` are left out."""

    def continued(self, pieces: Sequence[int], most: int, ends: Sequence[int]) -> list[int]:
        """The likeliest continuation of a row, piece by piece, up to and with the first of `ends`, and of `most` pieces at most."""


class Task(ABC):
    """What is asked of a text, in one place: reading, encoding, head, scores, prediction.

    A new task is a subclass in a file of its own and one line in `registry.py`; recipes, command line, comparisons and tables
    take everything from here.

    Attributes:
        name: The value of `task` in recipes.
        title: The task in prose.
        peft_type: peft's task type; None where peft has none.
        hub_task: The hub's name of the task, for model cards.
        auto_model: The class of transformers that loads the model with its head.
        text_columns: Usual names of the text column, the first that is there is taken.
        label_columns: Usual names of the label column; empty where the task reads no labels.
        measures: The scores whose form differs from "points of 100, higher is better", and first of all the main one, by
            which epochs and learning rates are compared.
        of_words: Whether an example is a sentence of words, not a whole text.
        positions: The positions of a cached row that the head reads: `"all"`, or `"labelled"` where positions without a
            label do not count.
        vocabulary_head: Whether the head predicts pieces by the frozen embeddings; it then runs at labelled positions alone.
        predicts_next: Whether the state of a position predicts the piece after it. Labels stand where their pieces stand, as
            transformers' causal language models take them, and the backbone must be causal.
        own_keys: Those keys of the section `data` that the task knows and most do not.
        training_defaults: Training arguments whose defaults are others than those of recipes, and change no result.
        counts_classes: Whether every example has one class, so that a comparison can count examples per class.
        refused_training: Training arguments that do not fit the task, with the reason.
        why_zero: The likeliest reasons of a main score of 0, and what to do.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    peft_type: ClassVar[str | None]
    hub_task: ClassVar[str] = "other"
    auto_model: ClassVar[Any]
    text_columns: ClassVar[tuple[str, ...]]
    label_columns: ClassVar[tuple[str, ...]]
    measures: ClassVar[tuple[Measure, ...]]
    of_words: ClassVar[bool] = False
    positions: ClassVar[Literal["all", "labelled"]] = "all"
    vocabulary_head: ClassVar[bool] = False
    predicts_next: ClassVar[bool] = False
    own_keys: ClassVar[tuple[str, ...]] = ()
    training_defaults: ClassVar[dict[str, Any]] = {}
    counts_classes: ClassVar[bool] = False
    refused_training: ClassVar[dict[str, str]] = {}
    why_zero: ClassVar[str] = ""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"<task {self.name}>"

    # reading

    def check_keys(self, data: DataRecipe) -> None:
        """Raises ValueError if the section `data` of a recipe sets a key of other tasks."""
        foreign = [
            key
            for key in OF_GENERATION
            if key not in self.own_keys and getattr(data, key) != DataRecipe.model_fields[key].default
        ]
        if foreign:
            raise ValueError(
                f"The recipe sets data.{foreign[0]}, which task: {self.name} does not know: it is for task: causal_lm. Remove it."
            )

    def check_data(self, data: DataRecipe) -> None:
        """Raises ValueError if the section `data` of a recipe asks for what the task does not know."""
        if isinstance(data.text, list):
            raise ValueError(
                f"data.text names {len(data.text)} columns ({', '.join(data.text)}), but task: {self.name} reads one. Name one, or "
                "choose a task that reads pairs (task: sentence_pairs)."
            )

    def text_column(self, table: Table, data: DataRecipe) -> str:
        """The name of the one column of texts.

        Raises:
            ValueError: If there is none, or it is half of a pair that the recipe does not name.
        """
        assert not isinstance(data.text, list)  # refused by check_data
        pair = table.pair() if self.label_columns and not self.of_words else None
        if pair is not None and data.text in (None, *pair):
            name = data.text or next((name for name in self.text_columns if name in table.columns), pair[0])
            if data.text is not None:
                other = pair[1 - pair.index(data.text)]
                warnings.warn(
                    f"{table.source}: data.text reads {name!r} alone, half of a pair with {other!r}. For both, choose task: "
                    f"sentence_pairs, or task: regression with data.text: [{pair[0]}, {pair[1]}].",
                    stacklevel=2,
                )
            elif name in pair:
                raise ValueError(
                    f"{table.source} holds pairs, {pair[0]!r} and {pair[1]!r}, and task: {self.name} reads one text, unless told "
                    f"otherwise. For a class of each pair choose task: sentence_pairs; for a number of each, task: regression with "
                    f"data.text: [{pair[0]}, {pair[1]}]. To read one of the two alone on purpose, name it in data.text."
                )
        return table.column(data.text, self.text_columns, "data.text")

    @abstractmethod
    def examples(self, table: Table, data: DataRecipe) -> list[Example]:
        """The examples of a table. Raises ValueError, with file and row, if a value does not fit."""

    @abstractmethod
    def label_set(self, examples: Sequence[Example], classes: Sequence[str] = ()) -> list[str]:
        """The label set of training examples, in the order of the model's outputs; empty where the task has none.

        Args:
            examples: The training examples.
            classes: The names of classes that the data number themselves; their order is kept.
        """

    def classes(self, table: Table, data: DataRecipe) -> list[str]:
        """The names of the label column's classes in the data's own order; empty where it numbers none."""
        names = (data.label,) if data.label else self.label_columns
        return table.classes.get(next((name for name in names if name in table.columns), ""), [])

    def check_training(self, examples: Sequence[Example], source: str) -> None:  # noqa: B027 - most tasks can learn from anything
        """Raises ValueError if there is nothing to learn from training examples: all have the same label."""

    # the model

    def head_options(self, labels: Sequence[str]) -> dict[str, Any]:
        """What `from_pretrained` is told of the head: number and names of labels."""
        numbered = dict(enumerate(labels))
        return {"num_labels": len(labels), "id2label": numbered, "label2id": {v: i for i, v in numbered.items()}}

    @abstractmethod
    def encode(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        max_length: int,
        label_at: str = "first",
    ) -> Encoded:
        """Encodes examples.

        Args:
            examples: The examples; their labels must be in `labels`.
            tokenizer: A fast tokenizer.
            labels: The label set.
            max_length: Word pieces per row.
            label_at: For tasks of words, the piece of a word that has its label, `"first"` or `"last"`.
        """

    def encoded(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], data: DataRecipe
    ) -> Encoded:
        """Encodes examples, cut as the section `data` of a recipe says; see `encode`."""
        return self.encode(examples, tokenizer, labels, data.max_length, data.label_at)

    def tokenize(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
        """The texts of examples as the tokenizer's batch, without labels."""
        return tokenizer([example.words[0] for example in examples], **options)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Any]], Any]:
        """Pads rows to a batch."""
        return DataCollatorWithPadding(tokenizer)

    # scores

    @property
    def main(self) -> Measure:
        """The main score."""
        return self.measures[0]

    def measure(self, name: str) -> Measure:
        """How a score is shown."""
        return next((m for m in self.measures if m.name == name), Measure(name))

    @property
    def loss(self) -> Measure | None:
        """The loss, where the task reports one beside its scores."""
        return next((m for m in self.measures if m.name == "loss"), None)

    def predicted(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What an evaluation keeps of logits `(..., K)`: label numbers; a large set of labels would fill the memory."""
        return logits.argmax(-1)

    def compared(
        self, encoded: Encoded, rows: Sequence[Any], examples: Sequence[Example], labels: Sequence[str]
    ) -> tuple[list[Any], list[Any]]:
        """Gold and predicted values for `score`, from what `predicted` kept of each row, in the order of `encoded.rows`."""
        return [e.labels[0] for e in examples], [labels[int(p)] for p in rows]

    @abstractmethod
    def score(self, gold: Sequence[Any], predicted: Sequence[Any]) -> dict[str, Any]:
        """All scores, by name."""

    def watched(self, gold: Sequence[Any], predicted: Sequence[Any]) -> dict[str, float]:
        """The scores that are taken after each epoch: the main one, and the exact loss where the task reports it."""
        scores = self.score(gold, predicted)
        return {m.name: scores[m.name] for m in (self.main, self.loss) if m is not None}

    # the weights over depth, by label

    def depth_labels(self, labels: Sequence[str]) -> list[str]:
        """The groups of tokens over which weights over depth are averaged: by default the labels."""
        return list(labels)

    def depth_groups(self, labels: Tensor, shape: torch.Size) -> Tensor:
        """The group of each token `(B, T)`, -100 for none, from a batch's labels; a text's label counts for all its tokens."""
        return labels[:, None].expand(shape) if labels.dim() == 1 else labels

    # prediction

    def parts(self, text: str, data: DataRecipe) -> list[str]:
        """The texts of one example as a user writes it on one line. Raises ValueError if they do not fit the task."""
        return [text]

    def predict(self, run: FinishedRun, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Predictions for texts, as dictionaries that JSON can hold. Raises ValueError if a text does not fit."""
        asking = self.asking(run, texts)
        try:
            rows = next(asking)
            while True:
                rows = asking.send(run.logits(rows))
        except StopIteration as done:
            return done.value

    @abstractmethod
    def asking(self, run: FinishedRun, texts: Sequence[str]) -> Asking:
        """The steps of `predict`. Whoever takes them answers with logits, for several runs at once if they have the same rows."""

    @abstractmethod
    def shown(self, prediction: Mapping[str, Any]) -> str:
        """A prediction with its text as rich text, a line or two."""

    def answer(self, prediction: Mapping[str, Any]) -> str:
        """A prediction as rich text that stands beside its text; by default with the text in it."""
        return self.shown(prediction)
