"""Shortcuts as files: `shortcuts.safetensors` and `shortcuts.json`, bound to the backbone that they were fitted on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from ..backbone.atomic import write_text_whole, written_whole
from ..backbone.blocks import Backbone, find_backbones
from ..backbone.decoders import gguf_file_of
from ..backbone.fingerprint import WHOLE, fingerprints
from ..backbone.shortcut_files import (
    CONFIG,
    FORMAT,
    WEIGHTS,
    check_shape,
    check_type,
    check_weights_of,
    damaged,
    damaged_weights,
    digest_of,
    read_config,
    read_tensors,
)
from ..states import adapters_digest
from .maps import Shortcut, ShortcutSet


def save_shortcuts(
    shortcuts: ShortcutSet, model: nn.Module, folder: str | Path, notes: Mapping[str, Any] | None = None
) -> None:
    """Writes shortcuts, with a fingerprint of the backbone that they belong to; the JSON file comes last, whole.

    LoRA that is active in the backbone is part of its layer states: a digest of it is written too, and compared at each load. A fusion
    is not.

    Args:
        shortcuts: The shortcuts.
        model: The model whose layers they cast.
        folder: Made if it is not there.
        notes: What else to write down: how they were fitted.
    """
    folder, backbone = Path(folder), backbone_of(model)
    check_fits(shortcuts, backbone)
    with written_whole(folder / WEIGHTS) as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in shortcuts.state_dict().items()}, temporary)
    file = gguf_file_of(model)
    config: Any = getattr(model, "config", None)
    said = {
        "format": FORMAT,
        "model_type": backbone.model_type,
        "hidden_size": shortcuts.hidden_size,
        "num_layers": shortcuts.num_layers,
        "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
        "gguf": None if file is None else str(file),
        "fingerprint": fingerprints(backbone).get(WHOLE),
        "adapters": list(adapters_digest(backbone)),
        "digest": digest_of(folder / WEIGHTS),
        "maps": [
            {"kind": s.kind, "sources": list(s.sources), "target": s.target, "rank": s.rank, "bias": s.bias is not None}
            for s in shortcuts
        ],
        "notes": dict(notes or {}),
    }
    write_text_whole(folder / CONFIG, json.dumps(said, indent=2) + "\n")


def load_shortcuts(folder: str | Path, model: nn.Module) -> ShortcutSet:
    """Reads shortcuts that `save_shortcuts` wrote, onto the device of a backbone, and checks that they belong to it.

    Args:
        folder: The folder.
        model: The model whose layers they cast; it may be quantised, or hold adapters.

    Raises:
        FileNotFoundError: If there are none in the folder.
        ValueError: If they were fitted on another backbone, or the files are damaged; the message says what differs.
    """
    folder, backbone = Path(folder), backbone_of(model)
    said = read_config(folder)
    tensors = read_tensors(folder, said)
    check_type(said, backbone)
    shortcuts = _described(folder, said)
    check_fits(shortcuts, backbone)
    check_weights_of(said, backbone)
    (then, digest), (now, here) = said["adapters"], adapters_digest(backbone)
    if digest != here:
        raise ValueError(
            f"The shortcuts were fitted to layer states with other weights of adapters than those of this model (then active: {then}; now: "
            f"{now}). LoRA in the blocks is part of the states. Load and activate the adapter that they were fitted with, or none if there "
            "was none (model.disable_adapter()), or fit them anew."
        )
    try:
        shortcuts.load_state_dict(tensors)
    except RuntimeError as error:
        raise damaged_weights(folder, error) from error
    return shortcuts.to(backbone.device)


def _described(folder: Path, said: Mapping[str, Any]) -> ShortcutSet:
    """The shortcuts that a configuration names, without their weights."""
    size = said["hidden_size"]
    try:
        maps = [
            Shortcut(size, m["sources"], m["target"], rank=m["rank"], bias=m["bias"], kind=m["kind"]) for m in said["maps"]
        ]
        return ShortcutSet(maps, size, said["num_layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(folder, error) from error


def backbone_of(model: nn.Module) -> Backbone:
    """The one stack of a model.

    Raises:
        ValueError: If it has two.
    """
    base: Any = getattr(model, "get_base_model", None)
    found = find_backbones(model if base is None else base())
    if found[0].stack is not None:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder, whose decoder's states depend on the encoder's; shortcuts are for models "
            "of one stack. Choose a decoder or an encoder alone."
        )
    return found[0]


def check_fits(shortcuts: ShortcutSet, backbone: Backbone) -> None:
    """Raises ValueError if shortcuts are of another width or depth than a backbone."""
    check_shape(shortcuts.hidden_size, shortcuts.num_layers, backbone)
