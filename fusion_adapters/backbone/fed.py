"""Calls of a backbone with layer states from elsewhere: what its blocks answer is given, and of the blocks themselves nothing is left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .blocks import Backbone
from .families import state_in, state_out, with_state_in, with_state_out


@dataclass
class Watched:
    """What the blocks of a backbone were given and answered in one call.

    Attributes:
        states: The layer states `(B, T, d)` by number, `z_0 .. z_L`, as the blocks gave them: `z_L` is not yet fused.
        forms: For each block how it answers, without the state.
    """

    states: dict[int, Tensor] = field(default_factory=dict)
    forms: list[Any] = field(default_factory=list)


@contextlib.contextmanager
def watched(backbone: Backbone) -> Iterator[Watched]:
    """Keeps what the blocks answer in the one call that is made in the body, of the model or of the backbone."""
    found = Watched()

    def begin(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.states.setdefault(0, state_in(args, kwargs))

    def end(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if len(found.forms) < backbone.num_layers:
            found.forms.append(with_state_out(output, None))
            found.states[len(found.forms)] = state_out(output)

    handles = [backbone.blocks[0].register_forward_pre_hook(begin, with_kwargs=True)]
    # before the taps', which put the fused state in the place of the last
    handles += [block.register_forward_hook(end, prepend=True) for block in dict.fromkeys(backbone.blocks)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def fed(backbone: Backbone, forms: list[Any], states: Mapping[int, Tensor]) -> Iterator[None]:
    """In the body, the blocks answer one call with given states, and have neither parameters nor parts.

    What reads their answers (the taps, and with them the fusion), and what runs before and after them, does so as always. Other
    threads must not call the model meanwhile.

    Args:
        backbone: The backbone, those of its blocks that run.
        forms: How each answers, see `Watched`.
        states: Layer states `(B, T, d)` by number, that of the last block among them. A block whose state is not given hands on
            its input.
    """
    reached = 0

    def begin(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return with_state_in(args, kwargs, states[0]) if reached == 0 and 0 in states else None

    def answers(forward: Callable[..., Any]) -> Callable[..., Any]:
        def answer(*args: Any, **kwargs: Any) -> Any:
            nonlocal reached
            reached += 1
            if reached > backbone.num_layers:  # a block that runs several times, above the fusion's depth
                return forward(*args, **kwargs)
            return with_state_out(forms[reached - 1], states.get(reached, state_in(args, kwargs)))

        return answer

    blocks = list(dict.fromkeys(backbone.blocks))
    before = [(block.__dict__.get("forward"), block._modules, block._parameters, block._buffers) for block in blocks]
    handle = backbone.blocks[0].register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
    try:
        for block in blocks:
            block.forward = answers(block.forward)  # type: ignore[method-assign]
            block._modules, block._parameters, block._buffers = {}, {}, {}
        yield
    finally:
        handle.remove()
        for block, (forward, modules, parameters, buffers) in zip(blocks, before, strict=True):
            block._modules, block._parameters, block._buffers = modules, parameters, buffers
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward
