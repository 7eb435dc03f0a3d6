"""What a call of a model brings along, and what Python's stack tells of the calls that are under way."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..fusions import Context

CACHE_NAMES = ("past_key_values", "cache_params")


def left_over(module: nn.Module, noted: list[Any]) -> int:
    """How many of the calls noted for a module, in one of its own, are over without a word.

    After a KeyboardInterrupt torch runs no hooks, also not those that run always. What is under way still stands in
    Python's stack, looked at only where something is noted: in a call within a call, and after an interrupt.
    """
    if not noted or torch.compiler.is_compiling():
        return 0
    running, python = 0, sys._getframe()
    while python is not None:
        running += python.f_code is nn.Module._call_impl.__code__ and python.f_locals.get("self") is module
        python = python.f_back  # type: ignore[assignment]
    return max(0, len(noted) + 1 - running) if running else 0  # the last of those that run is not noted yet


def wants_gradient(*inputs: Any) -> bool:
    """Whether one of the inputs is a tensor that requires a gradient."""
    return any(isinstance(value, Tensor) and value.requires_grad for value in inputs)


def with_block_inputs(context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Context:
    """Adds the inputs of the last block, without the KV cache, which belongs to the backbone's own blocks."""
    context.block_args = tuple(None if hasattr(a, "get_seq_length") else a for a in args[1:])
    context.block_kwargs = {k: v for k, v in kwargs.items() if k not in ("hidden_states", *CACHE_NAMES)}
    return context


def cached_positions(cache: Any) -> int:
    """How many positions a KV cache holds; 1 for a state-space model's cache that has seen some, it does not count."""
    if cache is None or not hasattr(cache, "get_seq_length"):
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:  # no attention layer in it
        return int(cache.has_previous_state())


def running_forwards(module: nn.Module) -> list[FrameType]:
    """Python's frames of the module's own `forward` that are under way in this thread, the innermost first."""
    found, python = [], sys._getframe()
    while python is not None:
        if python.f_code.co_name == "forward" and python.f_locals.get("self") is module:
            found.append(python)
        python = python.f_back  # type: ignore[assignment]
    return found
