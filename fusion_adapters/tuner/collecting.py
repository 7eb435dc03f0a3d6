"""The layer states of a text that is being written, collected pass by pass, and the fusions that take them in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from ..fusions import Context
from ..fusions.pooling import RunningMeans
from .fusing import Fusing
from .together import FusingMany

# So many positions wait, over all texts of a batch, until the fusions read them together: one at a time they take up to fifteen times
# as long, because each reads all weights of a fusion and calls all its operations.
PIECE = 128


class Judge:
    """One adapter's fusion over texts that come in pieces.

    Attributes:
        name: The adapter's name.
        layers: The numbers of the layer states that it takes.
        parts: The fused states so far, `(B, n, d)` each.
        read: How many positions are in them.
        taken: How many of the collector's waiting passes it has read already.
    """

    def __init__(self, name: str, fusing: Fusing) -> None:
        self.name = name
        self.layers = frozenset({*fusing.wanted, fusing.depth})
        self.parts: list[Tensor] = []
        self.read = 0
        self.taken = 0
        self._fusing = fusing
        self._means = RunningMeans() if fusing.fusion.pools else None
        self._context = Context(causal=True, means=fusing.fusion.pools)
        self._piece: FusingMany | None = None
        self._kept: Any = None

    def begin(self, real: Tensor) -> None:
        """A piece begins; `real` is bool, `(B, n)`: which of its positions are no padding."""
        self._piece, self._kept = FusingMany([self._fusing], [False]), None
        if self._means is not None:
            self._means.begin(real)

    def take(self, layer: int, state: Tensor) -> None:
        """Takes in the piece of a layer state, `(B, n, d)`; layers come in ascending order."""
        assert self._piece is not None
        if self._means is not None:
            state = self._means(layer, state)
        self._kept = self._piece.absorb(self._kept, layer, state, self._context)

    def end(self) -> None:
        """The piece is complete."""
        assert self._piece is not None
        (state,) = self._piece.results()
        self._piece = self._kept = None
        self._add(state)

    def take_all(self, states: Mapping[int, Tensor], real: Tensor) -> None:
        """Reads a piece whose states are all at hand, `(B, n, d)` by layer; `real` as above."""
        if self._means is not None:
            self._means.begin(real)
            states = {layer: self._means(layer, states[layer]) for layer in self.layers}
        depth, last = self._fusing.depth, states[self._fusing.depth]
        # a backbone spread over devices: the fusion sits where the last block computes
        listed = [states[i].to(last.device) if i in self._fusing.wanted else None for i in range(depth + 1)]
        self._add(self._fusing(listed, last, self._context))

    def newest(self, count: int) -> Tensor:
        """The fused states of the last positions that it has read, `(B, count, d)`."""
        parts: list[Tensor] = []
        while (missing := count - sum(part.shape[1] for part in parts)) > 0:
            parts.insert(0, self.parts[-1 - len(parts)][:, -missing:])
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _add(self, state: Tensor) -> None:
        self.parts.append(state)
        self.read += state.shape[1]

    def state(self) -> Tensor:
        """The fused states of all positions that it has read, `(B, T, d)`."""
        if len(self.parts) > 1:
            self.parts = [torch.cat(self.parts, 1)]
        return self.parts[0]


@dataclass
class _Pass:
    """What one pass of the backbone has left so far.

    Attributes:
        new: How many positions of it are new, its last ones.
        cut: Whether others come before them.
        live: Whether the fusions take the states in as they come, because they are many.
        states: Else the states by layer, `(B, new, d)`.
    """

    new: int
    cut: bool
    live: bool
    states: dict[int, Tensor] = field(default_factory=dict)


class Collector:
    """What `Fuse` asks for in all passes of one call of `generate`: the backbone goes on as without it.

    A prompt's states go into the fusions layer by layer, as they come. Those of the tokens that are written wait, as they are, until
    `PIECE` positions are there or a stopping criterion asks: a pass then costs hardly more than without judges.

    Args:
        judges: The adapters that judge.
        depth: The number of the backbone's blocks.
        real: Which positions of the prompts are no padding, bool, `(B, P)`; None if all are.

    Attributes:
        prompt: How many positions the prompts have, once they have been read.
        read: How many positions the backbone has read.
        done: For each token written, which texts ended with it, bool, `(B,)`.
    """

    mixes_positions = False

    def __init__(self, judges: Sequence[Judge], depth: int, real: Tensor | None) -> None:
        self.judges = {judge.name: judge for judge in judges}
        self.depth = depth
        self.wanted = frozenset().union(*(judge.layers for judge in judges))
        self.prompt: int | None = None
        self.read = 0
        self.done: list[Tensor] = []
        self._like = torch.empty(0)  # as many rows as there are texts, where the first layer state lies
        self._length = 0  # of the texts, what is written but not read included
        self._real = real
        self._waiting: list[_Pass] = []

    # the passes, see `Fuse`

    def cuts_graph(self) -> bool:
        """See `Fuse`: nothing trains here."""
        return False

    def absorbs(self) -> bool:
        """See `Fuse`."""
        return True

    def absorb(self, kept: Any, layer: int, state: Tensor, context: Context) -> Any:
        """See `Fuse`."""
        if kept is None:
            kept = self._begin(state)
        if not kept.new:
            return kept
        if kept.cut:
            state = state[:, -kept.new :]
        if kept.live:
            for judge in self.judges.values():
                if layer in judge.layers:
                    judge.take(layer, state)
        else:
            kept.states[layer] = state.clone() if kept.cut else state
        return kept

    def finish(self, kept: Any, last: Tensor, context: Context) -> Tensor:
        """See `Fuse`."""
        if kept.new:
            self.read += kept.new
            if kept.live:
                for judge in self.judges.values():
                    judge.end()
            else:
                self._waiting.append(kept)
                if len(last) * sum(step.new for step in self._waiting) >= PIECE:
                    self.catch_up(self.judges.values())
        return last

    def __call__(self, states: Sequence[Tensor | None], last: Tensor, context: Context) -> Tensor:
        """See `Fuse`; not called, see `absorbs`."""
        raise RuntimeError("adapters judge without gradients alone")

    def _begin(self, state: Tensor) -> _Pass:
        """A pass begins: of a prompt or a part of it, of the newest token, or without a KV cache of the whole text again."""
        rows, shown = state.shape[:2]
        self._like = state[:, :0]
        # a pass that reads nothing new is not that of the text: something else called the model in between
        new = shown if self.prompt is None else min(shown, self._length - self.read)
        live = rows * new >= PIECE
        if live:
            self.catch_up(self.judges.values())
            for judge in self.judges.values():
                judge.begin(self._mask(judge.read, new, state))
        return _Pass(new, new < shown, live)

    # what was collected

    def catch_up(self, judges: Iterable[Judge]) -> None:
        """Lets fusions read the positions that wait for them."""
        judges = list(judges)
        for taken in {judge.taken for judge in judges}:
            passes = self._waiting[taken:]
            behind = [judge for judge in judges if judge.taken == taken]
            if passes:
                self._take(behind, passes)
            for judge in behind:
                judge.taken = len(self._waiting)
        if all(judge.taken == len(self._waiting) for judge in self.judges.values()):
            self._waiting = []
            for judge in self.judges.values():
                judge.taken = 0

    def _take(self, judges: Sequence[Judge], passes: Sequence[_Pass]) -> None:
        first, new = passes[0].states, sum(step.new for step in passes)
        layers = frozenset().union(*(judge.layers for judge in judges))
        states = {i: torch.cat([step.states[i] for step in passes], 1) if len(passes) > 1 else first[i] for i in layers}
        for judge in judges:
            judge.take_all(states, self._mask(judge.read, new, self._like))

    def _mask(self, start: int, count: int, like: Tensor) -> Tensor:
        """Which of `count` positions from `start` on are no padding, bool, `(B, count)`; what is written is none."""
        real = torch.ones(len(like), count, dtype=torch.bool, device=like.device)
        if self._real is not None and start < self._real.shape[1]:
            known = self._real[:, start : start + count]
            real[:, : known.shape[1]] = known.to(like.device)
        return real

    def shown(self, length: int) -> Tensor:
        """The attention mask of the first `length` positions as the backbone gets it, int64, `(B, length)`."""
        return self._mask(0, length, self._like).long()

    def mask(self, length: int) -> Tensor:
        """Which of the first `length` positions belong to the texts, int64, `(B, length)`: neither padding nor after a text's end."""
        assert self.prompt is not None
        mask = self._mask(0, length, self._like)
        start = (
            self.prompt + 1
        )  # the first token written is always of its text; a later one, unless that had ended before it
        if length > start:
            done = torch.stack(self.done[: length - start]).to(mask.device, torch.int8)  # (tokens, B)
            mask[:, start:] &= done.cummax(0).values.T == 0
        return mask.long()


class Watched(StoppingCriteriaList):
    """The stopping criteria of one call of `generate`, which tell the collector how long the texts are and which have ended."""

    def __init__(self, criteria: Iterable[Any], collector: Collector) -> None:
        super().__init__(criteria)
        self.collector = collector

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Which texts end here, bool, `(B,)`."""
        collector = self.collector
        if collector.prompt is None:
            collector.prompt = collector.read
        collector._length = input_ids.shape[1]
        done = super().__call__(input_ids, scores, **kwargs)
        collector.done.append(done)
        return done
