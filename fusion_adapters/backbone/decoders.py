"""Backbones from GGUF files: what transformers leaves on a model that it has dequantised, and which file that was."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from torch import nn

from .quantization import quantised_parameters

_MARK = "_gguf_file"  # on a model: the file that it was loaded from
_CHUNK = 1 << 22


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file as an adapter records it.

    Attributes:
        name: Its name, without folders.
        digest: A hash of its bytes (xxh3, 128 bits); None if it was not at hand.
    """

    name: str
    digest: str | None = None

    def __str__(self) -> str:
        return self.name if self.digest is None else f"{self.name} (xxh3 {self.digest})"


def gguf_file_of(model: nn.Module) -> GgufFile | None:
    """The GGUF file that a model, with or without its head, was loaded from; None for any other model."""
    for holder in _holders(model):
        if _MARK in holder.__dict__:
            return holder.__dict__[_MARK]
    note = _note(model)
    if note is None:
        return None
    name = note.get("gguf_file") if isinstance(note, dict) else getattr(note, "gguf_file", None)
    return GgufFile(os.path.basename(name or "of unknown name"))


def mark_gguf(model: nn.Module, path: str | Path) -> None:
    """Writes down on a model which GGUF file it was loaded from, with a hash of the file."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    _mark(model, GgufFile(os.path.basename(path), digest.hexdigest()))


def settle_gguf(model: nn.Module) -> bool:
    """Makes a dequantised model the dense one that it is: it trains and saves.

    transformers (5.23) unpacks the weights of a GGUF file where it has no kernel for packed ones, and keeps the note that the model
    is quantised, for which `Trainer` and `save_pretrained` refuse it. A model whose weights are packed stays as it is.

    Args:
        model: The model with its head.

    Returns:
        Whether there was such a note, and it was dropped.
    """
    if _note(model) is None or next(quantised_parameters(model), None) is not None:
        return False
    file = gguf_file_of(model)
    if file is not None:
        _mark(model, file)
    for holder in _holders(model):
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            holder.__dict__.pop(name, None)
        config: Any = getattr(holder, "config", None)
        if _is_gguf(getattr(config, "quantization_config", None)):
            del config.quantization_config
    return True


def _holders(model: nn.Module) -> list[nn.Module]:
    """A model and the base inside it, which share a configuration."""
    base = getattr(model, "base_model", None)
    return [model, base] if isinstance(base, nn.Module) and base is not model else [model]


def _mark(model: nn.Module, file: GgufFile) -> None:
    for holder in _holders(model):
        holder.__dict__[_MARK] = file


def _note(model: nn.Module) -> Any:
    """What transformers notes of a model's GGUF file, packed or not."""
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    return found if _is_gguf(found) else None


def _is_gguf(found: Any) -> bool:
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return getattr(method, "value", method) == "gguf"
