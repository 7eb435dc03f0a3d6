"""Reads the layer states of calls of a backbone without a fusion."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from .blocks import Backbone
from .families import state_in, state_out


@contextlib.contextmanager
def recorded(backbone: Backbone, layers: Sequence[int], take: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Hands the layer states of the calls in the body to `take`, with the layer's number, as the blocks reach them.

    Each is `(B, T, d)`; a state that is not kept in `take` is gone when the next block is through. Calls of other threads are left
    alone. Make the calls by `run`.
    """
    wanted, count, thread = set(layers), 0, threading.get_ident()

    # torch notes that a hook takes keyword arguments after it has the hook: a call of another thread in between brings none
    def begin(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        nonlocal count
        if threading.get_ident() != thread or kwargs is None:
            return
        if count in (0, backbone.num_layers):
            count = 0
            if 0 in wanted:
                take(0, state_in(args, kwargs))

    def end(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal count
        if threading.get_ident() != thread:
            return
        count += 1
        if count in wanted:
            take(count, state_out(output))
        if count == backbone.num_layers and backbone.above:
            raise _ReachedError

    handles = [backbone.blocks[0].register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [block.register_forward_hook(end) for block in dict.fromkeys(backbone.blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _ReachedError(Exception):
    """Ends a call of a backbone at the last of its blocks that run, see `Backbone.lower`."""


def run(backbone: Backbone, inputs: dict[str, Any]) -> None:
    """Calls a backbone within `recorded`; blocks that do not run, and what comes after them, are left out."""
    with contextlib.suppress(_ReachedError):
        backbone.base(**inputs)
