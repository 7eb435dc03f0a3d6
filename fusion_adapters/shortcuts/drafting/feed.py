"""What a drafter is trained from: rows of text, and their layer states in memory or on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...states import LayerStateCache, source_of
from ..stream import Choice, Collator, Rows, stream
from .drafter import Drafter
from .options import DrafterOptions


class RowStates:
    """Layer states of rows in memory, as float16, from one pass of the backbone.

    Args:
        model: The model.
        rows: Tokenised rows.
        collator: Pads a list of rows on the right.
        layers: The layers to keep.
        batch_size: Rows of one call.
        progress: Show a bar.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Rows,
        collator: Collator,
        layers: Sequence[int],
        batch_size: int = 8,
        progress: bool = True,
    ) -> None:
        self.layers = sorted(set(layers))
        self._found: dict[int, Tensor] = {}
        self._numbers = {tuple(row["input_ids"]): number for number, row in enumerate(rows)}
        chunks = stream(source_of(model), rows, self.layers, collator, Choice(), batch_size)
        for chunk in tqdm(
            chunks, total=-(-len(rows) // batch_size), desc="layer states", unit="batch", disable=not progress
        ):
            states = torch.stack([chunk.states[i] for i in self.layers]).to("cpu", torch.float16)  # (N, n, d)
            for number in chunk.rows.unique().tolist():
                self._found[number] = states[:, chunk.rows == number]

    def find(self, rows: Rows) -> list[int]:
        """The numbers of rows, by their tokens.

        Raises:
            ValueError: If the states of a row are not here.
        """
        found = [self._numbers.get(tuple(row["input_ids"])) for row in rows]
        if None in found:
            raise ValueError(
                f"The states of {found.count(None)} of {len(rows)} rows are not here. Give the rows that they were made of."
            )
        return [number for number in found if number is not None]

    def read(self, numbers: Sequence[int], layers: Sequence[int]) -> Tensor:
        """States of rows one after the other, `(N, tokens, d)`."""
        columns = [self.layers.index(i) for i in layers]
        return torch.cat([self._found[i][columns] for i in numbers], dim=1)


States = LayerStateCache | RowStates


@dataclass
class Batch:
    """States, tokens and what the backbone says, of some rows, padded on the right.

    Attributes:
        states: `(B, T, d)` for each layer of the drafter.
        tokens: int64 `(B, T)`.
        last: `(B, T, d)`, of the last layer.
        real: bool `(B, T)`.
    """

    states: list[Tensor]
    tokens: Tensor
    last: Tensor
    real: Tensor


class Feed:
    """Batches in the order of a seed."""

    def __init__(self, drafter: Drafter, rows: Rows, states: States, options: DrafterOptions) -> None:
        self.drafter, self.states, self.options = drafter, states, options
        self.tokens = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
        self.counts = [len(t) for t in self.tokens]
        self.numbers = states.find(rows)
        self.layers = sorted({*drafter.layers, drafter.backbone.num_layers})

    def batches(self) -> list[list[int]]:
        """Rows of each step, all passes one after the other."""
        whole = math.ceil(self.options.epochs)
        drawn = torch.Generator().manual_seed(self.options.seed)
        found = [batch for _ in range(whole) for batch in self.once(drawn)]
        return found[: round(len(found) * self.options.epochs / max(whole, 1))]

    def once(self, drawn: torch.Generator | None = None) -> list[list[int]]:
        """Rows of each step of one pass."""
        order = torch.randperm(len(self.tokens), generator=drawn or torch.Generator().manual_seed(0)).tolist()
        size = self.options.batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def read(self, batch: Sequence[int]) -> Batch:
        """The states of some rows."""
        device = self.drafter.backbone.device
        found = self.states.read([self.numbers[i] for i in batch], self.layers).to(device, torch.float32)  # (N, n, d)
        counts = [self.counts[i] for i in batch]
        split = found.split(counts, dim=1)
        padded = torch.stack([F.pad(s, (0, 0, 0, max(counts) - s.shape[1])) for s in split], dim=1)  # (N, B, T, d)
        tokens = torch.stack([F.pad(self.tokens[i], (0, max(counts) - self.counts[i])) for i in batch]).to(device)
        real = torch.arange(max(counts), device=device) < torch.tensor(counts, device=device)[:, None]
        return Batch([padded[self.layers.index(i)] for i in self.drafter.layers], tokens, padded[-1], real)
