"""The folder of a cache: a manifest, an index of rows, and shards that carry their own checksum.

manifest.json         key, layers, dtype, width, checksum of the index, shards with their rows and tokens
index.safetensors     for each row: signature, shard, first token, number of tokens
shard-00000.safetensors ...
states   (tokens, layers, d)  float16, bfloat16, float32 or int8; no padding
scales   (tokens, layers)     float32, for int8 only: a state is states * scales
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..backbone.atomic import temporary_of, write_text_whole, written_whole

FORMAT = 2
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
MANIFEST = "manifest.json"
INDEX = "index.safetensors"
CHECKSUM = "xxh3_128"
FILES = re.compile(r"manifest\.json|index\.safetensors|shard-\d+\.safetensors")


class StaleCacheError(ValueError):
    """A cache that does not belong to the model, the tokenizer or the rows it is asked for."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it cannot be read, or is of another version of the format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"The folder {str(folder)!r} holds no cache of layer states (no {MANIFEST}). Make one by 'fusion-adapters "
            "cache', or by fusion_adapters.cache_layer_states."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        written = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"The manifest {str(path)!r} is damaged ({error}). Delete the folder and extract the states again."
        ) from error
    if written != FORMAT:
        raise ValueError(
            f"The cache {str(folder)!r} has format {written}, this version reads format {FORMAT}. Delete the folder and "
            "extract the states again."
        )
    return manifest


def read_index(folder: Path, manifest: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Signatures `(rows, 16)` uint8 and places `(rows, 3)` int64 (shard, first token, tokens) of the rows of a cache.

    Raises:
        ValueError: If the index is missing, cannot be read, or is not the one that the manifest was written with.
    """
    try:
        index = load_file(folder / INDEX)
        found = _checksum(index)
    except (OSError, SafetensorError, ValueError) as error:
        index, found = {}, f"none, {error}"
    if found != manifest["index"]:
        raise ValueError(
            f"The index {str(folder / INDEX)!r} is missing or damaged: its checksum is {found}, the manifest has "
            f"{manifest['index']}. Run the extraction again with the same settings; it writes the index anew and keeps the "
            "shards."
        )
    return index["signatures"], index["places"]


def index_checksum(signatures: Tensor, places: Tensor) -> str:
    """What the manifest says of its index."""
    return _checksum({"signatures": signatures, "places": places})


def write_index(folder: Path, signatures: Tensor, places: Tensor) -> None:
    """Writes the index; it appears when it is whole."""
    _save(folder / INDEX, {"signatures": signatures, "places": places}, {})


def write_plan(folder: Path, manifest: dict[str, Any], signatures: Tensor, places: Tensor) -> None:
    """Writes index and manifest; the manifest last, so that a folder with one has the other."""
    write_index(folder, signatures, places)
    write_text_whole(folder / MANIFEST, json.dumps({"format": FORMAT, **manifest}, indent=1) + "\n")


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a shard with its checksum; it appears when it is whole."""
    _save(path, tensors, {CHECKSUM: _checksum(tensors)})


def shard_is_whole(path: Path, planned: Mapping[str, Any]) -> bool:
    """Whether a shard is there, has the planned number of tokens, and has the checksum that it carries."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            stated = (file.metadata() or {}).get(CHECKSUM)
    except (OSError, SafetensorError, ValueError):
        return False
    return len(tensors.get("states", ())) == planned["tokens"] and stated == _checksum(tensors)


def is_only_begun(folder: Path) -> bool:
    """Whether a folder without a manifest holds nothing but what a run leaves that was killed before it wrote one."""
    return all(path.name == INDEX or _writer(path) is not None for path in folder.iterdir())


def remove_leftovers(folder: Path) -> None:
    """Removes the files that runs which are dead by now were writing; call it before this run writes any."""
    for path in folder.iterdir():
        process = _writer(path)
        if process is not None and (process == os.getpid() or not psutil.pid_exists(process)):
            path.unlink(missing_ok=True)


def _writer(path: Path) -> int | None:
    """The id of the process that writes, or was writing, a file of a cache under a temporary name; None for other files."""
    name, process = temporary_of(path.name) or ("", None)
    return process if FILES.fullmatch(name) else None


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()  # against damage, not against forgers: ten times as fast as SHA-256
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}{tensors[name].dtype}".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
