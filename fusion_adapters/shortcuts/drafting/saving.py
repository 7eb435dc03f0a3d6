"""Drafters as files: `drafter.safetensors` and `drafter.json`, bound to the backbone that they were trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ...backbone.atomic import write_text_whole, written_whole
from ...backbone.fingerprint import WHOLE, fingerprints, fingerprints_differ
from ...backbone.shortcut_files import digest_of
from ..saving import backbone_of
from .drafter import DraftBlock, Drafter, DrafterShape

WEIGHTS, CONFIG, FORMAT = "drafter.safetensors", "drafter.json", 1
TOKENS = "tokens"  # the tensor that lists what the drafter can say


def save_drafter(
    drafter: Drafter, folder: str | Path, notes: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float16
) -> None:
    """Writes a drafter, with a fingerprint of its backbone; the JSON file comes last, whole.

    Args:
        drafter: The drafter.
        folder: Made if it is not there.
        notes: What else to write down: how it was trained.
        dtype: In which the weights are written; 16 bits change no token that is written with drafts, for the model checks each.
    """
    folder, backbone = Path(folder), drafter.backbone
    tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in drafter.block.state_dict().items()}
    if drafter.tokens is not None:
        tensors[TOKENS] = drafter.tokens.cpu()
    with written_whole(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary)
    said = {
        "format": FORMAT,
        "model_type": backbone.model_type,
        "hidden_size": backbone.hidden_size,
        "num_layers": backbone.whole.num_layers,
        "base_model_name_or_path": getattr(getattr(drafter.model, "config", None), "_name_or_path", None) or None,
        "fingerprint": fingerprints(backbone).get(WHOLE),
        "digest": digest_of(folder / WEIGHTS),
        "shape": drafter.block.shape.as_json(),
        "notes": dict(notes or {}),
    }
    write_text_whole(folder / CONFIG, json.dumps(said, indent=2) + "\n")


def load_drafter(folder: str | Path, model: nn.Module) -> Drafter:
    """Reads a drafter that `save_drafter` wrote, for a model with the backbone that it was trained on.

    Args:
        folder: The folder.
        model: The model that will write; it may be quantised, or hold adapters, with which drafts are right less often.

    Raises:
        FileNotFoundError: If there is none in the folder.
        ValueError: If it was trained on another backbone, or the files are damaged; the message says what differs.
    """
    folder, backbone = Path(folder), backbone_of(model)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"The folder {str(folder)!r} holds no drafter: {CONFIG} and {WEIGHTS} are wanted. Train one (train_drafter) and save it "
            "there (save_drafter)."
        )
    said = _read_config(folder)
    if digest_of(folder / WEIGHTS) != said["digest"]:
        raise ValueError(
            f"{str(folder / WEIGHTS)!r} is not the file that {CONFIG} was written for: it is damaged, or was replaced. Copy both again."
        )
    for name, here in (
        ("model_type", backbone.model_type),
        ("hidden_size", backbone.hidden_size),
        ("num_layers", backbone.whole.num_layers),
    ):
        if said[name] != here:
            raise ValueError(_elsewhere(said, f"{name}={said[name]!r}, and this one has {here!r}"))
    difference = fingerprints_differ(said["fingerprint"], fingerprints(backbone, said["fingerprint"]))
    if difference:
        raise ValueError(_elsewhere(said, f"the same shape but {difference}"))
    try:
        shape = said["shape"]
        block = DraftBlock(DrafterShape(**{**shape, "layers": tuple(shape["layers"])}))
        tensors = load_file(folder / WEIGHTS)
        tokens = tensors.pop(TOKENS, None)
        block.load_state_dict(tensors)
        if (None if tokens is None else len(tokens)) != shape["tokens"]:
            raise ValueError(f"{shape['tokens']} tokens are said, {0 if tokens is None else len(tokens)} are there")
    except (SafetensorError, RuntimeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{str(folder / WEIGHTS)!r} does not hold what {CONFIG} says ({' '.join(str(error).split())[:200]}). Copy both again."
        ) from error
    block.requires_grad_(False)
    return Drafter(model, block, tokens)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        known = [said[n] for n in ("format", "digest", "shape", "fingerprint", "hidden_size", "num_layers", "model_type")]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(folder / CONFIG)!r} is damaged ({error}). Copy it again, or train the drafter anew."
        ) from error
    if known[0] != FORMAT:
        raise ValueError(
            f"{str(folder / CONFIG)!r} is of format {known[0]}, and this version of fusion-adapters reads format {FORMAT}. Install the "
            "version that wrote it (pip install -U fusion-adapters)."
        )
    return said


def _elsewhere(said: Mapping[str, Any], what: str) -> str:
    name = said.get("base_model_name_or_path")
    return (
        f"The drafter was trained on a backbone with {what}. Load the checkpoint that it was trained on{f' ({name})' if name else ''}, or "
        "train one for this backbone."
    )
