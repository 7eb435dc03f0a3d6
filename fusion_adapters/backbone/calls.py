"""One call of the backbone: what it leaves in the taps, the wrapper that begins and ends it, and that of blocks that do not run."""

from __future__ import annotations

from dataclasses import dataclass
from types import CodeType, MethodType
from typing import Any, Protocol

from torch import Tensor, nn

from ..fusions import Context
from .fuse import Fuse
from .replay import FusedState, GivenStates

_ACCELERATES = "_old_forward"  # where accelerate keeps the `forward` that it wraps, for a backbone spread over devices


@dataclass
class Frame:
    """What one call of the backbone has left in the taps so far.

    Attributes:
        fuse: What fuses, from the call's begin to its end; None if no fusion is active.
        states: The states by layer number, `z_0 .. z_L`.
        context: What a fusion may know besides the states.
        reached: The number of the block that ran last.
        absorbs: Whether the fusion takes each state in as it comes, so that `kept` stands for the states so far.
        kept: See `Fusion.absorb`.
        given: States that stand for the blocks in this call.
        cuts: Whether the states are kept without the graph behind them.
        depth: The block whose output the fused state replaces; those above it pass on what they are given.
        answer: What that block answered, with the fused state; None until then, and where no block is above it.
        passed: The state that the last of these was given.
    """

    fuse: Fuse | None
    states: list[Tensor | None]
    context: Context
    reached: int = 0
    absorbs: bool = False
    kept: Any = None
    given: GivenStates | FusedState | None = None
    cuts: bool = False
    depth: int = 0
    answer: Any = None
    passed: Tensor | None = None


class Opener(Protocol):
    """What is told of the calls of a module."""

    def open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call begins; returns the arguments with which it goes on."""
        ...

    def close(self, answered: bool) -> None:
        """The innermost call ends, with an answer or with an exception."""


class WrappedForward:
    """Takes the place of a module's `forward`, and tells when a call begins and ends, however it ends.

    Hooks do not do: torch runs none where `forward` is called by name, as sentence-transformers does, and none after a
    KeyboardInterrupt. A class, so that the module can be copied and pickled. Where accelerate has wrapped the module, it
    stands inside of that wrapper, which accelerate makes anew when it places a model again.

    Args:
        module: The module.
        opener: What is told.
    """

    def __init__(self, module: nn.Module, opener: Opener) -> None:
        self.module = module
        self.opener: Opener | None = opener
        place = _ACCELERATES if _ACCELERATES in module.__dict__ else "forward"
        self.replaced: Any = module.__dict__.get(place)  # None for the method of the module's class
        setattr(module, place, self)

    @property
    def __wrapped__(self) -> Any:
        """The module's own `forward`, whose signature `inspect` then takes for ours."""
        return MethodType(type(self.module).forward, self.module) if self.replaced is None else self.replaced

    @property
    def __code__(self) -> CodeType:
        """For torch.export, which names its graph after the file and line."""
        return type(self).__call__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module's own `forward`, between `open` and `close`."""
        if self.opener is None:
            return self.__wrapped__(*args, **kwargs)
        args, kwargs = self.opener.open(args, kwargs)
        answered = False
        try:
            output = self._own(args, kwargs)
            answered = True
            return output
        finally:
            self.opener.close(answered)

    def _own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # not __wrapped__: torch.compile traces no MethodType that is made on the way
        if self.replaced is None:
            return type(self.module).forward(self.module, *args, **kwargs)
        return self.replaced(*args, **kwargs)

    def remove(self) -> None:
        """Puts the module's own `forward` back; where somebody has wrapped this one since, it stays and does nothing."""
        self.opener = None
        # accelerate may have come or gone since
        if self.module.__dict__.get(_ACCELERATES) is self:
            self.module._old_forward = self.__wrapped__
        elif self.module.__dict__.get("forward") is self:
            del self.module.forward
            if self.replaced is not None:
                self.module.forward = self.replaced


class Passer(Opener, Protocol):
    """What knows which blocks do not run."""

    def answer_above(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a block answers that does not run in this call; None if it runs."""
        ...


class SkippedForward(WrappedForward):
    """Takes the place of a block's `forward`, which does not run in calls whose fusion stops below it."""

    opener: Passer | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answers without computing, or calls the block's own `forward`."""
        answer = None if self.opener is None else self.opener.answer_above(args, kwargs)
        return self._own(args, kwargs) if answer is None else answer
