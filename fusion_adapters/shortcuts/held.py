"""Layer states of chosen positions, held in memory: what maps that are trained by gradients read many times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..states import LayerStateCache, Source
from .stream import Choice, Collator, Rows, batches_of, stream

LARGEST = torch.finfo(torch.float16).max


@dataclass
class HeldStates:
    """States of `n` positions.

    Attributes:
        states: `(n, d)` by layer, on the CPU, float16; float32 where a value is too large for that.
        rows: int64 `(n,)`, the number of each position's row.
        dtype: That of the states as the backbone gives them.
    """

    states: dict[int, Tensor]
    rows: Tensor
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bytes(self) -> int:
        """Of memory."""
        return sum(t.numel() * t.element_size() for t in self.states.values())

    def at(self, numbers: Tensor, device: torch.device) -> dict[int, Tensor]:
        """The states of some positions, `(m, d)` by layer, float32."""
        return {layer: state[numbers].to(device, torch.float32) for layer, state in self.states.items()}


def held_bytes(rows: Rows, layers: Sequence[int], choice: Choice, hidden_size: int) -> tuple[int, int]:
    """The number of positions that count among rows, and the bytes that their states take in float16."""
    positions = sum(len(choice.of(row, number)) for number, row in enumerate(rows))
    return positions, positions * len(layers) * hidden_size * 2


def hold_states(
    source: Source,
    rows: Rows,
    layers: Sequence[int],
    collator: Collator,
    choice: Choice,
    *,
    batch_size: int = 8,
    cache: LayerStateCache | None = None,
    progress: bool = True,
) -> HeldStates:
    """Computes layer states of the chosen positions of rows once, or reads them from a cache, and keeps them.

    Args:
        source: Where they come from.
        rows: Tokenised rows.
        layers: Which.
        collator: Pads rows on the right.
        choice: Which positions.
        batch_size: Rows of one call.
        cache: States of these rows on disk; None computes them.
        progress: Show a bar, with the memory that is needed.

    Raises:
        ValueError: If a state is not finite, or no position counts, or the cache lacks layers or holds means of texts.
        StaleCacheError: If the cache is of another backbone, or lacks rows.
    """
    positions, size = held_bytes(rows, layers, choice, source.backbone.hidden_size)
    if not positions:
        raise ValueError("There is no position to hold states of. Give rows that are longer than what is left out of them.")
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    numbers: list[Tensor] = []
    dtype: torch.dtype = source.backbone.base.dtype  # type: ignore[assignment]
    if cache is not None:
        _check(cache, source, layers)
        found = cache.find(rows)
    batches = batches_of(rows, batch_size)
    chunks = iter(()) if cache is not None else stream(source, rows, layers, collator, choice, batch_size)
    title = f"layer states ({size / 2**20:,.0f} MiB)"
    for batch in tqdm(batches, desc=title, unit="batch", disable=not progress):
        if cache is None:
            chunk = next(chunks)
            states, of_rows = chunk.states, chunk.rows
        else:
            places = [choice.of(rows[i], i) for i in batch]
            read = cache.read([found[i] for i in batch], layers, keep=[torch.tensor(p, dtype=torch.long) for p in places])
            states = dict(zip(layers, read, strict=True))
            of_rows = torch.repeat_interleave(torch.tensor(batch), torch.tensor([len(p) for p in places]))
        for layer in layers:
            parts[layer].append(_narrowed(states[layer], layer))
        numbers.append(of_rows)
    held = {layer: torch.cat(some) for layer, some in parts.items()}
    return HeldStates(held, torch.cat(numbers), dtype)


def _narrowed(state: Tensor, layer: int) -> Tensor:
    if not bool(state.isfinite().all()):
        raise ValueError(
            f"States of layer {layer} hold values that are not finite (NaN or infinite), so no shortcut can be trained on them. Load "
            "the backbone in float32 or bfloat16 (float16 overflows in some models), and check its weights."
        )
    fits = state.numel() == 0 or float(state.abs().max()) <= LARGEST
    return state.to("cpu", torch.float16 if fits else torch.float32)


def _check(cache: LayerStateCache, source: Source, layers: Sequence[int]) -> None:
    cache.check(source)
    lacking = sorted(set(layers) - set(cache.layers))
    if lacking or cache.manifest.get("means"):
        raise ValueError(
            f"The cache {str(cache.folder)!r} holds "
            + (f"no states of layers {lacking}" if lacking else "means over texts, not the states of their positions")
            + f". Make one of the layers {list(layers)} with means=False, or leave the cache out."
        )
