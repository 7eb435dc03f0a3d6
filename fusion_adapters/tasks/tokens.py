"""Token classification: a tag for each word of a sentence, as in named-entity recognition."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar, Literal

from rich.markup import escape
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerBase,
)

from .base import IGNORED, Asking, Encoded, Example, FinishedRun, Measure, Task
from .data import DataRecipe
from .tables import WRITE_LISTS, Table, is_printed_list
from .tags import advice, is_tag, to_bio

JOINERS = "\u200c\u200d"  # between letters of Indic and Arabic scripts, and between emoji


class TokenClassification(Task):
    """Tags at the first or the last piece of each word (`data.label_at`); entities scored by seqeval."""

    name: ClassVar[str] = "token_classification"
    title: ClassVar[str] = "token classification"
    hub_task: ClassVar[str] = "token-classification"
    peft_type: ClassVar[str | None] = "TOKEN_CLS"
    auto_model: ClassVar[Any] = AutoModelForTokenClassification
    text_columns: ClassVar[tuple[str, ...]] = ("tokens", "words")
    label_columns: ClassVar[tuple[str, ...]] = ("tags", "ner_tags", "labels")
    measures: ClassVar[tuple[Measure, ...]] = (Measure("f1"),)
    of_words: ClassVar[bool] = True
    positions: ClassVar[Literal["all", "labelled"]] = "labelled"
    why_zero: ClassVar[str] = (
        "No entity that was predicted is right, most often because none was predicted: O is by far the most frequent tag, and the training "
        "ended before it learned another. Train longer (training.num_train_epochs) or with a higher training.learning_rate or more "
        "examples; if the loss falls all the same, look whether the words and the tags of this split are those of the training data, and "
        "whether it holds entities at all."
    )

    def check_data(self, data: DataRecipe) -> None:
        super().check_data(data)
        strange = [label for label in data.labels or () if label != "O" and label[:2] not in ("B-", "I-")]
        if strange:
            raise ValueError(
                f"data.labels holds {', '.join(map(repr, strange[:5]))}; tags become BIO when they are read (BIOES and BILOU too). "
                "Give O and, for each type, B-TYPE and I-TYPE."
            )

    def examples(self, table: Table, data: DataRecipe) -> list[Example]:
        text, label = self.text_column(table, data), table.column(data.label, self.label_columns, "data.label")
        rows = zip(table.values(text, lists=True), table.values(label, empty=False, lists=True), strict=True)
        examples = []
        for row, (words, tags) in enumerate(rows):
            if not isinstance(words, list) or not isinstance(tags, list) or len(words) != len(tags):
                printed = any(is_printed_list(value) for value in (words, tags))
                raise ValueError(
                    f"{table.source}, row {row}: {text!r} and {label!r} must be lists of equal length, a tag for each word."
                    + (f" They are texts of printed lists. {WRITE_LISTS}" if printed else "")
                )
            named = [_named(tag, data.labels, f"{table.source}, row {row}, column {label!r}") for tag in tags]
            strange = [tag for tag in named if not is_tag(tag)]
            if strange:
                other = advice(strange[0]) or (
                    " Where every word has a class of its own, as a part of speech, write "
                    f"B-{strange[0]}: entity F1 then counts words."
                )
                raise ValueError(
                    f"{table.source}, row {row}: {strange[0]!r} in column {label!r} is no tag of an entity (O, B-TYPE or I-TYPE).{other}"
                )
            if words:
                examples.append(Example([str(w) for w in words], to_bio(named)))
        return examples

    def check_training(self, examples: Sequence[Example], source: str) -> None:
        if not any(label != "O" for example in examples for label in example.labels):
            words = sum(len(example.labels) for example in examples)
            raise ValueError(
                f"{source}: all {words:,} words of {len(examples):,} sentences have the tag O, so there is no entity to learn. Check "
                "the file, the column of the tags (data.label), and what filtered the sentences."
            )

    def label_set(self, examples: Sequence[Example], classes: Sequence[str] = ()) -> list[str]:
        # whole BIO pairs, so that a type which only occurs as B- in the data can also go on
        if classes and all(name == "O" or name[:2] in ("B-", "I-") for name in classes):
            pairs = [f"{mark}-{name[2:]}" for name in classes if name != "O" for mark in "BI"]
            return list(dict.fromkeys([*classes, "O", *pairs]))  # the data's own numbers first
        types = sorted({label[2:] for example in examples for label in example.labels if label != "O"})
        return ["O", *(f"{mark}-{kind}" for kind in types for mark in "BI")]

    def encode(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        max_length: int,
        label_at: str = "first",
    ) -> Encoded:
        """Every word gets its label at its first or last piece; a sentence that is too long becomes several rows."""
        if label_at not in ("first", "last"):
            raise ValueError(f"label_at={label_at!r}: the piece of a word that has its label is its 'first' or its 'last'.")
        number = {label: i for i, label in enumerate(labels)}
        encoded = Encoded(notes={"split_sentences": 0, "words_without_pieces": 0})
        for index, example in enumerate(examples):
            parts = _parts(example.words, tokenizer, max_length)
            encoded.notes["split_sentences"] += len(parts) > 1
            labelled = 0
            for start, end in parts:
                batch = tokenizer(example.words[start:end], is_split_into_words=True, truncation=True, max_length=max_length)
                row_labels, words = [], []
                of_piece = batch.word_ids()
                neighbours = [*of_piece[1:], None] if label_at == "last" else [None, *of_piece[:-1]]
                for word, neighbour in zip(of_piece, neighbours, strict=True):
                    labelled_piece = word is not None and word != neighbour
                    row_labels.append(number[example.labels[start + word]] if labelled_piece else IGNORED)
                    if labelled_piece:
                        words.append(start + word)
                labelled += len(words)
                row = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": row_labels}
                encoded.rows.append(row)
                encoded.words.append((index, words))
            encoded.notes["words_without_pieces"] += len(example.words) - labelled
        return encoded

    def tokenize(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
        return tokenizer([example.words for example in examples], is_split_into_words=True, **options)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Any]], Any]:
        return DataCollatorForTokenClassification(tokenizer)

    def compared(
        self, encoded: Encoded, rows: Sequence[Any], examples: Sequence[Example], labels: Sequence[str]
    ) -> tuple[list[Any], list[Any]]:
        return [example.labels for example in examples], decode_tags(encoded, rows, examples, labels)

    def score(self, gold: Sequence[Any], predicted: Sequence[Any]) -> dict[str, Any]:
        """Entity-level precision, recall and F1 by seqeval, as fractions, and the F1 of each type, `f1_by_type`."""
        from seqeval.metrics import classification_report

        report = classification_report(gold, predicted, output_dict=True, zero_division=0)
        overall = report["micro avg"]
        kinds = {k: float(v["f1-score"]) for k, v in report.items() if not k.endswith(" avg")}
        return {
            "f1": float(overall["f1-score"]),
            "precision": float(overall["precision"]),
            "recall": float(overall["recall"]),
            "f1_by_type": kinds,
        }

    def watched(self, gold: Sequence[Any], predicted: Sequence[Any]) -> dict[str, float]:
        from seqeval.metrics import f1_score

        return {"f1": float(f1_score(gold, predicted, zero_division=0))}  # a quarter of the time of `score`

    def asking(self, run: FinishedRun, texts: Sequence[str]) -> Asking:
        """For each text `{"text", "entities": [{"type", "text", "start", "end"}]}` with character offsets."""
        spans = [word_spans(text) for text in texts]
        examples = [
            Example([text[a:b] for a, b in where], [run.labels[0]] * len(where))
            for text, where in zip(texts, spans, strict=True)
        ]
        encoded = self.encode(examples, run.tokenizer, run.labels, run.data.max_length, run.data.label_at)
        for (i, _), row in zip(encoded.words, encoded.rows, strict=True):
            if not row["input_ids"]:
                raise ValueError(f"The text {texts[i]!r} has no word pieces for this tokenizer. Give texts with words.")
        predicted = [logits.argmax(-1).tolist() for logits in (yield encoded.rows)]
        tags = decode_tags(encoded, predicted, examples, run.labels)
        return [
            {"text": text, "entities": _entities(text, where, found)}
            for text, where, found in zip(texts, spans, tags, strict=True)
        ]

    def shown(self, prediction: Mapping[str, Any]) -> str:
        """The sentence with its entities marked."""
        text, marked, position = prediction["text"], "", 0
        for entity in prediction["entities"]:
            marked += escape(text[position : entity["start"]])
            marked += f"[bold cyan]{escape(entity['text'])}[/][dim]\\[{escape(entity['type'])}][/]"
            position = entity["end"]
        return marked + escape(text[position:])


def _named(tag: Any, labels: Sequence[str] | None, source: str) -> str:
    """A tag by its name. Raises ValueError for a number that stands for none."""
    number = int(tag) if isinstance(tag, Integral) or (isinstance(tag, str) and tag.isdecimal()) else None
    if number is None or isinstance(tag, bool):
        return str(tag)
    if labels is None or not 0 <= number < len(labels):
        known = f"data.labels has {len(labels)} names" if labels else "the file does not say which tag each number is"
        raise ValueError(
            f"{source}: {tag} is the number of a tag, and {known}. Give the names in the order of the numbers, from 0, as data.labels, "
            "for example [O, B-PER, I-PER]; the page of the data set lists them."
        )
    return labels[number]


def decode_tags(
    encoded: Encoded, predictions: Sequence[Sequence[int]], examples: Sequence[Example], labels: Sequence[str]
) -> list[list[str]]:
    """Tags for every word of every example from predicted label numbers at every position of every row.

    A word that the tokenizer dropped (it has no piece) is tagged `O`.
    """
    tags = [["O"] * len(example.words) for example in examples]
    for row, (index, words), predicted in zip(encoded.rows, encoded.words, predictions, strict=True):
        positions = [i for i, label in enumerate(row["labels"]) if label != IGNORED]
        for position, word in zip(positions, words, strict=True):
            tags[index][word] = labels[int(predicted[position])]
    return tags


def word_spans(text: str) -> list[tuple[int, int]]:
    """Where the words of a text are: runs of letters and digits with the marks on them, and every other sign alone."""
    spans: list[tuple[int, int]] = []
    in_word = False
    for i, sign in enumerate(text):
        mark = unicodedata.category(sign).startswith("M") or sign in JOINERS
        letter = sign.isalnum() or sign == "_"
        if spans and spans[-1][1] == i and (mark or (letter and in_word)):
            spans[-1] = (spans[-1][0], i + 1)
        elif not sign.isspace():
            spans.append((i, i + 1))
            in_word = letter
    return spans


def _entities(text: str, spans: Sequence[tuple[int, int]], tags: Sequence[str]) -> list[dict[str, Any]]:
    entities: list[dict[str, Any]] = []
    previous = "O"
    for (start, end), tag in zip(spans, tags, strict=True):
        if tag != "O":
            if tag.startswith("I-") and previous[2:] == tag[2:]:
                entities[-1]["end"] = end
            else:
                entities.append({"type": tag[2:], "start": start, "end": end})
        previous = tag
    return [{"type": e["type"], "text": text[e["start"] : e["end"]], "start": e["start"], "end": e["end"]} for e in entities]


def _parts(words: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[tuple[int, int]]:
    """Cuts a sentence between words into parts that fit; a word too long for a part stands alone and loses its tail."""
    batch = tokenizer(list(words), is_split_into_words=True, verbose=False)
    if len(batch["input_ids"]) <= max_length:
        return [(0, len(words))]
    pieces = [0] * len(words)
    special = 0
    for word in batch.word_ids():
        if word is None:
            special += 1
        else:
            pieces[word] += 1
    parts, start, used = [], 0, special
    for index, count in enumerate(pieces):
        if used + count > max_length and index > start:
            parts.append((start, index))
            start, used = index, special
        used += count
    return [*parts, (start, len(words))]
