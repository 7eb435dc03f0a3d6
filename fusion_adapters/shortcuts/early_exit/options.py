"""Where a pass may end early, and how sure a token must be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..maps import MAT

LATER, CAST = "later", "cast"


@dataclass(frozen=True)
class ExitOptions:
    """Where passes may end, and how sure a token must be.

    Attributes:
        layers: The layers whose states are cast and asked, ascending; 3 is the output of the third block. Each costs a look at the head:
            a few are better than all.
        threshold: `lambda` of `0.9 lambda + 0.1 exp(-4 t / N)`, which the difference between the two greatest probabilities must exceed:
            1.112 is never passed, below -0.112 always. `calibrate` finds it for an agreement.
        kind: The kind of shortcut to the last layer: `mat`, `fused`, `identity`, ...
        mean_length: `N`, in tokens; `calibrate` gives that of its rows.
        kv: Keys and values of blocks that did not run: `later`, computed when a later token goes deeper, in one batch with it, so that it
            sees the history that the full model would have made of the same tokens; `cast`, at once from cast states, which is
            approximate.
        short_list: The ids of frequent tokens, see `TokenCheck`; None to apply the whole head at each exit.

    Raises:
        ValueError: If an option cannot be.
    """

    layers: Sequence[int]
    threshold: float
    kind: str = MAT
    mean_length: float = 128.0
    kv: str = LATER
    short_list: Sequence[int] | None = None

    def __post_init__(self) -> None:
        found = [int(layer) for layer in self.layers]
        if not found or found != sorted(set(found)) or found[0] < 1:
            raise ValueError(
                f"layers={found}: give the layers to leave at in ascending order, each once, from 1 (output of the first block) on."
            )
        if not self.threshold == self.threshold or not self.mean_length > 0:
            raise ValueError(
                f"threshold={self.threshold}, mean_length={self.mean_length}: the threshold must be a number and the mean length above 0 "
                "(tokens). calibrate(...) gives both."
            )
        if self.kv not in (LATER, CAST):
            raise ValueError(f"kv={self.kv!r}: choose {LATER!r} (exact history) or {CAST!r} (from cast states).")
