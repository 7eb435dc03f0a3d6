"""Sentence pairs: one class for two texts, as in inference (MNLI, RTE) and paraphrase (QQP, MRPC)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rich.markup import escape
from transformers import PreTrainedTokenizerBase

from .base import Asking, Example, FinishedRun
from .data import DataRecipe
from .sequences import SequenceClassification
from .tables import PAIRS, Table

BETWEEN = "\t"  # between the two texts of a pair on the command line, as between columns


class SentencePairs(SequenceClassification):
    """One class a pair; scored as sequence classification."""

    name: ClassVar[str] = "sentence_pairs"
    title: ClassVar[str] = "classification of sentence pairs"
    text_columns: ClassVar[tuple[str, ...]] = tuple(" and ".join(pair) for pair in PAIRS)

    def check_data(self, data: DataRecipe) -> None:
        if data.text is not None and (isinstance(data.text, str) or len(data.text) != 2):
            raise ValueError(
                f"data.text={data.text!r}, but task: {self.name} reads two columns. Give a list of two, for example [premise, "
                "hypothesis]."
            )

    def examples(self, table: Table, data: DataRecipe) -> list[Example]:
        names = data.text or table.pair()
        if names is None:
            table.column(None, self.text_columns, "data.text")  # raises: none is there
        labels = self._labels(table, data)
        return [Example(texts, [label]) for texts, label in zip(pair_columns(table, names or ()), labels, strict=True)]

    def tokenize(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
        return tokenizer(*([example.words[i] for example in examples] for i in range(2)), **options)

    def parts(self, text: str, data: DataRecipe) -> list[str]:
        return split_pair(text, self.name)

    def asking(self, run: FinishedRun, texts: Sequence[str]) -> Asking:
        """For each pair, written with a tab between its texts, `{"text", "second", "label", "probability"}`."""
        pairs = [self.parts(text, run.data) for text in texts]
        found = yield from self._classified(run, [Example(pair, [run.labels[0]]) for pair in pairs])
        return [{"text": a, "second": b, **answer} for (a, b), answer in zip(pairs, found, strict=True)]

    def shown(self, prediction: Mapping[str, Any]) -> str:
        """The two texts, a line each, and under them the class with its probability."""
        return f"{escape(prediction['text'])}\n{super().shown({**prediction, 'text': prediction['second']})}"


def pair_columns(table: Table, names: Sequence[str]) -> list[list[str]]:
    """The two texts of each row. Raises ValueError if a column is not there, or a value is missing."""
    columns = [table.texts(table.column(name, (), "data.text")) for name in names]
    return [list(pair) for pair in zip(*columns, strict=True)]


def split_pair(text: str, task: str) -> list[str]:
    """The two texts of a pair as it is written on the command line. Raises ValueError if there are not two."""
    parts = [part.strip() for part in text.split(BETWEEN)]
    if len(parts) != 2 or not all(parts):
        raise ValueError(
            f"The text {text[:80]!r} has {len(parts)} parts, and the model of this run (task: {task}) was trained on pairs. Write the "
            "two texts of a pair with a tab between them, for example --text $'A man sleeps.\\tA man rests.'"
        )
    return parts
