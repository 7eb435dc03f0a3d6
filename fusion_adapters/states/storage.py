"""The folder of a cache: a manifest, an index of rows, and shards that carry their own checksum and the mark of their cache.

manifest.json         key, layers, dtype, width, checksum of the index, shards with their rows and tokens, checksum of all that
index.safetensors     for each row: signature, shard, first token, number of tokens
shard-00000.safetensors ...
states   (tokens, layers, d)  float16, bfloat16, float32, float8 or int8; no padding
scales   (tokens, layers)     float32, for float8 and int8 only: a state is states * scales
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..backbone.atomic import temporary_of, write_text_whole
from .claim import LOCK, Claim
from .formats import SAFETENSORS_DTYPES, has_scales

FORMAT = 4
MANIFEST = "manifest.json"
INDEX = "index.safetensors"
CHECKSUM = "checksum"  # of the manifest's other values
SEAL = "xxh3_128"  # in a shard's metadata: which shard of which cache it is, and its checksum; one entry, as their order is random
FILES = re.compile(r"manifest\.json|index\.safetensors|shard-\d+\.safetensors")
SAFETENSORS_TEMPORARY = re.compile(r"\.tmp\w{6}")  # left by a version that let safetensors write beside the shards


class StaleCacheError(ValueError):
    """A cache that does not belong to the model, the tokenizer or the rows it is asked for."""


def has_manifest(folder: Path) -> bool:
    """Whether a folder holds a cache, or one that was begun.

    Raises:
        PermissionError: If the folder may not be read.
    """
    try:
        return (folder / MANIFEST).is_file()
    except PermissionError as error:
        raise _unreadable(folder, error) from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache.

    Raises:
        FileNotFoundError: If there is none.
        OSError: If it may not be read.
        ValueError: If it is damaged or was edited, or is of another version of the format.
    """
    path = folder / MANIFEST
    if not has_manifest(folder):
        raise FileNotFoundError(
            f"The folder {str(folder)!r} holds no cache of layer states (no {MANIFEST}). Make one by 'fusion-adapters "
            "cache', or by fusion_adapters.cache_layer_states."
        )
    remedy = "Delete the folder and extract the states again."
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        written, stated = manifest["format"], manifest.pop(CHECKSUM, None)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"The manifest {str(path)!r} is damaged ({type(error).__name__}: {error}). {remedy}") from error
    except PermissionError as error:
        raise _unreadable(folder, error) from error
    if written != FORMAT:
        raise ValueError(f"The cache {str(folder)!r} has format {written}, this version reads format {FORMAT}. {remedy}")
    if stated != (found := _checksum_of(manifest)):
        raise ValueError(
            f"The manifest {str(path)!r} is damaged or was edited: its values have the checksum {found}, it says {stated}. {remedy}"
        )
    return manifest


