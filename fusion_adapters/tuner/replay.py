"""Calls with layer states that were computed earlier: whether they fit the model as it is now."""

from __future__ import annotations

from torch import nn

from ..backbone.families import is_causal_lm
from ..backbone.replay import FusedState, GivenStates, LayerStates
from .active import adapters_in_use
from .layer import FusionLayer, fusion_layers
from .pooling import reads_means


def checked_states(model: nn.Module, layer_states: LayerStates | FusedState) -> GivenStates | FusedState:
    """What the taps need of the states that came with a call of the model.

    Raises:
        ValueError: If the model has no single active fusion, something trains inside its backbone, or the states are those
            of other layers or positions than it needs.
    """
    if isinstance(layer_states, FusedState):  # of a pass that several adapters share, see many.py, which has checked them
        return layer_states
    layers = fusion_layers(model)
    if len(layers) != 1 or layers[0].backbone.stack is not None or layers[0].active_fusion is None:
        raise ValueError(
            "layer_states stand for the blocks of one stack under an active fusion; this model is an encoder-decoder, or its "
            "adapter is disabled. Call it without layer_states."
        )
    if layers[0].trains_states():
        raise ValueError(
            "layer_states were computed before training, but parameters inside the backbone train now (LoRA, or "
            "modules_to_save before the blocks), so the states would change with every step. Train live, without a cache."
        )
    _check_held(model, layers[0], layer_states)
    means = layer_states.get("kept") == "means"
    return GivenStates(layer_states["states"], layer_states["positions"], tuple(layer_states.get("layers") or ()), means)


def _check_held(model: nn.Module, layer: FusionLayer, layer_states: LayerStates) -> None:
    held, kept, wanted = layer_states.get("layers"), layer_states.get("kept"), layers_read(layer)
    then, now = layer_states.get("adapters"), adapters_in_use(layer.running)
    if then not in (None, now):
        raise ValueError(
            f"layer_states were computed with other adapters inside the backbone (LoRA, or modules_to_save before the blocks): "
            f"{then}, and {now} now. Activate what was active at the extraction, or extract again into another folder."
        )
    if held is None or tuple(held) != wanted:
        raise ValueError(
            f"layer_states holds the layers {'that it does not name' if held is None else list(held)}, but the active fusion "
            f"wants {list(wanted)}. Take the dataset from a cache opened with this model as it is now, "
            "LayerStateCache(folder, model).dataset(rows)."
        )
    if kept == "all":
        return
    if kept == "means":
        if not reads_means(model, layer):
            raise ValueError(
                "layer_states holds a mean over the positions of each text, and the model reads the positions themselves: its active "
                "fusion has no fusion_pool='mean', or mixes positions, or its head is another. Extract again into another folder."
            )
        return
    if is_causal_lm(model) or layer.mixes_positions:
        why = "is a causal language model, whose loss compares each position with the next label"
        if layer.mixes_positions:
            why = f"has a fusion ({type(layer.active_fusion).__name__}) that mixes positions"
        raise ValueError(
            f"layer_states holds the positions {kept!r} alone, but the model {why}: it needs all of them. Take "
            "cache.dataset(rows, positions='all')."
        )


def layers_read(layer: FusionLayer) -> tuple[int, ...]:
    """The layer states that training the active fusion needs, ascending: those that it reads, and that of the last block that runs."""
    return tuple(sorted({*(layer.wanted_layers() or ()), layer.running.num_layers}))
