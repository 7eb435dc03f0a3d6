"""Runs a bare backbone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..backbone.blocks import Backbone
from ..tuner import fusion_layers


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
