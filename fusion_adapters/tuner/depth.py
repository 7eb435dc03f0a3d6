"""The weights over depth that a fusion gives a batch, for people to look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..fusions import FUSIONS
from .layer import fusion_layers


def depth_weights(model: nn.Module, *, stack: str | None = None, **inputs: Any) -> Tensor:
    """The weights over depth that the active fusion gives each token of a batch. Several threads may ask at once.

    Args:
        model: A model with an attached fusion.
        stack: `"encoder"` or `"decoder"`, for an adapter with a fusion in both; None takes the decoder's.
        **inputs: What the model is called with.

    Returns:
        float32 on the backbone's device, `(B, T, N)`, or `(B, T, H, N)` for a fusion with several heads; the `N` layers
        are those of the fusion, `fusion_layers`.

    Raises:
        ValueError: If no fusion is active, or the active one has no weights over depth.
    """
    layers = fusion_layers(model)
    if layers and layers[0].calls is not None:
        with layers[0].calls.held():  # the fusion that is looked at here is the one that is called
            active = [layer for layer in layers if layer.active_fusion is not None and stack in (None, layer.backbone.stack)]
            if active:
                layer = active[-1]  # the decoder comes last
                fusion = layer.active_fusion
                if fusion is None or not fusion.has_weights:
                    having = ", ".join(name for name, method in FUSIONS.items() if method.has_weights)
                    raise ValueError(f"{type(fusion).__name__} gives no weights over depth. Methods that do: {having}.")
                with layer.recorded() as found, torch.no_grad():
                    model(**inputs)
                return found[-1]
    raise ValueError(
        f"The model has no active fusion{f' in its {stack}' if stack else ''}: attach a FusionConfig by get_peft_model, "
        "or enable its adapter."
    )
