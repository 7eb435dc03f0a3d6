"""One forward pass over the data that writes the layer states, shard by shard; it can be stopped and gone on with."""

from __future__ import annotations

import contextlib
import inspect
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..backbone.blocks import Backbone
from ..backbone.record import recorded, run
from .cache import LayerStateCache, columns_of
from .claim import Claim, claimed
from .formats import DTYPES, has_scales, narrowed
from .key import check_rows, key_differences
from .means import check_lengths, means_of_texts
from .plan import BATCH_SIZE, Plan, plan_cache
from .seen import check_seen, padded_right
from .source import Source, source_of
from .storage import (
    StaleCacheError,
    has_manifest,
    is_only_begun,
    read_index,
    read_manifest,
    remove_leftovers,
    shard_is_whole,
    write_index,
    write_plan,
    write_shard,
)

PADDING_TOLERANCE = 0.05  # of the states' norm: above what 16 bits and quantisation change, far below what a position does
POSITIVE_INFINITY, NEGATIVE_INFINITY = 0x7C00, 0xFC00  # bits of float16


def cache_layer_states(
    model: nn.Module | Source,
    rows: Sequence[Mapping[str, Any]],
    folder: str | Path,
    collator: Callable[[list[Any]], Any] | None = None,
    *,
    dtype: str = "float16",
    layers: Sequence[int] | None = None,
    means: bool = True,
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
        model: A transformers model, with a fusion attached or not; nothing inside its backbone may train. Or a `Source`.
        rows: Tokenised rows; labels are not needed.
        folder: New, empty, or with the same cache begun.
        collator: Pads a list of rows to a batch, the task's own for example; may be left out if all rows have one length.
        dtype: `float16`, `bfloat16`, `float32`, `float8` or `int8` (half the bytes of 16 bits, one scale per token and layer).
        layers: Layer states to keep; None means those that the attached fusion reads, without one `1 .. L`. `z_L` is always
            among them.
        means: Keep one mean for each text where the model reads nothing else (`fusion_pool="mean"`); False keeps every position, for
            other adapters too.
        batch_size: Rows per batch.
        shard_bytes: Size of a shard at most, unless one batch is larger; None means that of the cache begun in the folder,
            without one a 64th of the cache, between 8 MiB and 1 GiB.
        tokenizer: Goes into the key, so that another one is noticed as such.
        max_length: Likewise.
        progress: Print the size before writing, and show a bar.

    Returns:
        The cache, its checksums verified.

    Raises:
        StaleCacheError: If the folder holds a cache of something else.
        OSError: If the disk would not hold it; nothing is written then.
        RuntimeError: If another run is writing into the folder.
        FileNotFoundError: If the folder was deleted meanwhile.
        ValueError: If something trains inside the backbone, the fusion reads other layers than `layers`, the collator changes the
            rows' inputs, or a state does not fit float16.
    """
    folder = Path(folder)
    check_rows(rows)
    if shard_bytes is None and has_manifest(folder):
        shard_bytes = read_manifest(folder)["shard_bytes"]
    source = source_of(model)
    plan = plan_cache(
        source,
        rows,
        dtype=dtype,
        layers=layers,
        means=means,
        batch_size=batch_size,
        shard_bytes=shard_bytes,
        tokenizer=tokenizer,
        max_length=max_length,
    )
    process = PartialState()
    with contextlib.ExitStack() as held:
        if process.is_main_process:
            _refuse_foreign(folder)
            held.enter_context(claimed(folder))
        _fill(source, rows, plan, folder, collator, process, progress)
    cache = LayerStateCache(folder, source, verify=False)
    cache.columns = columns_of(model)
    return cache


def _fill(
    source: Source,
    rows: Sequence[Mapping[str, Any]],
    plan: Plan,
    folder: Path,
    collator: Callable[[list[Any]], Any] | None,
    process: PartialState,
    progress: bool,
) -> None:
    """Writes what is not there yet."""
    shards = plan.manifest["shards"]
    if process.is_main_process:
        with Claim(folder).kept():
            _prepare(folder, plan, progress)
    process.wait_for_everyone()
    claim = Claim(folder)
    with claim.kept():
        # its marks stand in the shards, and it may know a tokenizer that was not given now
        plan.manifest["key"] = read_manifest(folder)["key"]
    todo = [i for i in range(len(shards)) if not shard_is_whole(folder, plan.manifest, i)]
    process.wait_for_everyone()  # no process may take another's fresh shard for one that was there
    mine = todo[process.process_index :: process.num_processes]
    bar = tqdm(
        total=sum(shards[i]["rows"] for i in mine),
        unit="row",
        desc="layer states",
        disable=not (progress and process.is_main_process and mine),
    )
    backbone = source.backbone
    # beside a GPU a shard is hashed and written while the next is computed; a CPU's own threads would wait for that
    beside = backbone.device.type != "cpu"
    with bar, ThreadPoolExecutor(1) as writer, source.quiet():
        writing: Future[None] | None = None
        for number in mine:
            tensors = _extract(backbone, rows, plan, number, collator, bar)
            if writing is not None:  # never more than two shards in memory
                writing.result()
            writing = writer.submit(_write, folder, plan.manifest, number, tensors, claim)
            if not beside:
                writing.result()
        if writing is not None:
            writing.result()
    claim.check()
    process.wait_for_everyone()


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(
            f"{str(folder)!r} is a file; a cache of layer states is a folder. Give a new or empty folder."
        )
    # twice: another run may write its manifest between two looks
    if folder.exists() and not has_manifest(folder) and not is_only_begun(folder) and not has_manifest(folder):
        raise FileExistsError(
            f"The folder {str(folder)!r} is not empty and holds no cache of layer states. Give a new or empty folder."
        )


def _prepare(folder: Path, plan: Plan, tell: bool) -> None:
    """Checks folder and disk, tells the size, and writes the plan."""
    index_is_whole = False
    if has_manifest(folder):
        index_is_whole = _check_same(folder, plan)
    _refuse_foreign(folder)
    remove_leftovers(folder)
    present = [folder / s["file"] for s in plan.manifest["shards"] if (folder / s["file"]).is_file()]
    done = sum(path.stat().st_size for path in present)
    free = shutil.disk_usage(folder).free
    if plan.bytes - done > free:
        raise OSError(
            f"The layer states need {(plan.bytes - done) / 2**20:,.1f} MiB ({plan}), and the disk of {str(folder)!r} has "
            f"{free / 2**20:,.1f} MiB free. Nothing was written. Choose another folder, dtype='float8', fewer layers "
            "(fusion_layers), or fewer rows."
        )
    if tell:
        print(f"{folder}: {plan}; {len(present)} of them there", flush=True)
    if not has_manifest(folder):
        write_plan(folder, plan.manifest, plan.signatures, plan.places)
    elif not index_is_whole:  # it follows from the rows
        write_index(folder, plan.signatures, plan.places)


def _check_same(folder: Path, plan: Plan) -> bool:
    """Whether the index of a folder is whole; raises StaleCacheError if the folder was begun with another plan."""
    stored = read_manifest(folder)
    wrong = key_differences(stored["key"], plan.manifest["key"])
    names = ("dtype", "layers", "batch_size", "means")
    wrong += [
        f"{n}: {stored.get(n, False)} in the cache, {plan.manifest[n]} now"
        for n in names
        if stored.get(n, False) != plan.manifest[n]
    ]
    try:
        stored_signatures: Tensor | None = read_index(folder, stored)[0]
    except ValueError:
        stored_signatures = None
    if not wrong and stored["index"] != plan.manifest["index"]:
        sizes = stored["shard_bytes"], plan.manifest["shard_bytes"]
        wrong = [f"shard_bytes: {sizes[0]} in the cache, {sizes[1]} now (None takes that of the cache)"]
        if stored_signatures is None:
            wrong = ["rows or shard_bytes: others, of which the cache's damaged index does not tell more"]
        else:
            known, wanted = ({s.tobytes() for s in each.numpy()} for each in (stored_signatures, plan.signatures))
            new, gone = len(wanted - known), len(known - wanted)
            if new or gone:
                wrong = [f"text: {new} of {len(wanted)} rows are not in the cache, {gone} of its rows are not among these"]
    if wrong:
        raise StaleCacheError(
            f"The folder {str(folder)!r} holds a cache of something else; {'; '.join(wrong)}. Give another folder, or delete "
            "this one."
        )
    return stored_signatures is not None


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
    if has_scales(dtype):
        result["scales"] = torch.empty(tokens, len(layers))
    start, row = 0, sum(shard["rows"] for shard in m["shards"][:number])
    for batch in plan.batches[number]:
        inputs = _inputs(backbone, [rows[i] for i in batch], m["inputs"], collator)
        mask = inputs.get("attention_mask") if "input_ids" in inputs else None
        if m["means"]:
            check_lengths(inputs, [rows[i] for i in batch])
        real = None if mask is None or bool(mask.all()) else mask.flatten().nonzero().squeeze(1)
        where = slice(start, start + int(plan.places[row : row + len(batch), 2].sum()))
        row += len(batch)

        def take(layer: int, state: Tensor, where: slice = where, real: Any = real, mask: Any = mask) -> None:
            if m["means"]:
                kept = means_of_texts(state, mask, backbone.causal)
            else:
                kept = state.flatten(0, 1) if real is None else state.flatten(0, 1).index_select(0, real)
            _store(result, dtype, where, layers.index(layer), kept)  # (states, d)

        with recorded(backbone, layers, take):
            run(backbone, inputs)
        start = where.stop
        bar.update(len(batch))
    return result


def _inputs(
    backbone: Backbone, rows: list[Mapping[str, Any]], names: Sequence[str], collator: Callable[[list[Any]], Any] | None
) -> dict[str, Any]:
    plain = [{n: row[n] for n in names if row.get(n) is not None} for row in rows]
    if collator is not None:
        batch = dict(collator(plain))
    elif len({tuple(len(v) for v in row.values()) for row in plain}) == 1:
        batch = {n: torch.stack([torch.as_tensor(row[n]) for row in plain]) for n in plain[0]}
    else:
        raise ValueError("The rows differ in length, and there is no collator to pad them. Give the task's collator.")
    known = inspect.signature(backbone.base.forward).parameters
    check_seen(batch, plain, names, list(known))
    wanted = {*names, "attention_mask"} & known.keys()  # a collator that pads may make the mask
    inputs: dict[str, Any] = {n: v.to(backbone.device) for n, v in batch.items() if n in wanted}
    if "use_cache" in known:
        inputs["use_cache"] = False
    mask = inputs.get("attention_mask") if "input_ids" in inputs else None
    if mask is None or mask.dim() != 2 or bool(mask[:, 0].all()):
        return inputs
    right = padded_right(inputs)
    _check_left_padding(backbone, inputs, right)
    return right


def _check_left_padding(backbone: Backbone, left: dict[str, Any], right: dict[str, Any]) -> None:
    """Raises ValueError if padding before the tokens changes their states: those of a row would depend on its batch."""
    seen: list[Tensor] = []
    with recorded(backbone, [backbone.num_layers], lambda _, state: seen.append(state)):
        for inputs in (left, right):
            row = {n: v[-1:] if isinstance(v, Tensor) else v for n, v in inputs.items()}  # the shortest of the batch
            run(backbone, row)
    real = [inputs["attention_mask"][-1].bool() for inputs in (left, right)]
    states, expected = (state[0][mask].float() for state, mask in zip(seen, real, strict=True))
    error = float((states - expected).norm() / expected.norm().clamp_min(1e-12))
    if error > PADDING_TOLERANCE:
        raise ValueError(
            f"The collator pads on the left, and this backbone ({backbone.model_type!r}) counts padding as positions: the states of a row "
            f"differ by {100 * error:.0f} % with {int((~real[0]).sum())} paddings before it, so they would depend on the other rows of "
            "its batch. Pad on the right: tokenizer.padding_side = 'right'."
        )


def _store(result: dict[str, Tensor], dtype: str, where: slice, column: int, states: Tensor) -> None:
    """Writes states `(tokens, d)` into a column of a shard."""
    if len(states) != where.stop - where.start:
        raise ValueError(
            f"A batch has {len(states)} positions, but its rows have {where.stop - where.start}. Give a collator that pads rows "
            "and makes an attention_mask, and does not cut them."
        )
    if has_scales(dtype):
        states, scales = narrowed(states, dtype)
        result["scales"][where, column] = scales.cpu()
    result["states"][where, column].copy_(states)


def _write(folder: Path, manifest: Mapping[str, Any], number: int, tensors: dict[str, Tensor], claim: Claim) -> None:
    """Writes a shard, unless float16 could not hold a state."""
    states, layers = tensors["states"], manifest["layers"]
    if states.dtype == torch.float16 and not _all_finite(states):
        wrong = [layer for column, layer in enumerate(layers) if not bool(states[:, column].isfinite().all())]
        raise ValueError(
            f"The layer states {wrong} hold values beyond {torch.finfo(torch.float16).max:,.0f}, where float16 ends, or NaN. Use "
            "dtype='bfloat16', or mend the backbone or rows that make NaN. Nothing of this shard was written."
        )
    write_shard(folder, manifest, number, tensors, claim)


def _all_finite(states: Tensor) -> bool:
    """Whether float16 values are neither infinite nor NaN, by their bits: these are the largest of each sign.

    In numpy: torch would start threads of its own for the writing thread, which then keep the cores from the backbone.
    """
    bits = states.numpy().view(np.uint16)
    return not len(bits) or bool(bits.view(np.int16).max() < POSITIVE_INFINITY and bits.max() < NEGATIVE_INFINITY)
