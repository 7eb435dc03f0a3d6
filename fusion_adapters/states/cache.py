"""`LayerStateCache`: layer states on disk, found by row and read by memory map."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .dataset import CachedCollator, CachedDataset
from .formats import DTYPES, has_scales, widened
from .key import LABELS, cache_key, completed, key_differences, row_signature, tokenizer_signature, uncached_inputs
from .means import check_means
from .source import Source, base_of, source_of
from .storage import StaleCacheError, open_shard, read_index, read_manifest, read_shard, shard_is_whole


def columns_of(model: nn.Module | Source | None) -> frozenset[str] | None:
    """The columns that `Trainer` would hand on to a collator for a model: its arguments, and labels; None if it is not known."""
    if not isinstance(model, nn.Module):
        return None
    return frozenset({*inspect.signature(base_of(model).forward).parameters, *LABELS})


class LayerStateCache:
    """Layer states on disk, read by memory map.

    Args:
        folder: A folder that `cache_layer_states` wrote.
        model: The model that will train from it, see `check`; datasets then hold the layers that its fusion reads.
        verify: Read every shard once and compare its checksum.
        tokenizer: That of the rows, see `check`.
        max_length: Likewise.

    Attributes:
        layers: Indices of the cached layer states, ascending; the last is `L`.
        dtype: How they are stored: `float32`, `float16`, `bfloat16`, `float8` or `int8`.
        bytes: The size of all shards.

    Raises:
        FileNotFoundError: If the folder holds no cache, or shards are missing.
        StaleCacheError: If the cache belongs to another backbone, or lacks layers.
        ValueError: If the index or a shard is damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        model: nn.Module | Source | None = None,
        verify: bool = True,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.layers: list[int] = self.manifest["layers"]
        self.dtype: str = self.manifest["dtype"]
        self._readers: dict[int, Any] = {}
        self._rows: dict[bytes, int] | None = None
        missing = [s["file"] for s in self.manifest["shards"] if not (self.folder / s["file"]).is_file()]
        if missing:
            raise FileNotFoundError(
                f"The cache {str(self.folder)!r} is not complete: {len(missing)} of {len(self.manifest['shards'])} shards are "
                "missing. Run the extraction again with the same settings; it goes on where it stopped."
            )
        signatures, places = read_index(self.folder, self.manifest)
        self._signatures = [s.tobytes() for s in signatures.numpy()]
        self._places: list[tuple[int, int, int]] = places.tolist()  # shard, first token, tokens
        self.bytes: int = sum(shard["bytes"] for shard in self.manifest["shards"])
        self.wanted = self.layers  # what a dataset reads
        self.columns = columns_of(model)
        self._cut_otherwise: list[str] = []
        if model is not None:
            self._serve(model, tokenizer, max_length)
        if verify:
            shards = self.manifest["shards"]
            damaged = [s["file"] for i, s in enumerate(shards) if not shard_is_whole(self.folder, self.manifest, i)]
            if damaged:
                raise ValueError(
                    f"{len(damaged)} of {len(self.manifest['shards'])} shards of the cache {str(self.folder)!r} are damaged "
                    f"({', '.join(damaged[:4])}): the checksum does not fit, or they belong to another cache. Run the "
                    "extraction again with the same settings; it makes only these anew."
                )

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        tokens = sum(s["tokens"] for s in self.manifest["shards"])
        what = "means" if self.manifest.get("means") else "tokens"
        return (
            f"LayerStateCache({str(self.folder)!r}, {len(self)} rows, {tokens} {what}, layers {self.layers}, {self.dtype})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}  # open files do not travel to the processes of a data loader

    def serving(self, model: nn.Module) -> LayerStateCache:
        """The same cache for another model that trains from it; what is in memory is shared.

        Raises:
            StaleCacheError: See `check`.
        """
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)  # a copy as for another process would leave the shards behind
        other.columns = columns_of(model)
        other._serve(model, None, None)
        return other

    def _serve(self, model: nn.Module | Source, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None) -> None:
        source = source_of(model)
        self.check(source, tokenizer, max_length)
        self.wanted = self.layers if source.layers is None else list(source.layers)

    def hold(self) -> None:
        """Reads each shard once, whole, into memory, and compares its checksum; from then on nothing is read from the disk.

        Processes that are started anew, as the workers of a data loader on some systems, read from the disk all the same.

        Raises:
            ValueError: If a shard is damaged.
            RuntimeError: If the shards do not fit, see `bytes`.
        """
        self._readers = {i: read_shard(self.folder, self.manifest, i) for i in range(len(self.manifest["shards"]))}

    def rows_cut_by(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        """Tells how the rows were made that `find` will look for; where some are not there, its message says what differs.

        A row that has the same pieces has the same states, whatever the length at which longer texts are cut.
        """
        now = {"tokenizer": tokenizer_signature(tokenizer), "max_length": max_length}
        self._cut_otherwise = key_differences({name: self.manifest["key"].get(name) for name in now}, now)

    def check(
        self,
        model: nn.Module | Source,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
    ) -> None:
        """Checks that the states are those of a model's backbone, or of the part that runs under the attached fusion.

        Args:
            model: The model, attached or not, or a `Source`.
            tokenizer: The tokenizer of the rows; None leaves it out of the comparison.
            max_length: The length to which texts are cut; None likewise.

        Raises:
            StaleCacheError: If a part of the key differs (the message names it), or the fusion reads a layer that was
                not cached, or the cache holds means over positions and the model reads the positions.
        """
        source = source_of(model)
        stored = self.manifest["key"]
        wrong = key_differences(stored, cache_key(source, tokenizer, max_length))
        # one of all blocks holds the states of the lower ones
        if wrong and not (
            source.backbone.above and not key_differences(stored, cache_key(source.whole, tokenizer, max_length))
        ):
            raise StaleCacheError(
                f"The cache {str(self.folder)!r} was made for something else; {'; '.join(wrong)}. Its states would be wrong "
                "here. Extract into another folder, or go back to what the cache was made for."
            )
        check_means(self.folder, self.manifest, source)
        lacking = sorted(set(source.layers or ()) - set(self.layers))
        if lacking:
            raise StaleCacheError(
                f"The fusion reads the layer states {lacking}, which the cache {str(self.folder)!r} does not hold (it has "
                f"{self.layers}). Extract again into another folder with this model, or set fusion_layers to what is there."
            )

    def find(self, rows: Sequence[Mapping[str, Any]]) -> list[int]:
        """The numbers of rows in the cache, by their model inputs.

        Raises:
            StaleCacheError: If a row is not in the cache; says how many.
        """
        if self._rows is None:
            self._rows = {s: i for i, s in enumerate(self._signatures)}
        known, cached = self.manifest.get("known_inputs", []), self.manifest["inputs"]
        found = []
        for number, row in enumerate(rows):
            if new := uncached_inputs(row, known, cached):
                raise StaleCacheError(
                    f"Row {number} has the model input {new[0]!r}, which no row had when the cache {str(self.folder)!r} was made "
                    f"(they had {', '.join(cached)}): its states would be others. Extract the states of these data."
                )
            found.append(self._rows.get(row_signature(completed(row, cached), cached), -1))
        absent = found.count(-1)
        if absent:
            differs = f" ({'; '.join(self._cut_otherwise)})" if self._cut_otherwise else ""
            raise StaleCacheError(
                f"{absent} of {len(found)} rows are not in the cache {str(self.folder)!r} (the first: row {found.index(-1)}): "
                f"their text is another, or was tokenised or cut in another way{differs}. Extract the states of these data."
            )
        return found

    def length(self, number: int) -> int:
        """The number of positions of a row."""
        return self._places[number][2]

    def read(
        self,
        numbers: Sequence[int],
        layers: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        keep: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """States of rows, one after the other, without padding.

        Args:
            numbers: Numbers of rows, see `find`.
            layers: Which layers; None means all of the cache.
            dtype: Of the result; None keeps the stored one (float32 for float8 and int8).
            keep: For each row which of its positions to read, int64, ascending; None means all.

        Returns:
            `(N, tokens, d)`, the layers first, so that each layer lies in one piece.
        """
        columns = [self.layers.index(i) for i in (self.layers if layers is None else layers)]
        if dtype is None:
            dtype = torch.float32 if has_scales(self.dtype) else DTYPES[self.dtype]
        starts, total = [], 0
        for i, number in enumerate(numbers):
            starts.append(total)
            total += self._places[number][2] if keep is None else len(keep[i])
        result = torch.empty(len(columns), total, self.manifest["hidden_size"], dtype=dtype)
        everything = columns == list(range(len(self.layers)))
        # in the order of the files, whatever the order of the batch
        for i in sorted(range(len(numbers)), key=lambda i: self._places[numbers[i]]):
            shard, first, count = self._places[numbers[i]]
            reader = self._reader(shard)
            states = reader["states"][first : first + count]  # (tokens, layers, d)
            if not everything:
                states = states[:, columns]
            if "scales" in reader:
                states = widened(states, reader["scales"][first : first + count][:, columns])
            if keep is not None:
                states = states.index_select(0, keep[i])
            result[:, starts[i] : starts[i] + len(states)].copy_(states.transpose(0, 1))
        return result

    def dataset(
        self,
        rows: Sequence[Mapping[str, Any]],
        layers: Sequence[int] | None = None,
        positions: str = "all",
        remove_unused_columns: bool = True,
    ) -> CachedDataset:
        """A dataset of these rows with the states that the model reads, see `CachedDataset`."""
        return CachedDataset(self, rows, self.wanted if layers is None else layers, positions, remove_unused_columns)

    def collator(self, collator: Any, dtype: torch.dtype | None = None) -> CachedCollator:
        """The task's collator with the states added to its batches, see `CachedCollator`."""
        return CachedCollator(collator, dtype)

    def _reader(self, shard: int) -> dict[str, Any]:
        reader = self._readers.get(shard)
        if reader is None:
            file, _ = open_shard(self.folder, self.manifest, shard)
            reader = self._readers[shard] = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return reader
