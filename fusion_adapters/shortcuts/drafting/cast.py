"""transformers' own early-exit drafts (`assistant_early_exit`), with the draft's state cast to the last layer first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...backbone.families import state_in, state_out, with_state_out
from ..maps import MAT, Shortcut, ShortcutSet
from ..saving import backbone_of, check_fits

COUNT = "num_hidden_layers"  # what transformers lowers while it drafts


@contextlib.contextmanager
def cast_drafts(model: nn.Module, shortcuts: ShortcutSet, kind: str = MAT) -> Iterator[None]:
    """In the body, drafts of `generate(assistant_early_exit=e)` are cast from layer e to the last by the shortcut from there.

    ```python
    with cast_drafts(model, load_shortcuts("shortcuts", model)):
        model.generate(**inputs, assistant_early_exit=12)
    ```

    transformers drafts with the first e blocks, the final norm and the head, and checks drafts with all blocks: a shortcut changes which
    drafts are right, and no token that is written in greedy search, up to rounding in near ties (transformers' own checks read several
    tokens at a time; `DraftedDecoding` is exact in these, too).

    Args:
        model: A causal language model.
        shortcuts: Fitted on its backbone.
        kind: Which of them: `mat`, `fused`, ...

    Raises:
        ValueError: If the shortcuts are for another backbone; while it drafts, if there is none from layer e, or the model runs all its
            blocks for a draft.
    """
    backbone = backbone_of(model).whole
    check_fits(shortcuts, backbone)
    config: Any = backbone.root.config
    full = getattr(config, COUNT, None)
    if full != backbone.num_layers or len({id(b) for b in backbone.blocks}) != full:
        raise ValueError(
            f"{type(backbone.root).__name__} has {backbone.num_layers} blocks, and its configuration says {COUNT}={full}, the number that "
            "transformers lowers to draft. Drafts by early exit need a model with as many blocks as that, each run once."
        )
    states: dict[int, Tensor] = {}

    def exit_layer() -> int | None:
        """The layer that a draft ends at; None outside of drafts."""
        count: int = getattr(config, COUNT)
        return None if count >= full or torch.is_grad_enabled() else count

    def begin(number: int) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            end = exit_layer()
            if end is not None and number == 0 and 0 in shortcuts.get(end, kind=kind).sources:
                states[0] = state_in(args, kwargs)
            if end is not None and number == end:
                raise ValueError(
                    f"{type(backbone.root).__name__} runs all its blocks even where transformers drafts with {end}: early exit saves "
                    "nothing there. Write without assistant_early_exit (a fused drafter serves every causal model)."
                )

        return hook

    def finish(number: int) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            end = exit_layer()
            if end is None or number > end:
                return None
            shortcut: Shortcut = shortcuts.get(end, kind=kind)
            if number in shortcut.sources:
                states[number] = state_out(output)
            if number < end:
                return None
            cast = shortcut({layer: states[layer] for layer in shortcut.sources})
            states.clear()
            return with_state_out(output, cast)

        return hook

    handles = []
    for number, block in enumerate(backbone.blocks):
        handles.append(block.register_forward_pre_hook(begin(number), with_kwargs=True))
        handles.append(block.register_forward_hook(finish(number + 1)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        setattr(config, COUNT, full)  # transformers leaves it lowered where a draft fails
