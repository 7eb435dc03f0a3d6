"""What the taps ask of the layer that fuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ..fusions import Context


class Fuse(Protocol):
    """Fuses the layer states of one call; the taps bring them and hand the result on.

    Attributes:
        wanted: The numbers of the layer states that it will read.
        mixes_positions: Whether the result at a position depends on others, so that it must know about a KV cache.
        depth: The number of the block whose output the result replaces, `L` or less; in what follows `z_L` is its state.
    """

    wanted: frozenset[int]
    mixes_positions: bool
    depth: int

    def cuts_graph(self) -> bool:
        """Whether nothing below the fusion trains, so that states are kept without the graph behind them."""
        ...

    def absorbs(self) -> bool:
        """Whether `absorb` and `finish` may take the place of a call where no gradient is needed, see `Fusion.absorb`."""
        ...

    def absorb(self, kept: Any, layer: int, state: Tensor, context: Context) -> Any:
        """Takes in the state `(B, T, d)` of a layer; `kept` is what the call for the layer before returned, at first None."""

    def finish(self, kept: Any, last: Tensor, context: Context) -> Tensor:
        """The fused state `(B, T, d)` from what was absorbed and from `z_L`."""
        ...

    def __call__(self, states: Sequence[Tensor | None], last: Tensor, context: Context) -> Tensor:
        """The fused state `(B, T, d)` from the states by layer number, None where not wanted, and from `z_L`."""
        ...


class Fuses(Protocol):
    """Knows what fuses in a call that begins now; a switch of adapters later does not change it for that call."""

    def begin(self) -> Fuse | None:
        """What fuses in this call; None to leave the backbone alone."""
        ...
