"""Whether a collated batch is what its rows say: a backbone sees the batch, and a cache is found by the row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .key import uncached_inputs

REMEDY = (
    "States belong to the row as it was cached. Draw masks and augment once, before extracting: put the changed inputs, and the labels "
    "that belong to them, into the rows, and give a collator that only pads (DataCollatorForTokenClassification, DataCollatorWithPadding)."
)


def check_seen(
    batch: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], names: Sequence[str], known: Sequence[str]
) -> None:
    """Raises ValueError if a collator changed model inputs of rows, or added some that the rows do not have.

    Args:
        batch: The collated batch.
        rows: Its rows.
        names: The model inputs that the rows have.
        known: All inputs that the backbone takes.
    """
    mask = batch.get("attention_mask") if "input_ids" in batch else None
    masks = None if mask is None else [m.bool() for m in mask.cpu()]
    for name in names:
        if name == "attention_mask" or not isinstance(batch.get(name), Tensor):
            continue
        for number, row in enumerate(rows):
            if row.get(name) is None:
                continue
            given, seen = torch.as_tensor(row[name]), batch[name][number].cpu()
            if "input_ids" in names:
                real = row.get("attention_mask")
                if real is not None and given.shape[:1] == (len(real),):
                    given = given[torch.as_tensor(real).bool()]
                seen = seen[masks[number]] if masks is not None and seen.shape[:1] == masks[number].shape else seen
            _compare(name, given, seen)
    made = {n: v for n, v in batch.items() if n in known and n not in names and n != "attention_mask"}
    new = uncached_inputs(made, list(made), ())
    if new:
        raise ValueError(
            f"The collator adds the model input {new[0]!r}, which the rows do not have: the layer states depend on it. Put it into the "
            f"rows before extracting, or take it out of the batch. {REMEDY}"
        )


def _compare(name: str, given: Tensor, seen: Tensor) -> None:
    if given.shape != seen.shape:  # padded sound; that other lengths of text do not go together is said elsewhere
        if given.dim() != 1 or seen.dim() != 1 or name == "input_ids" or len(given) > len(seen):
            return
        sides = (seen[: len(given)], seen[-len(given) :])
        if any(torch.equal(side, given.to(side.dtype)) for side in sides):
            return
        changed = int((sides[0] != given.to(seen.dtype)).sum())
    else:
        changed = int((seen != given.to(seen.dtype)).sum()) if not torch.equal(seen, given.to(seen.dtype)) else 0
    if changed:
        raise ValueError(
            f"The collator changes {name!r}: {changed} of {given.numel()} values of a row are others in the batch (random masks, "
            f"whole-word masks, augmentation). {REMEDY}"
        )


def padded_right(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of texts whose tokens stand first in each row, `(B, T)`, and its padding after them."""
    mask: Tensor = inputs["attention_mask"]
    order = mask.bool().logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    fits = {n: isinstance(v, Tensor) and v.shape == mask.shape for n, v in inputs.items()}
    return {n: v.gather(1, order) if fits[n] else v for n, v in inputs.items()}
