"""What an extraction will write: rows in batches of like length, batches in shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..backbone.blocks import Backbone
from ..backbone.record import recorded, run
from .formats import DTYPES, state_bytes
from .key import cache_key, check_rows, input_names, known_inputs, row_signature
from .means import holds_means, padding_token, text_length
from .source import Source, source_of
from .storage import index_checksum

BATCH_SIZE = 32
# Small shards are cheap to make again; large caches should not fall into thousands of files.
SHARDS, SMALLEST_SHARD, LARGEST_SHARD = 64, 8 * 2**20, 2**30


@dataclass
class Plan:
    """What an extraction will write; made before a byte is written, the same for the same rows.

    Attributes:
        manifest: Key, layers, dtype, width, checksum of the index, and shards.
        batches: For each shard its batches, as numbers of rows of the data.
        signatures: `(rows, 16)` uint8, the signature of each row that is stored, in the order of the shards.
        places: `(rows, 3)` int64, shard, first token and number of tokens of each of these.
    """

    manifest: dict[str, Any]
    batches: list[list[list[int]]]
    signatures: Tensor
    places: Tensor

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(shard["bytes"] for shard in self.manifest["shards"])

    def __str__(self) -> str:
        m = self.manifest
        tokens = sum(shard["tokens"] for shard in m["shards"])
        what = "means over tokens" if m["means"] else "tokens"
        return (
            f"{self.bytes / 2**20:,.1f} MiB: {len(self.places):,} rows, {tokens:,} {what} x {len(m['layers'])} layers x "
            f"{m['hidden_size']} values in {m['dtype']}, {len(m['shards'])} shards"
        )


def plan_cache(
    model: nn.Module | Source,
    rows: Sequence[Mapping[str, Any]],
    *,
    dtype: str = "float16",
    layers: Sequence[int] | None = None,
    means: bool = True,
    batch_size: int = BATCH_SIZE,
    shard_bytes: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
) -> Plan:
    """Lays out a cache without writing anything; see `cache_layer_states` for the arguments.

    Raises:
        ValueError: If something trains inside the backbone, or a setting does not fit.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not a format of caches. Choose one of {', '.join(DTYPES)}.")
    check_rows(rows)
    if not len(rows):
        raise ValueError("There are no rows to cache. Give at least one tokenised row.")
    source = source_of(model)
    backbone = source.backbone
    wanted = source.layers if layers is None else layers
    chosen = sorted({*(range(1, backbone.num_layers + 1) if wanted is None else wanted), backbone.num_layers})
    if chosen[0] < 0 or chosen[-1] > backbone.num_layers:
        raise ValueError(f"layers={chosen}: the backbone has the layer states 0 to {backbone.num_layers}.")
    lacking = sorted(set(source.layers or ()) - set(chosen))
    if lacking:
        raise ValueError(
            f"layers={list(layers or ())}: the attached fusion reads the layer states {list(source.layers or ())}, and {lacking} are "
            "not among these. Leave layers out to keep what the fusion reads, or set fusion_layers. Nothing was extracted."
        )
    names = input_names(backbone, rows[0])
    _check_alike(rows, names, known_inputs(backbone))
    signatures = [row_signature(row, names) for row in rows]
    # each row once, in an order that does not depend on that of the rows: a cache can be mended from shuffled data
    first = {signature: i for i, signature in reversed(list(enumerate(signatures)))}
    shapes = {i: _shape(rows[i], names) for i in first.values()}
    with source.quiet():
        lengths = _lengths(backbone, rows, shapes, names)
    order = sorted(first.values(), key=lambda i: (-lengths[i], shapes[i], signatures[i]))
    means = means and holds_means(source, names, [rows[i] for i in order])
    if means:  # from here on a text has one state a layer
        lengths = dict.fromkeys(lengths, 1)
    token_bytes = len(chosen) * state_bytes(dtype, backbone.hidden_size)
    if shard_bytes is None:
        shard_bytes = min(max(token_bytes * sum(lengths.values()) // SHARDS, SMALLEST_SHARD), LARGEST_SHARD)
    batches: list[list[list[int]]] = []
    shards: list[dict[str, Any]] = []
    places: list[list[int]] = []
    for batch in _batches(order, shapes, batch_size):
        tokens = sum(lengths[i] for i in batch)
        if not shards or (shards[-1]["tokens"] + tokens) * token_bytes > shard_bytes:
            shards.append({"file": f"shard-{len(shards):05d}.safetensors", "rows": 0, "tokens": 0, "bytes": 0})
            batches.append([])
        for i in batch:
            places.append([len(shards) - 1, shards[-1]["tokens"], lengths[i]])
            shards[-1]["tokens"] += lengths[i]
        shards[-1]["rows"] += len(batch)
        shards[-1]["bytes"] = shards[-1]["tokens"] * token_bytes
        batches[-1].append(batch)
    ordered = torch.frombuffer(bytearray(b"".join(signatures[i] for i in order)), dtype=torch.uint8).view(-1, 16)
    located = torch.tensor(places)
    manifest = {
        "key": cache_key(source, tokenizer, max_length),
        "layers": chosen,
        "dtype": dtype,
        "hidden_size": backbone.hidden_size,
        "means": means,
        "pad_token_id": padding_token(source),
        "inputs": names,
        "known_inputs": known_inputs(backbone),
        "batch_size": batch_size,
        "shard_bytes": shard_bytes,
        "index": index_checksum(ordered, located),
        "shards": shards,
    }
    return Plan(manifest, batches, ordered, located)


def _check_alike(rows: Sequence[Mapping[str, Any]], names: Sequence[str], known: Sequence[str]) -> None:
    """Raises ValueError for a row with other inputs than the first: a collator would drop them, or fail."""
    if hasattr(rows, "column_names"):  # of a Dataset: all rows have them
        return
    for number, row in enumerate(rows):
        other = sorted({name for name in known if name in row}.symmetric_difference(names))
        if other:
            raise ValueError(
                f"Row {number} and row 0 do not have the same model inputs: {', '.join(other)} is in one of them alone. Give all rows "
                "the same."
            )


def _shape(row: Mapping[str, Any], names: Sequence[str]) -> tuple[Any, ...]:
    if "input_ids" in names:
        return ()
    return tuple((n, tuple(torch.as_tensor(row[n]).shape)) for n in names if row.get(n) is not None)


def _lengths(
    backbone: Backbone, rows: Sequence[Mapping[str, Any]], shapes: Mapping[int, tuple[Any, ...]], names: Sequence[str]
) -> dict[int, int]:
    """Positions of rows: real tokens of a text; for images and sound what the backbone makes of such a shape."""
    known: dict[tuple[Any, ...], int] = {}
    lengths = {}
    for i, shape in shapes.items():
        row = rows[i]
        if "input_ids" in names:
            lengths[i] = text_length(row)
            continue
        if shape not in known:
            inputs = {n: torch.as_tensor(row[n])[None].to(backbone.device) for n in names if row.get(n) is not None}
            seen: list[int] = []
            with recorded(backbone, [backbone.num_layers], lambda _, z, seen=seen: seen.append(z.shape[1])):  # type: ignore[misc]
                run(backbone, inputs)
            (known[shape],) = seen
        lengths[i] = known[shape]
    return lengths


def _batches(order: list[int], shapes: Mapping[int, tuple[Any, ...]], size: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == size or shapes[i] != shapes[batch[0]]):
            yield batch
            batch = []
        batch.append(i)
    yield batch
