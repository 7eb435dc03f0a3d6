"""Casts by others: trainable fusion weights that are no longer float32 when training begins."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from .active import modules_in

_DEEPSPEED = ("ds_id", "_hp_mapping")  # on parameters of which it trains float32 copies


def warn_if_cast(layer: Any) -> None:
    """Warns, once for a fusion layer, where weights of a fusion that trains have 16 bits or fewer.

    Silent for adapters that were attached with `autocast_adapter_dtype=False`, and where DeepSpeed trains copies.

    Args:
        layer: The `FusionLayer`.
    """
    if (
        layer.cast_told or torch.compiler.is_compiling()
    ):  # compiled models are looked at when they are put into training mode
        return
    for name, fusion in layer.fusions.items():
        if name in layer.as_given:
            continue
        weights = [p for m in modules_in([fusion]) for p in m._parameters.values() if p is not None and _is_cast(p)]
        if weights:
            layer.cast_told = True
            dtypes = " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in weights}))
            warnings.warn(
                f"{len(weights)} tensors of the fusion of the adapter {name!r} that train are {dtypes}: something cast them after "
                "the adapter was attached (model.half(), model.to(torch.bfloat16), TRL's trainers on a quantised backbone). Steps of "
                "usual size on values near 1 are then rounded away, and gains of norms and positions over depth never move. Before "
                "training, cast back what trains:\n"
                "    for p in model.parameters():\n"
                "        if p.requires_grad: p.data = p.data.float()\n"
                "To train in 16 bits as it is, attach with autocast_adapter_dtype=False, which leaves this message out.",
                stacklevel=2,
            )
            return


def warn_if_cast_in_call(layer: Any) -> None:
    """The same at a call in training, where nobody may shard: FSDP's weights are in 16 bits within calls alone."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        warn_if_cast(layer)


def _is_cast(parameter: torch.Tensor) -> bool:
    if not parameter.requires_grad or not parameter.is_floating_point() or parameter.dtype.itemsize >= 4:
        return False
    return not any(hasattr(parameter, mark) for mark in _DEEPSPEED)
