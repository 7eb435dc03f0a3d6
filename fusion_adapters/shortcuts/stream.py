"""Layer states of many rows, batch by batch, at the positions that shortcuts are fitted to and judged by."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.blocks import Backbone
from ..backbone.families import state_in, state_out
from ..backbone.record import recorded, run
from ..states import Source

POSITIONS = ("all", "one", "labelled")
IGNORED = -100  # a label that is none, as everywhere in transformers
Rows = Sequence[Mapping[str, Any]]
Collator = Callable[[list[Any]], Any]
TakePart = Callable[[str, Tensor, Tensor], None]  # name, what went in and what came out


@dataclass
class Chunk:
    """States of the chosen positions of one batch.

    Attributes:
        states: `(n, d)` by layer.
        rows: int64 `(n,)`, the number of each position's row among the rows.
        places: int64 `(n,)`, its place in that row, from 0.
        inputs: What the backbone was given, padded.
    """

    states: dict[int, Tensor]
    rows: Tensor
    places: Tensor
    inputs: dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """Which positions of a row count.

    Attributes:
        positions: `all`; `one` of each row, drawn at random, as in the paper; or those that are `labelled` (the hidden pieces of a masked
            language model).
        skip: How many at the beginning of each row are left out. The first positions of a causal model hold massive activations, a
            thousand times the size of others and the same in every text, which would rule the squares.
        seed: Of the draw.

    Raises:
        ValueError: If there are no such positions.
    """

    positions: str = "all"
    skip: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise ValueError(f"positions={self.positions!r}: choose one of {', '.join(POSITIONS)}.")
        if self.skip < 0:
            raise ValueError(f"skip={self.skip}: leave out none (0) or some of the first positions of a row.")

    def of(self, row: Mapping[str, Any], number: int) -> list[int]:
        """The places in a row without padding, ascending."""
        mask, labels = row.get("attention_mask"), row.get("labels")
        length = len(row["input_ids"]) if mask is None else int(torch.as_tensor(mask).sum())
        if self.positions == "labelled":
            if labels is None:
                raise ValueError("positions='labelled', and a row has no labels. Give rows with labels, or positions='all'.")
            return [i for i, label in enumerate(labels) if int(label) != IGNORED and i >= self.skip]
        places = list(range(self.skip, length))
        if self.positions == "one" and places:
            drawn = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            places = [places[int(torch.randint(len(places), (), generator=drawn))]]
        return places


@dataclass
class Places:
    """The chosen positions of one padded batch.

    Attributes:
        rows: int64 `(n,)`, see `Chunk`.
        line: int64 `(n,)`, the row in the batch.
        where: int64 `(n,)`, the place in that row.
    """

    rows: Tensor
    line: Tensor
    where: Tensor

    def of(self, state: Tensor) -> Tensor:
        """The values at these positions, `(n, d)`, of all of the batch, `(B, T, d)`."""
        return state[self.line.to(state.device), self.where.to(state.device)]


def places_of(rows: Rows, batch: Sequence[int], choice: Choice, device: torch.device) -> Places:
    """The chosen positions of the rows of a batch."""
    places = [choice.of(rows[i], i) for i in batch]
    count = torch.tensor([len(found) for found in places])
    where = torch.tensor([place for found in places for place in found], dtype=torch.long, device=device)
    line = torch.repeat_interleave(torch.arange(len(batch)), count).to(device)  # (n,)
    return Places(torch.repeat_interleave(torch.tensor(batch), count), line, where)


def batches_of(rows: Rows, batch_size: int) -> list[list[int]]:
    """Numbers of rows, in batches of like length, the longest first; the same for the same rows."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]["input_ids"]), i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def stream(
    source: Source,
    rows: Rows,
    layers: Sequence[int],
    collator: Collator,
    choice: Choice,
    batch_size: int = 8,
    first: int = 0,
    parts: Mapping[str, nn.Module] | None = None,
    take_part: TakePart | None = None,
) -> Iterator[Chunk]:
    """Yields the layer states of rows, a batch at a time, from batch `first` on.

    The backbone runs in evaluation mode, without a graph and without a fusion that is attached. The longest rows come first, so what
    does not fit fails at once.

    What goes into `parts` of the blocks and comes out of them is handed to `take_part` while the backbone runs, `(n, d)` at the same
    positions: of all parts together it would be many times the states.
    """
    backbone = source.backbone
    for batch in batches_of(rows, batch_size)[first:]:
        inputs = model_inputs(backbone, [rows[i] for i in batch], collator)
        places = places_of(rows, batch, choice, backbone.device)
        states: dict[int, Tensor] = {}

        def take(layer: int, state: Tensor, places: Places = places, states: dict[int, Tensor] = states) -> None:
            states[layer] = places.of(state)  # (n, d)

        with source.quiet(), recorded(backbone, layers, take), _listening(parts or {}, places, take_part):
            run(backbone, inputs)
        yield Chunk(states, places.rows, places.where.cpu(), inputs)


@contextlib.contextmanager
def _listening(parts: Mapping[str, nn.Module], places: Places, take: TakePart | None) -> Iterator[None]:
    """Hands the inputs and outputs of parts to `take`."""

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if take is not None:
            take(name, places.of(state_in(args, kwargs)), places.of(state_out(output)))

    handles = [m.register_forward_hook(functools.partial(hook, name), with_kwargs=True) for name, m in parts.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def model_inputs(backbone: Backbone, rows: Rows, collator: Collator) -> dict[str, Any]:
    """A padded batch as the backbone takes it.

    Raises:
        ValueError: If the collator pads on the left.
    """
    known = inspect.signature(backbone.base.forward).parameters
    batch = collator([{k: v for k, v in row.items() if k in known or k == "attention_mask"} for row in rows])
    inputs = {n: v.to(backbone.device) for n, v in dict(batch).items() if n in known and isinstance(v, Tensor)}
    mask = inputs.get("attention_mask")
    if mask is not None and not bool((mask[:, :-1] >= mask[:, 1:]).all()):
        raise ValueError(
            "The collator pads on the left, where shortcuts count positions from the left. Set "
            "tokenizer.padding_side = 'right'."
        )
    if "use_cache" in known:
        return {**inputs, "use_cache": False}
    return inputs


def frequent_tokens(rows: Rows, count: int) -> tuple[int, ...]:
    """The ids of the `count` most frequent tokens of tokenised rows, ascending; all there are, where they are fewer."""
    found: dict[int, int] = {}
    for row in rows:
        ids, counts = torch.as_tensor(row["input_ids"]).unique(return_counts=True)
        for i, n in zip(ids.tolist(), counts.tolist(), strict=True):
            found[i] = found.get(i, 0) + n
    return tuple(sorted(sorted(found, key=lambda i: (-found[i], i))[:count]))
