"""Builds the fusions that a config asks for."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..backbone.blocks import Backbone
from ..backbone.families import POSITIONS_FIRST
from ..fusions import Fusion, build_fusion
from .config import FusionConfig


def build_for(backbone: Backbone, config: FusionConfig, **widths: int) -> Fusion:
    """Builds the fusion of a config for a backbone, with fresh parameters; `widths` win over the config.

    Raises:
        ValueError: If a fusion that mixes positions would not find them where it looks.
    """
    fusion = build_fusion(
        config.fusion,
        backbone.hidden_size,
        backbone.num_layers,
        config.fusion_layers,
        last_block=_plain_copy(backbone.blocks[-1]) if config.fusion_copy_last else None,
        **{**config.options, **widths},
    )
    if fusion.mixes_positions and backbone.model_type in POSITIONS_FIRST:
        raise ValueError(
            f"fusion={config.fusion!r} attends over positions, and the layer states of a {backbone.model_type!r} are (positions, batch, "
            "hidden size), of which it would take texts for positions. Use a fusion over depth (dwatt, concat, scalar_mix)."
        )
    fusion.stop_gradient = config.fusion_stop_gradient
    return fusion


def _plain_copy(block: nn.Module) -> nn.Module:
    """A copy of a block without hooks and without tuner layers."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    memo: dict[int, Any] = {id(getattr(m, name)): OrderedDict() for m in block.modules() for name in hooks}
    clone = copy.deepcopy(block, memo)
    for name, module in list(clone.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(clone.get_submodule(parent), child, module.get_base_layer())
    return clone
