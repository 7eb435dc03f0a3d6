"""A fusion of the lower blocks alone (`fusion_depth`): how many they are, and what has no such fusion."""

from __future__ import annotations

from torch import nn

from ..backbone.blocks import Backbone, find_backbones
from ..backbone.families import output_embeddings
from ..backbone.truncate import blocks_of_fraction, vocabulary_refusal
from .config import FusionConfig


def lower_backbones(config: FusionConfig, model: nn.Module) -> list[Backbone]:
    """The backbones that a config's fusions read, as far up as they read them.

    Raises:
        ValueError: If the model has fewer blocks than `fusion_depth`, or `fusion_layers` names states above it.
    """
    backbones = find_backbones(model, config.fusion_blocks, config.fusion_stack)
    return [backbone.lower(depth_in(config, backbone)) for backbone in backbones]


def settle_depth(config: FusionConfig, model: nn.Module, backbones: list[Backbone]) -> list[Backbone]:
    """Writes the number of blocks into a config that gives a fraction; returns the backbones up to there.

    Args:
        config: The config of an adapter that is being attached.
        model: The model.
        backbones: Its backbones, all blocks of them.

    Raises:
        ValueError: See `lower_backbones`; or if the model predicts tokens by a head that was made for the last block, the config
            fuses both stacks of an encoder-decoder, or it trains the biases of all blocks.
    """
    if config.fusion_depth is None:
        return backbones
    if len(backbones) > 1:
        raise ValueError(
            f"fusion_depth={config.fusion_depth} and fusion_stack='both': the stacks have {backbones[0].num_layers} and "
            f"{backbones[1].num_layers} blocks, and one number cannot stand for both. Fuse one of them, fusion_stack='encoder' or "
            "'decoder', or leave fusion_depth unset."
        )
    depth = depth_in(config, backbones[0])
    assert depth is not None
    blocks = backbones[0].num_layers
    if depth < blocks and output_embeddings(model) is not None:
        raise ValueError(vocabulary_refusal(f"fusion_depth={depth}", type(model).__name__, depth, blocks))
    if depth < blocks and config.bias == "all":
        raise ValueError(
            f"bias='all' trains the biases of all {blocks} blocks, and with fusion_depth={depth} those of {blocks - depth} blocks would "
            "never get a gradient. Use bias='lora_only' or 'none'."
        )
    config.fusion_depth = depth
    return [backbones[0].lower(depth)]


def depth_in(config: FusionConfig, backbone: Backbone) -> int | None:
    """The number of blocks that a config's `fusion_depth` means in a backbone; None for all of them."""
    given, blocks = config.fusion_depth, backbone.whole.num_layers
    if given is None:
        return None
    depth = blocks_of_fraction(given, blocks)
    if depth > blocks:
        made = "The adapter reads" if config.bound else f"fusion_depth={given} asks for"
        raise ValueError(
            f"{made} the first {depth} blocks of the backbone, and this one has {blocks}. "
            + (
                "Load one with at least so many."
                if config.bound
                else f"Choose a number from 1 to {blocks}, or a fraction below 1."
            )
        )
    chosen = config.fusion_layers
    above = [] if chosen is None or isinstance(chosen, str) else [i for i in chosen if i > depth]
    if above:
        raise ValueError(
            f"fusion_layers={config.fusion_layers}: {above} lie above fusion_depth={given}, which ends at block {depth} of {blocks}; the "
            f"blocks above it do not run. Choose layer states from 0 to {depth} (negatives count from there, -1 is block {depth}), or a "
            "greater fusion_depth."
        )
    return depth


def depth_of(fusion: nn.Module) -> int | None:
    """The block that ends the backbone of a fusion; None for the last. Set by `build_for`."""
    depth: int | None = fusion.__dict__.get("depth")
    return depth
