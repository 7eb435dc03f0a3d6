"""Early-exit drafts (`assistant_early_exit`): calls for which transformers has the configuration name fewer blocks."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..backbone.blocks import Backbone

COUNT = "num_hidden_layers"


def named_blocks(backbone: Backbone) -> int | None:
    """The number of blocks that the configuration of the backbone names; None if it names none."""
    return getattr(getattr(backbone.root, "config", None), COUNT, None)


def is_draft(layer: Any) -> bool:
    """Whether the call that begins runs fewer blocks than the fusion was made for, without a gradient: it stays unfused.

    In training this is no draft, and the call fails when the last block has not run.

    Args:
        layer: The `FusionLayer`. Warns where the count was not set within a call of the model, so that a draft is not known
            from a configuration that somebody changed.
    """
    count, full = named_blocks(layer.backbone), layer.named_blocks
    if count is None or full is None or count >= full or torch.is_grad_enabled():
        return False
    config = layer.backbone.root.config
    if torch.compiler.is_compiling() or any(own is config and then == full for own, then in layer.calls.here.named):
        return True
    warnings.warn(
        f"The backbone's configuration names {count} of its {full} blocks ({COUNT}), and the fusion, which reads all of "
        "them, is left out of the call. In early-exit drafts (assistant_early_exit) that is right. If you changed the "
        f"configuration, or a generation failed in a draft, set model.config.{COUNT} = {full}.",
        stacklevel=2,
    )
    return True
