"""The two files of linear shortcuts in a folder, and whether they belong to a backbone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .blocks import Backbone
from .fingerprint import fingerprints, fingerprints_differ

WEIGHTS, CONFIG, FORMAT = "shortcuts.safetensors", "shortcuts.json", 1
KEYS = ("model_type", "hidden_size", "num_layers", "fingerprint", "adapters", "digest", "maps")


def map_name(kind: str, source: int, target: int) -> str:
    """The name of a shortcut among others; in the file its tensors are `maps.NAME.weight` and the like."""
    return f"{kind} {source} {target}"


def read_config(folder: Path) -> dict[str, Any]:
    """What the JSON file of a folder says.

    Raises:
        FileNotFoundError: If there are no shortcuts in the folder.
        ValueError: If it is damaged, or of a later version.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"The folder {str(folder)!r} holds no shortcuts: {CONFIG} and {WEIGHTS} are wanted. Fit them first: "
            "fusion-adapters shortcuts fit RECIPE.yaml --output FOLDER."
        )
    try:
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        number = said["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(folder, error) from error
    if number != FORMAT:
        raise ValueError(
            f"{str(folder / CONFIG)!r} is of format {number}, and this version of fusion-adapters reads format {FORMAT}. Install the "
            "version that wrote it (pip install -U fusion-adapters)."
        )
    lacking = [name for name in KEYS if name not in said]
    if lacking:
        raise damaged(folder, f"it does not say {lacking[0]!r}")
    return said


def read_tensors(folder: Path, said: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a folder, on the CPU.

    Raises:
        ValueError: If they are not those that the JSON file was written for.
    """
    try:
        if digest_of(folder / WEIGHTS) == said["digest"]:
            return load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise damaged_weights(folder, error) from error
    raise ValueError(
        f"{str(folder / WEIGHTS)!r} is not the file that {CONFIG} was written for: it is damaged, or was replaced. Copy both again."
    )


def damaged(folder: Path, why: Any) -> ValueError:
    """Of a JSON file that does not say what it should."""
    return ValueError(f"{str(folder / CONFIG)!r} is damaged ({why}). Copy it again, or fit the shortcuts anew.")


def damaged_weights(folder: Path, why: Any) -> ValueError:
    """Of tensors that are others than the JSON file says."""
    return ValueError(
        f"{str(folder / WEIGHTS)!r} does not hold what {CONFIG} says ({' '.join(str(why).split())[:200]}). Copy both again."
    )


def check_shape(hidden_size: int, num_layers: int, backbone: Backbone) -> None:
    """Raises ValueError if shortcuts are of another width or depth than a backbone."""
    shape, here = (hidden_size, num_layers), (backbone.hidden_size, backbone.whole.num_layers)
    if shape != here:
        raise ValueError(
            f"The shortcuts are for a backbone of hidden size {shape[0]} with {shape[1]} blocks; this one has hidden size {here[0]} and "
            f"{here[1]} blocks. Load the backbone that they were fitted on."
        )


def check_type(said: Mapping[str, Any], backbone: Backbone) -> None:
    """Raises ValueError if shortcuts were fitted on a backbone of another type."""
    if said["model_type"] != backbone.model_type:
        raise _elsewhere(said, f"a {said['model_type']!r}, and this is a {backbone.model_type!r}")


def check_weights_of(said: Mapping[str, Any], backbone: Backbone) -> None:
    """Raises ValueError if shortcuts were fitted on a backbone of other weights or another configuration."""
    difference = fingerprints_differ(said["fingerprint"], fingerprints(backbone.whole, said["fingerprint"]))
    if difference:
        raise _elsewhere(said, f"a backbone of the same shape but with {difference}")


def digest_of(path: Path) -> str:
    """A digest of a file, by which damage is noticed."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _elsewhere(said: Mapping[str, Any], what: str) -> ValueError:
    name = said.get("base_model_name_or_path")
    gguf = f", from the GGUF file {said['gguf']}" if said.get("gguf") else ""
    return ValueError(
        f"The shortcuts were fitted on {what}. Load the checkpoint that they were fitted on{f' ({name})' if name else ''}{gguf}, "
        "or fit them anew."
    )
