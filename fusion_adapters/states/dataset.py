"""Rows with their cached states, for `Trainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BatchEncoding

from ..backbone.replay import LayerStates
from .key import check_rows
from .means import text_length
from .seen import check_seen

PACKED_LENGTH = 32  # positions of a packed row, within what any model allows
IGNORED = nn.CrossEntropyLoss().ignore_index  # -100, the label of positions without one


class RowStates(Protocol):
    """What a dataset asks of a cache, see `LayerStateCache`."""

    folder: Path
    manifest: dict[str, Any]
    columns: frozenset[str] | None

    def find(self, rows: Sequence[Mapping[str, Any]]) -> list[int]:
        """The numbers of rows in the cache."""

    def length(self, number: int) -> int:
        """The number of positions of a row."""

    def read(
        self,
        numbers: Sequence[int],
        layers: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        keep: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """States of rows, one after the other, `(N, tokens, d)`."""


class CachedRow(BatchEncoding):
    """The inputs and labels of a row, and where its states are.

    No `dict`, so that `Trainer` does not take columns out of it; a `BatchEncoding`, so that it can be sorted by length.
    """

    def __init__(self, source: CachedDataset, index: int) -> None:
        row, kept = source.rows[index], source.columns
        super().__init__({n: v for n, v in row.items() if (not _is_text(v) if kept is None else n in kept)})
        self.source = source
        self.index = index

    @property
    def number(self) -> int:
        """The number of the row in the cache."""
        return self.source.numbers[self.index]


class CachedDataset(Dataset[CachedRow]):
    """Rows with their cached states; a batch's states are read when it is collated.

    Goes into `Trainer` as `train_dataset` or `eval_dataset`, with `cache.collator(...)` as `data_collator`. With
    `dataloader_num_workers` set, the workers read ahead.

    Args:
        cache: The cache.
        rows: Tokenised rows (`input_ids`, `attention_mask`, `labels`, ...), any part of those that were cached and in any
            order; labels may be others than when the states were extracted.
        layers: The layer states to read: those of the fusion, and `L`.
        remove_unused_columns: As of `TrainingArguments`: the collator gets the columns that the model takes, and labels. A cache that
            was opened without a model leaves out columns of text alone.
        positions: `"all"`; or for token classification by a fusion and a head that do not mix positions, `"labelled"`
            (no states for positions whose label is -100: the same loss and gradients with less arithmetic; logits there mean
            nothing), or `"packed"` (for training: the labelled positions of a batch moved together into rows of 32, so
            that embeddings, dropout, head and loss have as little to do as the fusion).

    Raises:
        StaleCacheError: If a row is not in the cache.
        ValueError: If `positions` is none of the three, or the cache holds means over positions.
    """

    def __init__(
        self,
        cache: RowStates,
        rows: Sequence[Mapping[str, Any]],
        layers: Sequence[int],
        positions: str = "all",
        remove_unused_columns: bool = True,
    ) -> None:
        check_rows(rows)
        if positions not in ("all", "labelled", "packed"):
            raise ValueError(f"positions={positions!r} is unknown. Use 'all', 'labelled' or 'packed'.")
        if positions != "all" and cache.manifest.get("means"):
            raise ValueError(
                f"positions={positions!r}: the cache {str(cache.folder)!r} holds a mean over the positions of each text, and none of these "
                "positions. Leave positions out."
            )
        self.cache = cache
        self.rows = rows
        self.layers = list(layers)
        self.positions = positions
        self.columns = cache.columns if remove_unused_columns else frozenset(rows[0] if len(rows) else ())
        self.numbers = cache.find(rows)
        self._labelled: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> CachedRow:
        return CachedRow(self, i)

    def labelled(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Which of a row's cached positions have a label, int64, and its inputs and labels there; kept for later epochs."""
        if i not in self._labelled:
            row = self.rows[i]
            labels = torch.as_tensor(row["labels"])
            # rows that were padded before they were cached have no states for their padding
            real = (
                torch.as_tensor(row["attention_mask"]).bool() if "attention_mask" in row else torch.ones_like(labels).bool()
            )
            keep = (labels[real] != IGNORED).nonzero().squeeze(1)
            names = [n for n in ("labels", *self.cache.manifest["inputs"]) if n in row]
            self._labelled[i] = keep, {n: torch.as_tensor(row[n])[real][keep] for n in names}
        return self._labelled[i]


