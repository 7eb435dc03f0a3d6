"""Rows of one batch that go to different adapters (`adapter_names`): the fusions here, the heads in threads.py, LoRA by peft."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import _adapter_names_pre_forward_hook
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor

from ..backbone.families import POSITIONS_FIRST
from ..backbone.walk import modules_of
from ..fusions import Context
from .fusing import Fusing
from .threads import Follower, groups_of

BASE = "__base__"  # peft's name for the model without adapters


@contextlib.contextmanager
def rows_apart(tuner: Any, given: Any, call: Mapping[str, Any]) -> Iterator[None]:
    """In the body, each row of a batch goes to the adapter that is named for it. As peft does for LoRA alone.

    Args:
        tuner: The `FusionModel`.
        given: `adapter_names`: a name for each row, `"__base__"` for none.
        call: The keyword arguments of the call, in which `generate` may be told to multiply the rows.

    Raises:
        TypeError: If `adapter_names` is no list of names.
        ValueError: If the model is in training mode, or there is no adapter of that name.
    """
    if isinstance(given, str) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"adapter_names is {given!r}. Give a list with the name of an adapter for each row of the batch.")
    if tuner.training:
        raise ValueError(
            "adapter_names works without training alone: call model.eval() first, or train one adapter at a time."
        )
    known: Mapping[str, Any] = tuner.peft_config
    unknown = sorted({*given} - {*known, BASE})
    if unknown:
        raise ValueError(
            f"adapter_names has {', '.join(map(repr, unknown))}, and the model has the adapters {', '.join(map(repr, known))}. Name one of "
            f"them for each row, or {BASE!r} for the model without adapters."
        )
    config = call.get("generation_config")
    asked = (call.get(name, getattr(config, name, None)) for name in ("num_beams", "num_return_sequences"))
    times = max(number if isinstance(number, int) else 1 for number in asked)
    names = tuple(name for name in given for _ in range(times))
    handles = []
    with tuner.calls.of_rows(names):
        try:
            for module in modules_of(tuner.model):
                if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper)) and not isinstance(module, Follower):
                    hook = partial(_adapter_names_pre_forward_hook, adapter_names=list(names))
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


class FusingRows:
    """What `Fuse` asks for, by several adapters' fusions, each of its own rows; the other rows stay as they are.

    Args:
        fusings: Those of the adapters, by name.
        names: The name of each row's adapter.
        blocks: The number of the backbone's blocks.
        model_type: The backbone's.

    Raises:
        ValueError: If the adapters do not replace the output of the same block, or batches do not come first in the backbone.
    """

    def __init__(self, fusings: Mapping[str, Fusing], names: Sequence[str], blocks: int, model_type: str) -> None:
        self.fusings, self.names = fusings, names
        depths = {name: fusing.depth for name, fusing in fusings.items()} | ({BASE: blocks} if BASE in names else {})
        if len({*depths.values()}) > 1:
            said = ", ".join(f"{name!r} after block {depth}" for name, depth in depths.items())
            raise ValueError(
                f"adapter_names mixes adapters that stop at different blocks (fusion_depth): {said} of {blocks}. Rows of a batch run the "
                "same blocks; call the model once for each of them, or use ManyAdapters."
            )
        if model_type in POSITIONS_FIRST:
            raise ValueError(
                f"adapter_names splits a batch by rows, and the layer states of a {model_type!r} are (positions, batch, hidden size). Call "
                "the model once for each adapter."
            )
        self.depth = next(iter(depths.values()), blocks)
        self.wanted = frozenset().union(*(fusing.wanted for fusing in fusings.values()))
        self.mixes_positions = any(fusing.mixes_positions for fusing in fusings.values())
        self._groups: dict[str, list[int]] | None = None
        self._contexts: dict[str, Context] = {}

    def cuts_graph(self) -> bool:
        """See `Fuse`."""
        return False

    def absorbs(self) -> bool:
        """See `Fuse`."""
        return all(fusing.absorbs() for fusing in self.fusings.values())

    def absorb(self, kept: Any, layer: int, state: Tensor, context: Context) -> Any:
        """See `Fuse`."""
        kept = {} if kept is None else kept
        for name, fusing in self.fusings.items():
            if layer in fusing.wanted:
                rows, own = self._rows(name, state, context)
                kept[name] = fusing.absorb(kept.get(name), layer, state[rows], own)
        return kept

    def finish(self, kept: Any, last: Tensor, context: Context) -> Tensor:
        """See `Fuse`."""
        return self._each(last, context, lambda name, fusing, rows, own: fusing.finish(kept.get(name), last[rows], own))

    def __call__(self, states: Sequence[Tensor | None], last: Tensor, context: Context) -> Tensor:
        """See `Fuse`."""

        def fused(name: str, fusing: Fusing, rows: Tensor, own: Context) -> Tensor:
            if fusing.fusion.mixes_positions:  # what it was given of the last block is of the whole batch
                return fusing(states, last, context)[rows]
            return fusing([None if state is None else state[rows] for state in states], last[rows], own)

        return self._each(last, context, fused)

    def _each(self, last: Tensor, context: Context, fused: Callable[[str, Fusing, Tensor, Context], Tensor]) -> Tensor:
        answer = last
        for name, fusing in self.fusings.items():
            rows, own = self._rows(name, last, context)
            answer = answer.index_copy(0, rows, fused(name, fusing, rows, own).to(last.dtype))
        return answer

    def _rows(self, name: str, state: Tensor, context: Context) -> tuple[Tensor, Context]:
        """The rows of an adapter, and what its fusion may know of them."""
        if self._groups is None:
            self._groups = groups_of(self.names, len(state))
        rows = torch.tensor(self._groups[name], device=state.device)
        if name not in self._contexts:
            mask = context.attention_mask
            if isinstance(mask, Tensor) and len(mask) == len(state):
                mask = mask[rows.to(mask.device)]
            self._contexts[name] = replace(context, attention_mask=mask)
        return rows, self._contexts[name]
