"""Reads the layer states of a bare backbone's calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ..backbone import Backbone


@contextlib.contextmanager
def recorded(backbone: Backbone, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Records layer states of the calls in the body; the dictionary holds those of the last call, `(B, T, d)` each."""
    wanted, states, count = set(layers), {}, 0

    def begin(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count
        if count in (0, backbone.num_layers):
            count = 0
            if 0 in wanted:
                states[0] = args[0] if args else kwargs["hidden_states"]

    def end(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal count
        count += 1
        if count in wanted:
            states[count] = output[0] if isinstance(output, tuple) else output

    handles = [backbone.blocks[0].register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [block.register_forward_hook(end) for block in dict.fromkeys(backbone.blocks)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
