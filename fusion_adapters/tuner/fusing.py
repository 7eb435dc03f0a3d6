"""The fusion of one call: chosen when the call begins, and the same to its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..fusions import Context, Fusion
from ..fusions.pooling import Means


@dataclass(eq=False)
class Fusing:
    """What `Fuse` asks for, by one adapter's fusion.

    Attributes:
        layer: The `FusionLayer` that holds the fusion, through which it is called.
        fusion: The fusion.
        wanted: The numbers of the layer states that it reads.
        mixes_positions: Whether its result at a position depends on others.
        depth: The number of the block whose output it replaces.
        recording: Where its weights over depth go; None if nobody asked for them.
        means: Of a fusion that pools and absorbs, what takes the means of this call's states; None before the first.
    """

    layer: Any
    fusion: Fusion
    wanted: frozenset[int]
    mixes_positions: bool
    depth: int
    recording: list[Tensor] | None = None
    means: Means | None = None

    def cuts_graph(self) -> bool:
        """Whether nothing below the fusion trains, so that states are kept without the graph behind them."""
        # gradient checkpointing makes the embeddings' output require a gradient, which nothing would use here
        return bool(self.layer.training) and not self.layer.trains_states()

    def absorbs(self) -> bool:
        """Whether the fusion may take in the states one by one, see `Fusion.absorb`: then no call is seen.

        A hook, a wrapper or a compiled form of the fusion waits for the call, and the weights over depth come from it.
        """
        if self.recording is not None or not getattr(self.fusion, "absorbs", False):
            return False
        return not any(
            m._forward_hooks or m._forward_pre_hooks or m._compiled_call_impl is not None or "forward" in m.__dict__
            for m in (self.layer, self.fusion)
        )

    def absorb(self, kept: Any, layer: int, state: Tensor, context: Context) -> Any:
        """Takes in the state of a layer, see `Fusion.absorb`."""
        fusion: Any = self.fusion
        # a backbone spread over devices: the fusion sits where the last block computes
        state = state.to(next(fusion.parameters()).device)
        return fusion.absorb(kept, fusion.layers.index(layer), self.pooled(state, context))

    def finish(self, kept: Any, last: Tensor, context: Context) -> Tensor:
        """The fused state from what was absorbed, see `Fusion.finish`."""
        fusion: Any = self.fusion
        return fusion.finish(kept, self.pooled(last, context))

    def pooled(self, state: Tensor, context: Context) -> Tensor:
        """A state as the fusion reads it, see `Fusion.pools`; the means of one do not wait for the others."""
        if not self.fusion.pools or context.means:
            return state
        if self.means is None:
            self.means = Means(context, state)
        return self.means(state)

    def __call__(self, states: Sequence[Tensor | None], last: Tensor, context: Context) -> Tensor:
        """The fused state `(B, T, d)`, by the layer's own call."""
        fused: Tensor = self.layer(states, last, context, self.fusion, self.recording)
        return fused