def read_index(folder: Path, manifest: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Signatures `(rows, 16)` uint8 and places `(rows, 3)` int64 (shard, first token, tokens) of the rows of a cache.

    Raises:
        ValueError: If the index is missing, cannot be read, or is not the one that the manifest was written with; or the manifest
            counts other rows.
    """
    try:
        if not (folder / INDEX).is_file():  # a pipe would never end
            raise FileNotFoundError("no such file")
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
    rows = torch.bincount(index["places"][:, 0], minlength=len(manifest["shards"])).tolist()
    if rows != [shard["rows"] for shard in manifest["shards"]]:
        raise ValueError(
            f"Index and manifest of the cache {str(folder)!r} do not agree: the index has {rows} rows a shard. The manifest was edited. "
            "Delete the folder and extract the states again."
        )
    return index["signatures"], index["places"]


def index_checksum(signatures: Tensor, places: Tensor) -> str:
    """What the manifest says of its index."""
    return _checksum({"signatures": signatures, "places": places})


def write_index(folder: Path, signatures: Tensor, places: Tensor) -> None:
    """Writes the index; it appears when it is whole."""
    _save(folder / INDEX, {"signatures": signatures, "places": places}, {}, lambda: None)


def write_plan(folder: Path, manifest: dict[str, Any], signatures: Tensor, places: Tensor) -> None:
    """Writes index and manifest; the manifest last, so that a folder with one has the other."""
    write_index(folder, signatures, places)
    write_text_whole(folder / MANIFEST, manifest_text({"format": FORMAT, **manifest}))


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """What stands in the file: the manifest, with a checksum of its values."""
    return json.dumps({**manifest, CHECKSUM: _checksum_of(manifest)}, indent=1) + "\n"


def _checksum_of(manifest: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def write_shard(folder: Path, manifest: Mapping[str, Any], number: int, tensors: dict[str, Tensor], claim: Claim) -> None:
    """Writes a shard with its checksum and mark; it appears when it is whole, and if the folder is still that of the claim."""
    mark = shard_mark(manifest, number)
    _save(folder / manifest["shards"][number]["file"], tensors, {SEAL: f"{mark}-{_checksum(tensors)}"}, claim.check)


def shard_mark(manifest: Mapping[str, Any], number: int) -> str:
    """Which shard of which cache one is: a hash over key, layers, format, index and number."""
    parts = {name: manifest[name] for name in ("key", "layers", "dtype", "hidden_size", "index")}
    return xxhash.xxh3_128(json.dumps([parts, number], sort_keys=True).encode()).hexdigest()


def open_shard(folder: Path, manifest: Mapping[str, Any], number: int) -> tuple[Any, str]:
    """A shard, opened by memory map, and the checksum that it carries, which is not compared here.

    Raises:
        StaleCacheError: If it is no shard of this cache, or belongs to another place in it.
        ValueError: If it cannot be read, or does not hold the planned tensors.
    """
    planned = manifest["shards"][number]
    path = folder / planned["file"]
    shape = [planned["tokens"], len(manifest["layers"]), manifest["hidden_size"]]
    expected = {"states": (shape, SAFETENSORS_DTYPES[manifest["dtype"]])}
    if has_scales(manifest["dtype"]):
        expected["scales"] = (shape[:2], SAFETENSORS_DTYPES["float32"])
    remedy = "Run the extraction again with the same settings; it makes only this shard anew."
    try:
        if not path.is_file():  # a pipe would never end
            raise FileNotFoundError("no such file")
        file = safe_open(path, "pt")
        mark, _, stated = (file.metadata() or {}).get(SEAL, "").partition("-")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        found = {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"The shard {str(path)!r} is missing or damaged: {error}. {remedy}") from error
    if mark != shard_mark(manifest, number):
        raise StaleCacheError(f"The shard {str(path)!r} belongs to another cache, or to another place in this one. {remedy}")
    if found != expected:
        raise ValueError(f"The shard {str(path)!r} is damaged: it holds {found}, the manifest has {expected}. {remedy}")
    return file, stated


def read_shard(folder: Path, manifest: Mapping[str, Any], number: int) -> dict[str, Tensor]:
    """The tensors of a shard, in memory, after one read that also compares their checksum.

    Raises:
        ValueError: If it is no shard of this cache, or is missing or damaged.
    """
    file, stated = open_shard(folder, manifest, number)
    tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (of the file they are a memory map)
    if stated != _checksum(tensors):
        raise ValueError(
            f"The shard {str(folder / manifest['shards'][number]['file'])!r} is damaged: the checksum does not fit. Run the extraction "
            "again with the same settings; it makes only this shard anew."
        )
    return tensors


def shard_is_whole(folder: Path, manifest: Mapping[str, Any], number: int) -> bool:
    """Whether a shard is there, is that one of this cache, holds the planned tensors, and has the checksum that it carries."""
    try:
        file, stated = open_shard(folder, manifest, number)
        return stated == _checksum({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, ValueError):
        return False


def is_only_begun(folder: Path) -> bool:
    """Whether a folder without a manifest holds nothing but what a run leaves that was killed before it wrote one."""
    with contextlib.suppress(FileNotFoundError):  # the folder went meanwhile
        return all(path.name in (INDEX, LOCK) or _is_leftover(path) for path in folder.iterdir())
    return True


def remove_leftovers(folder: Path) -> None:
    """Removes what runs which are dead by now were writing; call it before this run writes any, with the folder claimed."""
    for path in folder.iterdir():
        process = _writer(path)
        dead = process is not None and (process == os.getpid() or not psutil.pid_exists(process))
        if dead and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif dead or SAFETENSORS_TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _is_leftover(path: Path) -> bool:
    return _writer(path) is not None or SAFETENSORS_TEMPORARY.fullmatch(path.name) is not None


def _writer(path: Path) -> int | None:
    """The id of the process that writes, or was writing, a file of a cache under a temporary name; None for other files."""
    name, process = temporary_of(path.name) or ("", None)
    return process if FILES.fullmatch(name) else None


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], check: Callable[[], None]) -> None:
    # in a folder of its own: safetensors writes under a random name beside the file, which nobody would know after a kill
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        save_file(tensors, beside / path.name, metadata)
        check()
        (beside / path.name).replace(path)
    except (OSError, SafetensorError) as error:
        check()
        raise OSError(
            f"The file {str(path)!r} could not be written ({error}). {_advice(path, error)} Then run the extraction again with the "
            "same settings; it keeps what is there and goes on."
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _unreadable(folder: Path, error: PermissionError) -> PermissionError:
    return PermissionError(
        f"The {MANIFEST} of the folder {str(folder)!r} may not be read ({error.strerror}). Give yourself the right to read the folder "
        "and its files."
    )


def _advice(path: Path, error: Exception) -> str:
    if path.is_dir():
        return "A folder of that name is in its place: move it away."
    if "space" in str(error) or "quota" in str(error):  # safetensors passes the system's words on
        return "The disk is full: make room."
    return "Check the disk and the rights on the folder."


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()  # against damage, not against forgers: ten times as fast as SHA-256
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}{tensors[name].dtype}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
