"""Choosing an adapter for the calling thread alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from .layer import fusion_layers


@contextlib.contextmanager
def use_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """In the body, calls of this thread use one adapter's fusion and head; other threads see nothing of it.

    `model.set_adapter` and `model.disable_adapter()` are peft's and change the model for all threads. This changes nothing, and
    so costs nothing: no gradients are switched either, so it is for inference.

    Args:
        model: A model with attached fusions.
        name: The adapter; None for the model without adapters.

    Raises:
        ValueError: If the model has no such adapter, or LoRA layers, which look by themselves who is active.
    """
    layers = fusion_layers(model)
    known = sorted({own for layer in layers for own in layer.fusions})
    if not known or name not in (None, *known):
        raise ValueError(f"The model has no adapter {name!r} with a fusion; it has {', '.join(map(repr, known)) or 'none'}.")
    calls = layers[0].calls
    assert calls is not None
    if calls.layerwise:
        raise ValueError(
            "use_adapter chooses fusions and heads for one thread. The model has LoRA layers (or trainable tokens), which look by "
            "themselves who is active in the whole model. Call model.set_adapter or model.disable_adapter() and the model under "
            "one lock, or give each thread a model of its own."
        )
    with calls.using(() if name is None else (name,)):
        yield
