"""The maps of `fusion="shortcut"`: read from a folder of shortcuts when an adapter is made, and from then on part of the adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..backbone.blocks import Backbone
from ..backbone.shortcut_files import (
    check_shape,
    check_type,
    check_weights_of,
    damaged,
    damaged_weights,
    map_name,
    read_config,
    read_tensors,
)
from ..fusions import Fusion, resolve_layers
from .config import FusionConfig

METHOD, KIND = "shortcut", "mat"
Maps = dict[int, dict[str, Tensor]]


def settle_maps(config: FusionConfig, backbones: Sequence[Backbone], filled: bool) -> Maps | None:
    """Reads the maps that a fresh adapter asks for, and writes their rank into its config, in the place of the folder.

    Args:
        config: The config of the adapter, bound to its backbone.
        backbones: The stacks that it fuses.
        filled: Whether the adapter's own file fills it, maps included.

    Returns:
        For each layer below the last that the fusion reads the tensors of its map; None if there are none to put in.

    Raises:
        FileNotFoundError: If the folder holds no shortcuts.
        ValueError: If they are damaged, of another backbone, or not of all these layers; or if maps are wanted and no folder is named.
    """
    folder, config.fusion_shortcuts = config.fusion_shortcuts, None
    if filled or config.fusion != METHOD:
        return None
    rank = config.options.get("map_rank") or None
    if folder is None and rank is None:
        return None
    if folder is None:
        raise ValueError(
            f"fusion_map_rank={rank} asks for maps, and a fresh adapter has them from a folder of shortcuts. Name it "
            "(fusion_shortcuts='FOLDER'), or load the adapter with its weights: PeftModel.from_pretrained(model, 'ADAPTER')."
        )
    if len(backbones) > 1 or backbones[0].stack is not None:
        raise ValueError(
            f"fusion_shortcuts={folder!r}: shortcuts are for models of one stack, and this is an encoder-decoder. Leave it unset."
        )
    maps = _read(Path(folder), config, backbones[0])
    (found,) = {_rank_of(tensors) for tensors in maps.values()}
    if rank not in (None, found):
        raise ValueError(
            f"fusion_map_rank={rank}, and the shortcuts in {folder!r} are of rank {found}. Leave it unset, or fit shortcuts of that rank "
            f"(rank={rank})."
        )
    setattr(config, "fusion_map_rank", found)  # noqa: B010 - a field that the methods make
    return maps


def fill_maps(fusion: Fusion, maps: Maps | None) -> None:
    """Puts maps that were read into a fusion with fresh parameters."""
    if maps is not None:
        fusion.fill(maps)  # type: ignore[operator]


def _read(folder: Path, config: FusionConfig, backbone: Backbone) -> Maps:
    said = read_config(folder)
    check_type(said, backbone)
    check_shape(said["hidden_size"], said["num_layers"], backbone)
    check_weights_of(said, backbone)
    names, digest = said["adapters"]
    if digest != "none":
        raise ValueError(
            f"The shortcuts in {str(folder)!r} were fitted with adapters in the backbone ({names}), and cast other layer states than the "
            "plain backbone's. Fit them without adapters."
        )
    last = backbone.num_layers
    wanted = [layer for layer in resolve_layers(config.fusion_layers, last) if layer < last]
    try:
        there = {m["sources"][0]: m for m in said["maps"] if (m["kind"], m["target"]) == (KIND, last)}
        kinds = {(m["rank"], bool(m["bias"])) for layer, m in there.items() if layer in wanted}
    except (KeyError, TypeError, IndexError) as error:
        raise damaged(folder, error) from error
    lacking = [layer for layer in wanted if layer not in there]
    if lacking or not wanted:
        how = f"fit them with sources={wanted}" + (" and pairs='all'" if config.fusion_depth is not None else "")
        raise ValueError(
            f"The shortcuts in {str(folder)!r} have no {KIND!r} to layer {last} from layer {', '.join(map(str, lacking)) or 'any'}, which "
            f"the fusion reads; there are some from: {', '.join(map(str, sorted(there))) or 'none'}. Choose the layers that are there "
            f"(fusion_layers), or {how}."
        )
    if len(kinds) > 1:
        raise ValueError(
            f"The shortcuts in {str(folder)!r} differ in rank or bias ({kinds}), and a fusion's are of one form. Fit them together."
        )
    tensors = read_tensors(folder, said)
    return {layer: _tensors_of(folder, layer, last, tensors, backbone.hidden_size) for layer in wanted}


def _tensors_of(folder: Path, layer: int, last: int, tensors: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    prefix = f"maps.{map_name(KIND, layer, last)}."
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    rank = found["down"].shape[0] if "down" in found else width
    shapes: dict[str, Any] = {"weight": (width, width), "up": (width, rank), "down": (rank, width), "bias": (width,)}
    wrong = {name: tuple(tensor.shape) for name, tensor in found.items() if tuple(tensor.shape) != shapes.get(name)}
    if wrong or found.keys() - {"bias"} not in ({"weight"}, {"up", "down"}):
        raise damaged_weights(folder, f"the map from layer {layer}: {wrong or sorted(found)}")
    return found


def _rank_of(tensors: Mapping[str, Tensor]) -> int:
    """The hidden size for a whole matrix."""
    return len(tensors["down"] if "down" in tensors else tensors["weight"])
