"""One forward pass over the data that writes the layer states, shard by shard; it can be stopped and gone on with."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..backbone import Backbone
from ..tuner import layers_read
from .cache import LayerStateCache
from .key import LABELS, backbone_of, cache_key, key_differences, row_signature
from .storage import (
    DTYPES,
    MANIFEST,
    StaleCacheError,
    read_index,
    read_manifest,
    shard_is_whole,
    write_plan,
    write_shard,
)

BATCH_SIZE = 32
# Small shards are cheap to make again; large caches should not fall into thousands of files.
SHARDS, SMALLEST_SHARD, LARGEST_SHARD = 64, 32 * 2**20, 2**30
INT8_MAX = 127


@dataclass
class Plan:
    """What an extraction will write; made before a byte is written, the same for the same rows.

    Attributes:
        manifest: Key, layers, dtype, width and shards.
        batches: For each shard its batches, as numbers of rows of the data.
        signatures: `(rows, 16)` uint8, the signature of each row.
        places: `(rows, 3)` int64, shard, first token and number of tokens of each row.
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
        return (
            f"{self.bytes / 2**20:,.1f} MiB: {len(self.places):,} rows, {tokens:,} tokens x {len(m['layers'])} layers x "
            f"{m['hidden_size']} values in {m['dtype']}, {len(m['shards'])} shards"
        )