class CachedCollator:
    """The collator of a task, which pads inputs and labels as ever, with the states of the rows added to the batch.

    The batch gains `layer_states`, see `LayerStates`. A model with an attached fusion takes them instead of running its
    blocks.

    Args:
        collator: What would collate the rows without a cache.
        dtype: Of the states; None means float32 on a machine without GPU, else as stored (the model converts).
    """

    def __init__(self, collator: Callable[[list[Any]], Any], dtype: torch.dtype | None = None) -> None:
        self.collator = collator
        self.dtype = torch.float32 if dtype is None and not torch.cuda.is_available() else dtype

    def __call__(self, rows: Sequence[CachedRow]) -> dict[str, Any]:
        """Collates rows of a `CachedDataset`.

        Raises:
            ValueError: If the task's collator makes rows shorter or longer, or the rows come from datasets that do not go
                together.
        """
        source, numbers = _common_source(rows), [row.number for row in rows]
        if source.positions == "packed":
            return self._packed(source, rows)
        given = [dict(row.data) for row in rows]
        batch = self.collator([dict(row) for row in given])
        manifest = source.cache.manifest
        check_seen(batch, given, manifest["inputs"], manifest["known_inputs"])
        means = manifest.get("means")
        lengths = [text_length(row) for row in given] if means else [source.cache.length(n) for n in numbers]
        positions = _places(batch, lengths)
        if means:  # each stands in the place of its text's last token
            positions = positions[torch.tensor(lengths).cumsum(0) - 1]
        keep = None
        if source.positions == "labelled":
            labelled = batch["labels"].flatten()[positions] != IGNORED
            keep = [row.nonzero().squeeze(1) for row in labelled.split(lengths)]
            positions = positions[labelled]
        states = source.cache.read(numbers, source.layers, self.dtype, keep)
        return {**batch, "layer_states": _described(source, states, positions)}

    def _packed(self, source: CachedDataset, rows: Sequence[CachedRow]) -> dict[str, Any]:
        kept = [row.source.labelled(row.index) for row in rows]
        states = source.cache.read([row.number for row in rows], source.layers, self.dtype, [keep for keep, _ in kept])
        tokens = states.shape[1]
        height = max(1, -(-tokens // PACKED_LENGTH))
        batch = {}
        for name in kept[0][1]:
            packed = torch.full((height * PACKED_LENGTH,), IGNORED if name == "labels" else 0)
            packed[:tokens] = torch.cat([inputs[name] for _, inputs in kept])
            batch[name] = packed.view(height, PACKED_LENGTH)
        return {**batch, "layer_states": _described(source, states, torch.arange(tokens))}


def _is_text(value: Any) -> bool:
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, str)


def _described(source: CachedDataset, states: Tensor, positions: Tensor) -> LayerStates:
    # no tensors: comparing those would wait for the device at every step
    return {
        "states": states,
        "positions": positions,
        "layers": tuple(source.layers),
        "kept": "means" if source.cache.manifest.get("means") else source.positions,
        "adapters": source.cache.manifest["key"]["adapters"],
    }


def _places(batch: Mapping[str, Any], lengths: Sequence[int]) -> Tensor:
    """The places of cached states in a padded batch, counted along rows, `(tokens,)`.

    Raises:
        ValueError: If the batch has more or fewer positions than the rows have states.
    """
    mask, count = batch.get("attention_mask"), sum(lengths)
    text = "input_ids" in batch
    if text and mask is None:
        mask = torch.ones_like(batch["input_ids"])
    if mask is not None:
        places = mask.flatten().nonzero().squeeze(1)
        if len(places) == count and (not text or mask.flatten(1).sum(1).tolist() == [*lengths]):
            return places
    if not text and len(set(lengths)) == 1:  # images and sound: the mask, if any, counts something else
        return torch.arange(count)
    found = "an unknown number of positions" if mask is None else f"{len(places)} positions"
    marked = " with a mask of 1" if "attention_mask" in batch else ", none of them masked,"
    raise ValueError(
        f"The collated batch has {found}{marked} and its rows have {count} cached states ({min(lengths)} to {max(lengths)} a "
        "row). Give a collator that makes an attention_mask where it pads, and does not cut or lengthen rows: tokenise to "
        "the final length before extracting."
    )


def _common_source(rows: Sequence[CachedRow]) -> CachedDataset:
    """A dataset that says for all rows how their states are read; rows of several may be joined (ConcatDataset).

    Raises:
        ValueError: If the datasets differ in cache, layers or positions.
    """
    sources = {id(row.source): row.source for row in rows}
    if len(sources) > 1:
        kinds = {f"cache {str(s.cache.folder)!r}, layers {s.layers}, positions {s.positions!r}" for s in sources.values()}
        if len(kinds) > 1:
            raise ValueError(
                f"A batch has rows of {len(kinds)} cached datasets that do not go together ({'; '.join(sorted(kinds))}). Extract "
                "the rows of all of them into one folder, and take every dataset from that cache with the same positions."
            )
    return rows[0].source
