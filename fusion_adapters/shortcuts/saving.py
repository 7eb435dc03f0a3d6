"""Shortcuts as files: `shortcuts.safetensors` and `shortcuts.json`, bound to the backbone that they were fitted on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..backbone.atomic import write_text_whole, written_whole
from ..backbone.blocks import Backbone, find_backbones
from ..backbone.decoders import gguf_file_of
from ..backbone.fingerprint import WHOLE, fingerprints, fingerprints_differ
from .maps import Shortcut, ShortcutSet

WEIGHTS, CONFIG, FORMAT = "shortcuts.safetensors", "shortcuts.json", 1


def save_shortcuts(
    shortcuts: ShortcutSet, model: nn.Module, folder: str | Path, notes: Mapping[str, Any] | None = None
) -> None:
    """Writes shortcuts, with a fingerprint of the backbone that they belong to; the JSON file comes last, whole.

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
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"The folder {str(folder)!r} holds no shortcuts: {CONFIG} and {WEIGHTS} are wanted. Fit them first: "
            "fusion-adapters shortcuts fit RECIPE.yaml --output FOLDER."
        )
    said = read_config(folder)
    if digest_of(folder / WEIGHTS) != said["digest"]:
        raise ValueError(
            f"{str(folder / WEIGHTS)!r} is not the file that {CONFIG} was written for: it is damaged, or was replaced. "
            "Copy both again."
        )
    maps = [
        Shortcut(said["hidden_size"], m["sources"], m["target"], rank=m["rank"], bias=m["bias"], kind=m["kind"])
        for m in said["maps"]
    ]
    shortcuts = ShortcutSet(maps, said["hidden_size"], said["num_layers"])
    if said["model_type"] != backbone.model_type:
        raise ValueError(_elsewhere(said, f"a {said['model_type']!r}, and this is a {backbone.model_type!r}"))
    check_fits(shortcuts, backbone)
    difference = fingerprints_differ(said["fingerprint"], fingerprints(backbone, said["fingerprint"]))
    if difference:
        raise ValueError(_elsewhere(said, f"a backbone of the same shape but with {difference}"))
    try:
        shortcuts.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{str(folder / WEIGHTS)!r} does not hold what {CONFIG} says ({' '.join(str(error).split())[:200]}). "
            "Copy both again."
        ) from error
    return shortcuts.to(backbone.device)


def read_config(folder: Path) -> dict[str, Any]:
    """What the JSON file of a folder says.

    Raises:
        ValueError: If it is damaged, or of a later version.
    """
    try:
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        known = said["format"], said["maps"], said["digest"], said["hidden_size"], said["num_layers"], said["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(folder / CONFIG)!r} is damaged ({error}). Copy it again, or fit the shortcuts anew."
        ) from error
    if known[0] != FORMAT:
        raise ValueError(
            f"{str(folder / CONFIG)!r} is of format {known[0]}, and this version of fusion-adapters reads format {FORMAT}. Install the "
            "version that wrote it (pip install -U fusion-adapters)."
        )
    return said


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
    shape, here = (shortcuts.hidden_size, shortcuts.num_layers), (backbone.hidden_size, backbone.whole.num_layers)
    if shape != here:
        raise ValueError(
            f"The shortcuts are for a backbone of hidden size {shape[0]} with {shape[1]} blocks; this one has hidden size {here[0]} and "
            f"{here[1]} blocks. Load the backbone that they were fitted on."
        )


def _elsewhere(said: Mapping[str, Any], what: str) -> str:
    name = said.get("base_model_name_or_path")
    gguf = f", from the GGUF file {said['gguf']}" if said.get("gguf") else ""
    return (
        f"The shortcuts were fitted on {what}. Load the checkpoint that they were fitted on{f' ({name})' if name else ''}{gguf}, "
        "or fit them anew."
    )


def digest_of(path: Path) -> str:
    """A hash of a file's bytes (xxh3, 128 bits)."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
