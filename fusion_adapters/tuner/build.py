"""Builds the fusions that a config asks for."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..backbone.blocks import Backbone
from ..backbone.calls import WrappedForward
from ..backbone.families import POSITIONS_FIRST
from ..backbone.quantization import quantised_parameters
from ..fusions import Fusion, build_fusion
from .config import FusionConfig
from .offloaded import is_offloaded


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
        last_block=_plain_copy(backbone) if config.fusion_copy_last else None,
        **{**config.options, **widths},
    )
    fusion.__dict__["depth"] = backbone.depth  # read by `depth_of`
    fusion.stop_gradient = config.fusion_stop_gradient
    fusion.pools = config.fusion_pool is not None
    if (fusion.mixes_positions or fusion.pools) and backbone.model_type in POSITIONS_FIRST:
        what = f"fusion={config.fusion!r} attends" if fusion.mixes_positions else "fusion_pool='mean' takes means"
        raise ValueError(
            f"{what} over positions, and the layer states of a {backbone.model_type!r} are (positions, batch, hidden size), of which "
            "it would take texts for positions. Use a fusion over depth (dwatt, concat, scalar_mix), without fusion_pool."
        )
    if config.fusion_norm == "rms" and config.fusion_copy_last:
        raise ValueError(
            "fusion_norm='rms' with fusion_copy_last=True: the copy of the backbone's last block computes on the states as they are. Leave "
            "one of them out."
        )
    fusion.norm = config.fusion_norm or "none"
    fusion.scale_by(config.alpha)
    return fusion


def _plain_copy(backbone: Backbone) -> nn.Module:
    """A copy of the last block without hooks and without tuner layers."""
    block = backbone.blocks[-1]
    packed = [name for name, _ in quantised_parameters(block)]
    if packed:
        raise ValueError(
            f"fusion_copy_last=True: the backbone's last block is quantised ({len(packed)} weights, {packed[0]!r} for example, hold "
            "packed values), and a copy of it could not be trained. Use fusion_copy_last=False (random blocks), or load the "
            "backbone without quantisation."
        )
    if is_offloaded(block):
        raise ValueError(
            "fusion_copy_last=True: the backbone's last block is offloaded (device_map with 'cpu' or 'disk'), and a copy of it would "
            "have no weights to train. Use fusion_copy_last=False (random blocks), or load the last block onto a device."
        )
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    memo: dict[int, Any] = {id(getattr(m, name)): OrderedDict() for m in block.modules() for name in hooks}
    # of another adapter that skips this block, see `Taps.skip_above`
    skipped = block.__dict__.get("forward")
    if isinstance(skipped, WrappedForward):
        memo[id(skipped)] = skipped.replaced
    clone = copy.deepcopy(block, memo)
    if isinstance(skipped, WrappedForward) and skipped.replaced is None:
        del clone.forward
    for name, module in list(clone.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(clone.get_submodule(parent), child, module.get_base_layer())
    return clone