def plan_cache(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    *,
    dtype: str = "float16",
    layers: Sequence[int] | None = None,
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
    if not len(rows):
        raise ValueError("There are no rows to cache. Give at least one tokenised row.")
    backbone, layer = backbone_of(model)
    wanted = layers_read(layer) if layers is None and layer is not None else layers
    chosen = sorted({*(range(1, backbone.num_layers + 1) if wanted is None else wanted), backbone.num_layers})
    if chosen[0] < 0 or chosen[-1] > backbone.num_layers:
        raise ValueError(f"layers={chosen}: the backbone has the layer states 0 to {backbone.num_layers}.")
    shapes = [_shape(row) for row in rows]
    lengths = _lengths(backbone, rows, shapes)
    order = sorted(range(len(rows)), key=lambda i: (-lengths[i], shapes[i], i))
    token_bytes = len(chosen) * (backbone.hidden_size * DTYPES[dtype].itemsize + (4 if dtype == "int8" else 0))
    if shard_bytes is None:
        shard_bytes = min(max(token_bytes * sum(lengths) // SHARDS, SMALLEST_SHARD), LARGEST_SHARD)
    batches: list[list[list[int]]] = []
    shards: list[dict[str, Any]] = []
    places = torch.empty(len(rows), 3, dtype=torch.int64)
    for batch in _batches(order, shapes, batch_size):
        tokens = sum(lengths[i] for i in batch)
        if not shards or (shards[-1]["tokens"] + tokens) * token_bytes > shard_bytes:
            shards.append({"file": f"shard-{len(shards):05d}.safetensors", "rows": 0, "tokens": 0, "bytes": 0})
            batches.append([])
        for i in batch:
            places[i] = torch.tensor([len(shards) - 1, shards[-1]["tokens"], lengths[i]])
            shards[-1]["tokens"] += lengths[i]
        shards[-1]["rows"] += len(batch)
        shards[-1]["bytes"] = shards[-1]["tokens"] * token_bytes
        batches[-1].append(batch)
    signatures = torch.stack([torch.frombuffer(bytearray(row_signature(row)), dtype=torch.uint8) for row in rows])
    manifest = {
        "key": cache_key(model, tokenizer, max_length),
        "layers": chosen,
        "dtype": dtype,
        "hidden_size": backbone.hidden_size,
        "batch_size": batch_size,
        "shards": shards,
    }
    return Plan(manifest, batches, signatures, places)


def cache_layer_states(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    folder: str | Path,
    collator: Callable[[list[Any]], Any] | None = None,
    *,
    dtype: str = "float16",
    layers: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
    shard_bytes: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    progress: bool = True,
) -> LayerStateCache:
    """Computes the layer states of rows once, and writes them to a folder.

    Rows run in batches of like length, without a graph. A run that was stopped goes on at the first shard that is not
    whole; a damaged shard is made again; the bytes are those of an unbroken run. Under `accelerate launch`, each process
    makes a part of the shards.

    Args:
        model: A transformers model, with a fusion attached or not; nothing inside its backbone may train.
        rows: Tokenised rows; labels are not needed.
        folder: New, empty, or with the same cache begun.
        collator: Pads a list of rows to a batch, the task's own for example; may be left out if all rows have one length.
        dtype: `float16`, `bfloat16`, `float32`, or `int8` (half the bytes of 16 bits, one scale per token and layer).
        layers: Layer states to keep; None means those that the attached fusion reads, without one `1 .. L`. `z_L` is always
            among them.
        batch_size: Rows per batch.
        shard_bytes: Size of a shard at most, unless one batch is larger; None means a 64th of the cache, between 32 MiB and
            1 GiB.
        tokenizer: Goes into the key, so that another one is noticed as such.
        max_length: Likewise.
        progress: Print the size before writing, and show a bar.

    Returns:
        The cache, its checksums verified.

    Raises:
        StaleCacheError: If the folder holds a cache of something else.
        OSError: If the disk would not hold it; nothing is written then.
        ValueError: If something trains inside the backbone, or a state does not fit float16.
    """
    folder = Path(folder)
    plan = plan_cache(
        model,
        rows,
        dtype=dtype,
        layers=layers,
        batch_size=batch_size,
        shard_bytes=shard_bytes,
        tokenizer=tokenizer,
        max_length=max_length,
    )
    process = PartialState()
    shards = plan.manifest["shards"]
    if process.is_main_process:
        _prepare(folder, plan)
    process.wait_for_everyone()
    todo = [i for i, shard in enumerate(shards) if not shard_is_whole(folder / shard["file"], shard)]
    process.wait_for_everyone()  # no process may take another's fresh shard for one that was there
    if progress and process.is_main_process:
        state = "complete" if not todo else f"{len(shards) - len(todo)} of {len(shards)} shards there"
        print(f"{folder}: {plan}; {state}", flush=True)
    mine = todo[process.process_index :: process.num_processes]
    bar = tqdm(
        total=sum(shards[i]["rows"] for i in mine),
        unit="row",
        desc="layer states",
        disable=not (progress and process.is_main_process and mine),
    )
    backbone, _ = backbone_of(model)
    # a shard is hashed and written while the next is computed
    with bar, ThreadPoolExecutor(1) as writer, _only_backbone(model, backbone):
        writing: list[Future[None]] = []
        for number in mine:
            tensors = _extract(backbone, rows, plan, number, collator, bar)
            if writing:  # never more than two shards in memory
                writing.pop().result()
            writing.append(writer.submit(_write, folder / shards[number]["file"], tensors, plan.manifest["layers"]))
        if writing:
            writing.pop().result()
    process.wait_for_everyone()
    return LayerStateCache(folder, model, verify=False)


def _prepare(folder: Path, plan: Plan) -> None:
    """Checks folder and disk, and writes the plan."""
    if (folder / MANIFEST).is_file():
        _check_same(folder, plan)
    elif folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"The folder {str(folder)!r} is not empty and holds no cache of layer states. Give a new or empty folder."
        )
    there = folder
    while not there.exists():
        there = there.parent
    done = sum((folder / s["file"]).stat().st_size for s in plan.manifest["shards"] if (folder / s["file"]).is_file())
    free = shutil.disk_usage(there).free
    if plan.bytes - done > free:
        raise OSError(
            f"The layer states need {(plan.bytes - done) / 2**20:,.1f} MiB ({plan}), and the disk of {str(there)!r} has "
            f"{free / 2**20:,.1f} MiB free. Nothing was written. Choose another folder, dtype='int8', fewer layers "
            "(fusion_layers), or fewer rows."
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).is_file():
        write_plan(folder, plan.manifest, plan.signatures, plan.places)


def _check_same(folder: Path, plan: Plan) -> None:
    """Raises StaleCacheError if a folder was begun with another plan."""
    stored = read_manifest(folder)
    wrong = key_differences(stored["key"], plan.manifest["key"])
    names = ("dtype", "layers", "batch_size")
    wrong += [f"{n}: {stored[n]} in the cache, {plan.manifest[n]} now" for n in names if stored[n] != plan.manifest[n]]
    if not wrong:
        known = {s.tobytes() for s in read_index(folder)[0].numpy()}
        wanted = {s.tobytes() for s in plan.signatures.numpy()}
        new, gone = len(wanted - known), len(known - wanted)
        if new or gone:
            wrong = [
                f"text: {new} of {len(plan.signatures)} rows are not in the cache, {gone} of its rows are not among these"
            ]
        elif stored["shards"] != plan.manifest["shards"]:
            wrong = [f"shards: {len(stored['shards'])} in the cache, {len(plan.manifest['shards'])} now"]
    if wrong:
        raise StaleCacheError(
            f"The folder {str(folder)!r} holds a cache of something else; {'; '.join(wrong)}. Give another folder, or delete "
            "this one."
        )


def _shape(row: Mapping[str, Any]) -> tuple[Any, ...]:
    if "input_ids" in row:
        return ()
    return tuple((n, tuple(torch.as_tensor(v).shape)) for n, v in sorted(row.items()) if n not in LABELS and v is not None)


def _lengths(backbone: Backbone, rows: Sequence[Mapping[str, Any]], shapes: list[tuple[Any, ...]]) -> list[int]:
    """Positions of each row: real tokens of a text; for images and sound what the backbone makes of such a shape."""
    known: dict[tuple[Any, ...], int] = {}
    lengths = []
    for row, shape in zip(rows, shapes, strict=True):
        if "input_ids" in row:
            mask = row.get("attention_mask")
            lengths.append(len(row["input_ids"]) if mask is None else int(sum(mask)))
            continue
        if shape not in known:
            inputs = {n: torch.as_tensor(v)[None].to(backbone.device) for n, v in row.items() if n not in LABELS}
            with torch.no_grad(), recorded(backbone, [backbone.num_layers]) as states:
                backbone.base(**inputs)
            known[shape] = states[backbone.num_layers].shape[1]
        lengths.append(known[shape])
    return lengths


def _batches(order: list[int], shapes: list[tuple[Any, ...]], size: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == size or shapes[i] != shapes[batch[0]]):
            yield batch
            batch = []
        batch.append(i)
    yield batch


@contextlib.contextmanager
def _only_backbone(model: nn.Module, backbone: Backbone) -> Iterator[None]:
    """For the time of an extraction: evaluation mode, no graph, no fusion."""
    modes = [(module, module.training) for module in backbone.base.modules()]
    backbone.base.eval()
    try:
        with torch.no_grad(), model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def recorded(backbone: Backbone, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Records layer states of the calls in the body; the dictionary holds those of the last call, `(B, T, d)` each."""
    wanted, states, count = set(layers), {}, 0

    def begin(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count
        if count in (0, backbone.num_layers):
            count = 0
            if 0 in wanted:
                states[0] = args[0] if args else kwargs["hidden_states"]

    def end(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal count
        count += 1
        if count in wanted:
            states[count] = output[0] if isinstance(output, tuple) else output

    handles = [backbone.blocks[0].register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [block.register_forward_hook(end) for block in dict.fromkeys(backbone.blocks)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _extract(
    backbone: Backbone,
    rows: Sequence[Mapping[str, Any]],
    plan: Plan,
    number: int,
    collator: Callable[[list[Any]], Any] | None,
    bar: Any,
) -> dict[str, Tensor]:
    """The tensors of one shard."""
    m = plan.manifest
    layers, dtype, tokens = m["layers"], m["dtype"], m["shards"][number]["tokens"]
    result = {"states": torch.empty(tokens, len(layers), m["hidden_size"], dtype=DTYPES[dtype])}
    if dtype == "int8":
        result["scales"] = torch.empty(tokens, len(layers))
    start = 0
    for batch in plan.batches[number]:
        inputs = _inputs(backbone, [rows[i] for i in batch], collator)
        mask = inputs.get("attention_mask") if "input_ids" in inputs else None
        with recorded(backbone, layers) as states:
            backbone.base(**inputs)
        end = start + int(plan.places[batch, 2].sum())
        real = None if mask is None or bool(mask.all()) else mask.flatten().nonzero().squeeze(1)
        for column, layer in enumerate(layers):
            flat = states[layer].flatten(0, 1)  # (B T, d)
            chosen = flat if real is None else flat.index_select(0, real)
            if len(chosen) != end - start:
                raise ValueError(
                    f"A batch of {len(batch)} rows has {len(chosen)} positions, but its rows have {end - start}. Give a collator that "
                    "pads rows and makes an attention_mask, and does not cut them."
                )
            _store(result, slice(start, end), column, chosen)
        start = end
        bar.update(len(batch))
    return result


def _inputs(
    backbone: Backbone, rows: list[Mapping[str, Any]], collator: Callable[[list[Any]], Any] | None
) -> dict[str, Any]:
    plain = [{n: v for n, v in row.items() if n not in LABELS} for row in rows]
    if collator is not None:
        batch = dict(collator(plain))
    elif len({tuple(len(v) for v in row.values()) for row in plain}) == 1:
        batch = {n: torch.stack([torch.as_tensor(row[n]) for row in plain]) for n in plain[0]}
    else:
        raise ValueError("The rows differ in length, and there is no collator to pad them. Give the task's collator.")
    return {n: v.to(backbone.device) for n, v in batch.items() if n not in LABELS and isinstance(v, Tensor)}


def _store(result: dict[str, Tensor], where: slice, column: int, states: Tensor) -> None:
    """Writes states `(tokens, d)` into a column of a shard."""
    target = result["states"]
    if target.dtype == torch.int8:
        scales = states.float().abs().amax(-1).clamp_min(1e-12) / INT8_MAX  # (tokens,)
        result["scales"][where, column] = scales.cpu()
        target[where, column] = (states.float() / scales[:, None]).round().to(torch.int8).cpu()
    else:
        target[where, column].copy_(states)


def _write(path: Path, tensors: dict[str, Tensor], layers: Sequence[int]) -> None:
    """Writes a shard, unless float16 could not hold a state."""
    states = tensors["states"]
    if states.dtype == torch.float16 and bool(states.isinf().any()):
        wrong = [layer for column, layer in enumerate(layers) if bool(states[:, column].isinf().any())]
        raise ValueError(
            f"The layer states {wrong} hold values beyond {torch.finfo(torch.float16).max:,.0f}, where float16 ends. Use "
            "dtype='bfloat16'. Nothing of this shard was written."
        )
    write_shard(path, tensors)
