"""Rows with their cached states, for `Trainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset
from transformers import BatchEncoding

IGNORED = -100  # the label of positions without one, as torch's cross-entropy wants it

if TYPE_CHECKING:
    from .cache import LayerStateCache


class CachedRow(BatchEncoding):
    """The inputs and labels of a row, and where its states are.

    No `dict`, so that `Trainer` does not take columns out of it; a `BatchEncoding`, so that it can be sorted by length.
    """

    def __init__(self, inputs: Mapping[str, Any], source: CachedDataset, number: int) -> None:
        super().__init__(dict(inputs))
        self.source = source
        self.number = number


class CachedDataset(Dataset[CachedRow]):
    """Rows with their cached states; a batch's states are read when it is collated.

    Goes into `Trainer` as `train_dataset` or `eval_dataset`, with `cache.collator(...)` as `data_collator`. With
    `dataloader_num_workers` set, the workers read ahead.

    Args:
        cache: The cache.
        rows: Tokenised rows (`input_ids`, `attention_mask`, `labels`, ...), any part of those that were cached and in any
            order; labels may be others than when the states were extracted.
        layers: The layer states to read: those of the fusion, and `L`.

    Raises:
        StaleCacheError: If a row is not in the cache.
    """

    def __init__(self, cache: LayerStateCache, rows: Sequence[Mapping[str, Any]], layers: Sequence[int]) -> None:
        self.cache = cache
        self.rows = rows
        self.layers = list(layers)
        self.numbers = cache.find(rows)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> CachedRow:
        return CachedRow(self.rows[i], self, self.numbers[i])


class CachedCollator:
    """The collator of a task, which pads inputs and labels as ever, with the states of the rows added to the batch.

    The batch gains `layer_states`: `states` `(N, tokens, d)` without padding, the layers ascending, and `positions`
    `(tokens,)`, the place of each token in the padded batch, counted along rows. A model with an attached fusion takes
    them instead of running its blocks.

    Args:
        collator: What would collate the rows without a cache.
        dtype: Of the states; None means float32 on a machine without GPU, else as stored (the model converts).
        labelled_only: Leave out positions whose label is -100. Loss and gradients of a token head stay the same, with less
            arithmetic; its logits at the positions left out mean nothing. Not for fusions or heads that mix positions.
    """

    def __init__(
        self, collator: Callable[[list[Any]], Any], dtype: torch.dtype | None = None, labelled_only: bool = False
    ) -> None:
        self.collator = collator
        self.dtype = torch.float32 if dtype is None and not torch.cuda.is_available() else dtype
        self.labelled_only = labelled_only

    def __call__(self, rows: Sequence[CachedRow]) -> dict[str, Any]:
        """Collates rows of a `CachedDataset`.

        Raises:
            ValueError: If the task's collator makes rows shorter or longer.
        """
        batch = self.collator([dict(row.data) for row in rows])
        source, numbers = rows[0].source, [row.number for row in rows]
        total = sum(source.cache.length(n) for n in numbers)
        mask = batch.get("attention_mask")
        positions = torch.arange(total) if mask is None else mask.flatten().nonzero().squeeze(1)
        if len(positions) != total:
            if len({source.cache.length(n) for n in numbers}) > 1:
                raise ValueError(
                    f"The collated batch has {len(positions)} positions with a mask of 1, its cached states {total}. The "
                    "collator must not cut or lengthen rows: tokenise to the final length before extracting."
                )
            positions = torch.arange(total)  # images and sound: the mask, if any, counts something else
        keep = None
        if self.labelled_only:
            labelled = batch["labels"].flatten()[positions] != IGNORED
            keep = labelled.split([source.cache.length(n) for n in numbers])
            positions = positions[labelled]
        states = source.cache.read(numbers, source.layers, self.dtype, keep)
        return {**batch, "layer_states": {"states": states, "positions": positions}}
