"""From sentences to model inputs and back: labels on first word pieces, over-long sentences in parts, scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..runs.recipe import Task
from .data import Example
from .masking import Masker

IGNORED = -100  # positions that carry no label, as torch's cross-entropy wants it


@dataclass
class Encoded:
    """Examples as rows of model inputs.

    Attributes:
        rows: `input_ids`, `attention_mask` and `labels`, one dictionary a row, not padded.
        words: For each row the example and, at each labelled position, the index of the word.
        notes: How many sentences or texts were split, texts cut off, words had no piece, and rows nothing to predict.
    """

    rows: list[dict[str, list[int]]] = field(default_factory=list)
    words: list[tuple[int, list[int]]] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    task: Task,
    max_length: int,
) -> Encoded:
    """Encodes examples; every labelled word gets its label at its first piece, wherever its sentence is cut.

    For masked language modelling the labels are the ids of hidden pieces, see `Masker`.

    Args:
        examples: The examples; their labels must be in `labels`.
        tokenizer: A fast tokenizer.
        labels: The label set.
        task: Which task.
        max_length: Word pieces per row. A longer sentence of words, or text for masked language modelling, becomes several
            rows; a longer text to classify is cut off.

    Raises:
        ValueError: If pieces are to be masked and the tokenizer has no mask token.
    """
    if task == "masked_lm":
        return _encode_masked(examples, tokenizer, max_length)
    number = {label: i for i, label in enumerate(labels)}
    if task == "sequence_classification":
        return _encode_texts(examples, tokenizer, number, max_length)
    encoded = Encoded(notes={"split_sentences": 0, "words_without_pieces": 0})
    for index, example in enumerate(examples):
        parts = _parts(example.words, tokenizer, max_length)
        encoded.notes["split_sentences"] += len(parts) > 1
        labelled = 0
        for start, end in parts:
            batch = tokenizer(example.words[start:end], is_split_into_words=True, truncation=True, max_length=max_length)
            row_labels, words = [], []
            previous = None
            for word in batch.word_ids():
                first = word is not None and word != previous
                row_labels.append(number[example.labels[start + word]] if first else IGNORED)
                if first:
                    words.append(start + word)
                previous = word
            labelled += len(words)
            row = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": row_labels}
            encoded.rows.append(row)
            encoded.words.append((index, words))
        encoded.notes["words_without_pieces"] += len(example.words) - labelled
    return encoded


def _encode_texts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, number: dict[str, int], max_length: int
) -> Encoded:
    encoded = Encoded(notes={"truncated_texts": 0})
    for index, example in enumerate(examples):
        whole = tokenizer(example.words[0])
        batch = tokenizer(example.words[0], truncation=True, max_length=max_length)
        encoded.notes["truncated_texts"] += len(whole["input_ids"]) > len(batch["input_ids"])
        row = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": number[example.labels[0]],
        }
        encoded.rows.append(row)
        encoded.words.append((index, []))
    return encoded


def _encode_masked(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    masker = Masker(tokenizer)
    encoded = Encoded(notes={"split_texts": 0, "rows_without_pieces": 0})
    for index, example in enumerate(examples):
        parts = tokenizer(example.words[0], truncation=True, max_length=max_length, return_overflowing_tokens=True)
        encoded.notes["split_texts"] += len(parts["input_ids"]) > 1
        for pieces in parts["input_ids"]:
            hidden, chosen = masker(pieces)
            if not chosen:  # characters that the tokenizer drops, or does not know
                encoded.notes["rows_without_pieces"] += 1
                continue
            row_labels = [IGNORED] * len(pieces)
            for position in chosen:
                row_labels[position] = pieces[position]
            row = {"input_ids": hidden, "attention_mask": [1] * len(pieces), "labels": row_labels}
            encoded.rows.append(row)
            encoded.words.append((index, []))
    return encoded


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


def score(task: Task, gold: Sequence[Any], predicted: Sequence[Any]) -> dict[str, Any]:
    """Scores: entity-level precision, recall and F1 by seqeval, accuracy and macro-F1, or accuracy and loss of pieces.

    Args:
        task: Which task.
        gold: Lists of tags, labels, or for masked language modelling the ids of the hidden pieces.
        predicted: The same shape; for masked language modelling pairs of the likeliest id and the negative
            log-likelihood of the right one (in nats).

    Returns:
        Fractions between 0 and 1; for tokens also the F1 of each entity type, as `f1_by_type`; for masked language
        modelling also `loss`, the mean negative log-likelihood of a piece, and `perplexity`, its exponential.
    """
    if task == "masked_lm":
        loss = math.fsum(nll for _, nll in predicted) / len(gold)
        # beyond exp(700) there is no such float
        return {"accuracy": main_score(task, gold, predicted), "loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if task == "sequence_classification":
        from sklearn.metrics import accuracy_score, f1_score

        return {
            "accuracy": float(accuracy_score(gold, predicted)),
            "macro_f1": float(f1_score(gold, predicted, average="macro", zero_division=0)),
        }
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


def main_score(task: Task, gold: Sequence[Any], predicted: Sequence[Any]) -> float:
    """The one score by which epochs are compared, `MAIN_SCORE`: a quarter of the time of `score`."""
    if task == "masked_lm":
        return sum(int(piece) == right for right, (piece, _) in zip(gold, predicted, strict=True)) / len(gold)
    if task == "sequence_classification":
        from sklearn.metrics import accuracy_score

        return float(accuracy_score(gold, predicted))
    from seqeval.metrics import f1_score

    return float(f1_score(gold, predicted, zero_division=0))


MAIN_SCORE = {"token_classification": "f1", "sequence_classification": "accuracy", "masked_lm": "accuracy"}
