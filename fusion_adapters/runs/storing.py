"""Adapters that are stored in 16 bits: trained in float32, rounded before they are scored, and float32 again when loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


def rounded(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives what trains the values that it has in another dtype; it stays in its own."""
    with torch.no_grad():
        for parameter in _trained(model):
            parameter.copy_(parameter.to(dtype))


@contextlib.contextmanager
def held_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """In the body, what trains is in another dtype, in which a save writes it."""
    own = [(parameter, parameter.data) for parameter in _trained(model) if parameter.dtype == torch.float32]
    for parameter, values in own:
        parameter.data = values.to(dtype)
    try:
        yield
    finally:
        for parameter, values in own:
            parameter.data = values


def _trained(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in model.parameters() if p.requires_grad)
