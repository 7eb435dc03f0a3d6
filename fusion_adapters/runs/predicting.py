"""A finished run, reloaded from its folder: predictions for new text, and the weights over depth behind them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..tasks.alignment import decode_tags, encode
from ..tasks.data import Example
from ..tasks.masking import mask_token_of
from ..tuner import depth_weights, fusion_layers
from .loading import check_lengths, load_model, load_tokenizer, match_padding
from .recipe import Recipe, parse_recipe

JOINERS = "\u200c\u200d"  # between letters of Indic and Arabic scripts, and between emoji


@dataclass
class Run:
    """A reloaded run: the attached model in evaluation mode, its tokenizer, recipe and labels."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    labels: list[str]


def load_run(folder: str | Path) -> Run:
    """Reloads a run that `fusion-adapters train` wrote.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If the adapter does not fit the backbone, or its file is damaged.
    """
    folder = Path(folder)
    description = folder / "run.json"
    if not description.is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} holds no run: there is no run.json in it. Give the folder that was --output of fusion-adapters train."
        )
    try:
        content = json.loads(description.read_text(encoding="utf-8"))
        recipe, labels = parse_recipe(content["recipe"], str(description)), content["labels"]
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{description} is damaged ({error}). Train again, or restore the file.") from error
    model = load_model(recipe.backbone, recipe.task, labels, recipe.adapter.get("modules_to_save") or ())
    tokenizer = load_tokenizer(recipe.backbone, recipe.task)
    match_padding(model, tokenizer)
    return Run(PeftModel.from_pretrained(model, folder / "adapter").eval(), tokenizer, recipe, labels)


def predict(run: Run, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Predicts entities, classes, or what stands at the mask tokens of a text.

    Args:
        run: The reloaded run.
        texts: Plain texts.

    Returns:
        For each text `{"text", "entities": [{"type", "text", "start", "end"}]}` with character offsets, or
        `{"text", "label", "probability"}`, or for masked language modelling `{"text", "filled", "masks": [{"piece",
        "probability"}]}` with the likeliest piece for each mask token.

    Raises:
        ValueError: If a text for masked language modelling holds no mask token.
    """
    if run.recipe.task == "masked_lm":
        return [_fill(run, text) for text in texts]
    tokens = run.recipe.task == "token_classification"
    spans = [word_spans(text) for text in texts]
    words = (
        [[text[a:b] for a, b in where] for text, where in zip(texts, spans, strict=True)] if tokens else [[t] for t in texts]
    )
    examples = [Example(w, [run.labels[0]] * len(w)) for w in words]
    encoded = encode(examples, run.tokenizer, run.labels, run.recipe.task, run.recipe.data.max_length)
    for (i, _), row in zip(encoded.words, encoded.rows, strict=True):
        if not row["input_ids"]:
            raise ValueError(f"The text {texts[i]!r} has no word pieces for this tokenizer. Give texts with words.")
    check_lengths(run.model, encoded.rows)
    logits = [_logits(run, row) for row in encoded.rows]
    if not tokens:
        return [_class(run, text, row) for text, row in zip(texts, logits, strict=True)]
    tags = decode_tags(encoded, [row.argmax(-1).tolist() for row in logits], examples, run.labels)
    return [{"text": t, "entities": _entities(t, where, found)} for t, where, found in zip(texts, spans, tags, strict=True)]


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


def depth_map(run: Run, text: str) -> tuple[list[str], list[int], Tensor]:
    """The weights over depth for the word pieces of a text.

    Returns:
        The pieces, the layers, and the weights, `(pieces, layers)` or `(pieces, heads, layers)`.

    Raises:
        ValueError: If the run's fusion has no weights over depth, or the text is empty.
    """
    if not text.strip():
        raise ValueError("The text is empty. Give at least one word.")
    batch = run.tokenizer(text, truncation=True, max_length=run.recipe.data.max_length, return_tensors="pt").to(
        run.model.device
    )
    check_lengths(run.model, [{"input_ids": row} for row in batch["input_ids"]])
    weights = depth_weights(run.model, **batch)[0]
    layers = [layer.active_fusion.layers for layer in fusion_layers(run.model) if layer.active_fusion is not None][-1]
    pieces = [str(piece) for piece in run.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())]
    return pieces, list(layers), weights.cpu()


def _logits(run: Run, row: dict[str, Any]) -> Tensor:
    # one text at a time: with an 8-bit backbone an answer can depend on what else is in the batch
    batch = {k: torch.tensor([row[k]], device=run.model.device) for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return run.model(**batch).logits[0].float().cpu()


def _class(run: Run, text: str, logits: Tensor) -> dict[str, Any]:
    probabilities = logits.softmax(-1)
    best = int(probabilities.argmax())
    return {"text": text, "label": run.labels[best], "probability": round(float(probabilities[best]), 4)}


def _fill(run: Run, text: str) -> dict[str, Any]:
    mask, written = mask_token_of(run.tokenizer), str(run.tokenizer.mask_token)
    length = run.recipe.data.max_length
    parts = run.tokenizer(text, truncation=True, max_length=length, return_overflowing_tokens=True)["input_ids"]
    check_lengths(run.model, [{"input_ids": pieces} for pieces in parts])
    found: list[int] = []
    masks = []
    for pieces in parts:
        positions = [i for i, piece in enumerate(pieces) if piece == mask]
        if positions:
            logits = _logits(run, {"input_ids": pieces, "attention_mask": [1] * len(pieces)})
            for probabilities in logits[positions].softmax(-1):
                found.append(int(probabilities.argmax()))
                piece = str(run.tokenizer.convert_ids_to_tokens(found[-1]))
                masks.append({"piece": piece, "probability": round(float(probabilities.max()), 4)})
    if not found:
        raise ValueError(
            f"The text {text[:80]!r} holds no {written}, and a masked language model predicts only what stands there. Write "
            f"{written} in place of the words to predict."
        )
    filled = text
    for number in found:
        filled = filled.replace(written, str(run.tokenizer.decode([number])).strip(), 1)
    return {"text": text, "filled": filled, "masks": masks}


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
