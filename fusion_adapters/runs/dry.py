"""A training step without values: what it would hold in memory, from shapes alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """A context that counts the bytes of all tensors that are alive, and their highest number.

    A storage counts once, however many tensors look at it, from when an operation returns it until nothing holds it any more.
    torch's own tracker (`torch.distributed._tools.mem_tracker`) cannot take models with frozen parameters.

    Attributes:
        now: Bytes alive.
        peak: The highest of `now`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def see(self, tensor: Tensor) -> None:
        """Counts a tensor that was there before."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        known = self._alive.get(key)
        if known is not None and known() is storage:
            return

        def gone(_: Any) -> None:
            self.now -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return result


@dataclass(frozen=True)
class Footprint:
    """The bytes of a training step.

    Attributes:
        weights: Parameters and buffers of the model.
        optimizer: Gradients and the two moments of AdamW, of what trains.
        kept: What the forward pass leaves for the backward pass.
        peak: The highest of all that is alive at one time, in a step that is not the first.
    """

    weights: int
    optimizer: int
    kept: int
    peak: int


def footprint(model: nn.Module, batch: dict[str, Any], autocast: torch.dtype | None = None) -> Footprint:
    """What a step of AdamW holds, for a model and a batch of fake tensors.

    Args:
        model: The model, with what trains.
        batch: Its inputs, with labels.
        autocast: The dtype of mixed precision; None for none.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    live = LiveBytes()
    for tensor in (*model.parameters(), *model.buffers()):
        live.see(tensor)
    weights = live.now
    for tensor in tree_leaves(batch):
        if isinstance(tensor, Tensor):
            live.see(tensor)
    model.train()
    with live:
        _step(model, batch, autocast, optimizer)  # after it the optimizer has its moments
        moments = live.now
        live.peak = live.now
        kept = _step(model, batch, autocast, optimizer, lambda: live.now - moments)
    size = sum(p.numel() * p.element_size() for p in trained)
    return Footprint(weights, 3 * size, kept, live.peak)


def _step(
    model: nn.Module,
    batch: dict[str, Any],
    autocast: torch.dtype | None,
    optimizer: torch.optim.Optimizer,
    between: Callable[[], int] = lambda: 0,
) -> int:
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        loss = model(**batch).loss
    found = between()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return found
