"""Calls of a model that begin at any of its blocks and are watched before each: the ground under early exit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from ...backbone.blocks import Backbone
from ...backbone.calls import WrappedForward
from ...backbone.families import state_in, state_out, with_state_in, with_state_out

Own = Callable[[tuple[Any, ...], dict[str, Any]], Any]  # a block's own forward
Visit = Callable[[int, Own, tuple[Any, ...], dict[str, Any]], Tensor | None]


@dataclass
class _Call:
    """One call that is under way."""

    visit: Visit
    start: int
    state: Tensor | None
    reached: int = 0


class _Block(WrappedForward):
    """Takes the place of a block's `forward`, as long as somebody looks."""

    def __init__(self, block: nn.Module, segments: Segments) -> None:
        super().__init__(block, cast(Any, segments))  # not told of begin and end: it answers in the block's place
        self.segments = segments

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._own(args, kwargs) if self.opener is None else self.segments.answer(self._own, args, kwargs)


class Segments:
    """Runs the blocks of a model from a chosen one on, and asks before each whether it shall run.

    Embeddings, masks and positions before the blocks, norm and head after them are the model's own: the whole model is called, and the
    blocks below the chosen one hand on what they are given. While attached, other threads must not call the model.

    Args:
        backbone: The backbone, with all of its blocks.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.passes = 0  # blocks that ran, each call of one counted once
        self.below: Tensor | None = None  # in a visit, what the block below answered; None if none ran before in this call
        self._form: Any = None
        self._seen = False
        self._call: _Call | None = None

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """In the body, calls by `call` are possible; all others run as always."""
        wrapped = [_Block(block, self) for block in dict.fromkeys(self.backbone.blocks)]
        try:
            yield
        finally:
            self._call = None
            for block in wrapped:
                block.remove()

    def call(
        self, model: Callable[..., Any], inputs: dict[str, Any], visit: Visit, start: int = 0, state: Tensor | None = None
    ) -> Any:
        """Calls the model.

        Args:
            model: What is called; the blocks are inside of it.
            inputs: What it is given.
            visit: Called before each block that is to run with the number of the layer that the block reads, the block's own forward,
                and its arguments. It returns None for the block to run, or the state that stands for the block's answer; what it raises
                ends the call.
            start: The first block that runs. A call that starts at 0 must have come before.
            state: `(B, T, d)`, what that block is given; None for what the model gives it.
        """
        before, self._call, self.below = self._call, _Call(visit, start, state), None
        try:
            return model(**inputs)
        finally:
            self._call, self.below = before, None

    def answer(self, own: Own, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a block answers."""
        call = self._call
        if call is None:
            return self._run(own, args, kwargs)
        layer = call.reached
        call.reached += 1
        given = state_in(args, kwargs)
        if layer < call.start:
            return with_state_out(self._form, given)
        if layer == call.start and call.state is not None:
            args, kwargs = with_state_in(args, kwargs, call.state.to(given.device))
        answer = call.visit(layer, own, args, kwargs)
        return self._run(own, args, kwargs) if answer is None else with_state_out(self._form, answer)

    def state(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The layer state `(B, T, d)` that a block is about to read; some models change it on the way from the block below."""
        return state_in(args, kwargs) if self.below is None else self.below

    def forms(self) -> list[Any]:
        """How each block answers, without the state, see `fed`; known once a block has run."""
        return [self._form] * self.backbone.num_layers

    def _run(self, own: Own, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.passes += 1
        answer = own(args, kwargs)
        self.below = state_out(answer)
        if not self._seen:
            self._form, self._seen = with_state_out(answer, None), True
        return answer
