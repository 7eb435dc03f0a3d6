"""Runs a bare backbone, and reads the layer states of its calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.blocks import Backbone
from ..tuner import fusion_layers


@contextlib.contextmanager
def recorded(backbone: Backbone, layers: Sequence[int], take: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Hands the layer states of the calls in the body to `take`, with the layer's number, as the blocks reach them.

    Each is `(B, T, d)`; a state that is not kept in `take` is gone when the next block is through.
    """
    wanted, count = set(layers), 0

    def begin(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count
        if count in (0, backbone.num_layers):
            count = 0
            if 0 in wanted:
                take(0, args[0] if args else kwargs["hidden_states"])

    def end(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal count
        count += 1
        if count in wanted:
            take(count, output[0] if isinstance(output, tuple) else output)

    handles = [backbone.blocks[0].register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [block.register_forward_hook(end) for block in dict.fromkeys(backbone.blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def only_backbone(model: nn.Module, backbone: Backbone) -> Iterator[None]:
    """For the time of the body: evaluation mode, no graph, no fusion."""
    modes = [(module, module.training) for module in backbone.base.modules()]
    switched = [layer for layer in fusion_layers(model) if not layer.disable_adapters]
    for layer in switched:
        layer.enable_adapters(False)
    backbone.base.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in switched:
            layer.enable_adapters(True)
        for module, mode in modes:
            module.training = mode
