"""Caches that hold one mean over positions for each text and layer, in the place of the states of its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..backbone.families import text_config
from ..fusions import Context
from ..fusions.pooling import Means
from .source import Source
from .storage import StaleCacheError


def text_length(row: Mapping[str, Any]) -> int:
    """The number of real tokens of a row of text."""
    mask = row.get("attention_mask")
    return len(row["input_ids"]) if mask is None else int(sum(mask))


def padding_token(source: Source) -> int | None:
    """The number of the token that the model takes for padding; None if it knows none."""
    number: int | None = getattr(text_config(source.backbone.base), "pad_token_id", None)
    return number


def holds_means(source: Source, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an extraction keeps a mean over its positions for each text, because the model reads nothing else of it.

    The head of a decoder looks for the last token that is not the padding's. Of a text that ends with that token (an EOS that
    also pads) it reads one before the end, where the running mean is another; then all positions are kept.

    Args:
        source: Where the states come from.
        names: The model inputs of the rows.
        rows: The rows.
    """
    if not source.means or "input_ids" not in names:
        return False
    pad = padding_token(source)
    return not source.backbone.causal or pad is None or all(_last_token(row) != pad for row in rows)


def _last_token(row: Mapping[str, Any]) -> int | None:
    ids, mask = row["input_ids"], row.get("attention_mask")
    real = [int(i) for i, is_real in zip(ids, mask, strict=True) if is_real] if mask is not None else ids
    return int(real[-1]) if len(real) else None


def means_of_texts(state: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """The mean over each text of a layer state `(B, T, d)`, as `Means` takes it: `(B, d)`; of texts with a mask `(B, T)`."""
    return Means(Context(mask, causal), state).of_texts(state)


def check_lengths(inputs: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError if texts are longer or shorter in a batch than in its rows: their means would be others."""
    mask, expected = inputs.get("attention_mask"), [text_length(row) for row in rows]
    found = [inputs["input_ids"].shape[1]] * len(inputs["input_ids"]) if mask is None else mask.sum(1).tolist()
    if found != expected:
        raise ValueError(
            f"A batch has {sum(found)} positions, but its rows have {sum(expected)}. Give a collator that pads rows and makes an "
            "attention_mask, and does not cut them."
        )


def check_means(folder: Path, manifest: Mapping[str, Any], source: Source) -> None:
    """Raises StaleCacheError if a cache holds means over positions, and a model with a fusion does not read just these."""
    if not manifest.get("means") or not source.fusions:
        return
    if not source.means:
        raise StaleCacheError(
            f"The cache {str(folder)!r} holds a mean over the positions of each text (it was extracted for fusion_pool='mean'), and "
            "this model reads the positions themselves. Extract again into another folder with this model, or with means=False for both."
        )
    before, now = manifest["pad_token_id"], padding_token(source)
    if source.backbone.causal and before != now:
        raise StaleCacheError(
            f"The cache {str(folder)!r} holds the mean of each text up to its last token, which the head finds by pad_token_id: "
            f"{before} when it was extracted, {now} now. Set it back, or extract again into another folder."
        )
