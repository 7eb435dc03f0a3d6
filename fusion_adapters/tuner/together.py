"""The fusions of several adapters in one call of the backbone, which itself goes on as without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from ..fusions import Context
from ..fusions.concat import Concat
from ..fusions.pooling import Means
from .fusing import Fusing

TOGETHER = (
    64  # positions from which on one product for several fusions takes less time than one each, their copying included
)


class _OnceMeans(Means):
    """Means of whole texts that several fusions ask for, one after the other, of the same state."""

    _of: Tensor | None = None
    _found: Tensor

    def of_texts(self, state: Tensor) -> Tensor:
        if state is not self._of:
            self._of, self._found = state, super().of_texts(state)
        return self._found


@dataclass
class _Kept:
    """What the states so far have left.

    Attributes:
        own: Of each fusion, see `Fusion.absorb`; for one that wants all states at once, these by number.
        shared: Of each group whose products are taken together.
    """

    own: list[Any]
    shared: list[Any]


class FusingMany:
    """What `Fuse` asks for, by several adapters' fusions.

    Each takes in the states as in a call of its own, to the last bit, with two exceptions that agree up to rounding: the products of
    Concat fusions of the same layers are taken together, and a fusion of means, of which the head reads that of the whole text alone,
    computes with that one.

    Args:
        fusings: Those of the adapters.
        texts: For each, whether its head reads the mean of the whole text alone.
    """

    def __init__(self, fusings: Sequence[Fusing], texts: Sequence[bool]) -> None:
        self.fusings = fusings
        self.depth = max(fusing.depth for fusing in fusings)
        self.wanted = frozenset().union(*({*fusing.wanted, fusing.depth} for fusing in fusings))
        self.mixes_positions = any(fusing.mixes_positions for fusing in fusings)
        self._absorbs = [fusing.absorbs() for fusing in fusings]
        self._texts = [of_text and not fusing.fusion.mixes_positions for fusing, of_text in zip(fusings, texts, strict=True)]
        self._means: _OnceMeans | None = None
        self._fused: list[Tensor | None] = [None] * len(fusings)
        alike: dict[Any, list[int]] = {}
        for i, fusing in enumerate(fusings):
            fusion = fusing.fusion
            if self._absorbs[i] and isinstance(fusion, Concat) and fusion.pools == self._texts[i]:
                kind = (fusing.wanted, fusing.depth, fusion.norm, fusion.pools, fusion.weight.dtype, fusion.weight.device)
                alike.setdefault(kind, []).append(i)
        self._groups = [members for members in alike.values() if len(members) > 1]

    def results(self) -> list[Tensor]:
        """The fused state of each, `(B, T, d)`, after the call."""
        assert all(state is not None for state in self._fused)
        return self._fused  # type: ignore[return-value]

    def cuts_graph(self) -> bool:
        """See `Fuse`: nothing trains here."""
        return False

    def absorbs(self) -> bool:
        """See `Fuse`: the states are handed on one by one, and kept for those fusions that want all at once."""
        return True

    def absorb(self, kept: _Kept | None, layer: int, state: Tensor, context: Context) -> _Kept:
        """See `Fuse`; a fusion whose last block this is answers."""
        if kept is None:
            kept = _Kept([None] * len(self.fusings), [None] * len(self._groups))
        done: set[int] = set()
        for number, group in enumerate(self._groups):
            done.update(group)
            self._together(kept, number, layer, state, context)
        for i, fusing in enumerate(self.fusings):
            if i in done or layer not in (*fusing.wanted, fusing.depth):
                continue
            seen, own = self._seen(i, state, context)
            if layer in fusing.wanted and self._absorbs[i]:
                kept.own[i] = fusing.absorb(kept.own[i], layer, seen, own)
            elif layer in fusing.wanted:
                kept.own[i] = kept.own[i] or [None] * (fusing.depth + 1)
                kept.own[i][layer] = seen
            if layer == fusing.depth:
                self._finish(i, kept.own[i], state, context)
                kept.own[i] = None
        return kept

    def _together(self, kept: _Kept, number: int, layer: int, state: Tensor, context: Context) -> None:
        """`absorb` for a group."""
        group = self._groups[number]
        first, fusions = self.fusings[group[0]], [self.fusings[i].fusion for i in group]
        concats = cast(list[Concat], fusions)
        if layer in first.wanted:
            seen, _ = self._seen(group[0], state.to(concats[0].weight.device), context)
            kept.shared[number] = Concat.absorb_together(concats, kept.shared[number], concats[0].layers.index(layer), seen)
        if layer == first.depth:
            for i, own in zip(group, Concat.apart(concats, kept.shared[number]), strict=True):
                self._finish(i, own, state, context)
            kept.shared[number] = None

    def _finish(self, i: int, kept: Any, state: Tensor, context: Context) -> None:
        """A fusion answers, with the state of its last block."""
        fusing = self.fusings[i]
        last, own = self._seen(i, state, context)
        if self._absorbs[i]:
            fused = fusing.finish(kept, last, own)
        else:
            states: list[Tensor | None] = kept or [None] * (fusing.depth + 1)  # the latter of one that reads no state
            # a backbone spread over devices: the fusion sits where the last block computes
            states = [s if s is None or s.device == last.device else s.to(last.device) for s in states]
            fused = fusing(states, last, own)
        self._fused[i] = fused.expand(state.shape) if self._texts[i] else fused

    def _seen(self, i: int, state: Tensor, context: Context) -> tuple[Tensor, Context]:
        """A state as a fusion gets it, `(B, T, d)`, or `(B, 1, d)` for one of whole texts, and what it may know besides."""
        if not self._texts[i]:
            return state, context
        if self._means is None:
            self._means = _OnceMeans(context, state)
        return self._means.of_texts(state).unsqueeze(1), Context(causal=context.causal, means=True)

    def finish(self, kept: Any, last: Tensor, context: Context) -> Tensor:
        """See `Fuse`."""
        return last

    def __call__(self, states: Sequence[Tensor | None], last: Tensor, context: Context) -> Tensor:
        """See `Fuse`; not called, see `absorbs`."""
        raise RuntimeError("several adapters answer without gradients alone")
