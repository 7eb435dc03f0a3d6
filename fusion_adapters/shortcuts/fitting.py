"""Fits shortcuts in one pass over rows, whose sums are kept on disk so that a fit that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from ..backbone.atomic import written_whole
from ..backbone.fingerprint import weights_signature
from ..fusions.layers import resolve_layers
from ..states import Source, StaleCacheError, source_of
from ..states.key import known_inputs, row_signature
from .maps import FUSED, MAT, Shortcut, ShortcutSet
from .moments import Moments, pairs_of
from .solving import solve
from .stream import Choice, Collator, Rows, batches_of, stream

SAVE_EVERY = 60.0  # seconds from one saving of the sums to the next
PROGRESS = "moments.safetensors"


@dataclass(frozen=True)
class FitOptions:
    """Which shortcuts are fitted, and how.

    Attributes:
        sources: Layers to cast from; None for all below the last.
        pairs: `last`: each source to the last layer. `all`: each pair of layers among sources and the last, as in the paper.
        fused: Layers that the fused shortcut from a source reads beside it, those below it: a list, or a rule as `every:6`; None for no
            fused ones.
        bias: Fit a constant too; the paper has none.
        ridge: See `solve`.
        rank: See `solve`; None for whole matrices.
        positions: See `Choice`.
        skip: See `Choice`; None for 1 in a causal model, else 0.
        seed: Of the draw of positions.
        batch_size: Rows of one call of the backbone.

    Raises:
        ValueError: If an option cannot be.
    """

    sources: Sequence[int] | None = None
    pairs: str = "last"
    fused: Sequence[int] | str | None = "every:6"
    bias: bool = True
    ridge: float = 0.0
    rank: int | None = None
    positions: str = "all"
    skip: int | None = None
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.pairs not in ("last", "all"):
            raise ValueError(
                f"pairs={self.pairs!r}: choose 'last' (from each layer to the last) or 'all' (each pair of layers)."
            )
        if not self.ridge >= 0:
            raise ValueError(f"ridge={self.ridge}: it must be 0 or more.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: it must be at least 1.")
        Choice(self.positions, self.skip or 0, self.seed)

    def choice(self, causal: bool) -> Choice:
        """The positions that count."""
        return Choice(self.positions, int(causal) if self.skip is None else self.skip, self.seed)

    def wanted(self, num_layers: int) -> list[tuple[str, tuple[int, ...], int]]:
        """Kind, sources and target of each shortcut.

        Raises:
            ValueError: If a layer is out of range.
        """
        sources = list(range(num_layers)) if self.sources is None else sorted({int(s) for s in self.sources})
        wrong = [s for s in sources if not 0 <= s < num_layers]
        if wrong or not sources:
            raise ValueError(
                f"sources={sources}: {wrong or 'none of them'} can be cast from. A backbone of {num_layers} blocks has the layers 0 "
                f"(embeddings) to {num_layers} (last block), and a shortcut goes from one of 0 to {num_layers - 1} to a later one."
            )
        targets = [*sources, num_layers] if self.pairs == "all" else [num_layers]
        found: list[tuple[str, tuple[int, ...], int]] = [(MAT, (i,), j) for i in sources for j in targets if i < j]
        if self.fused is not None:
            beside = _beside(self.fused, num_layers)
            for i in sources:
                read = tuple(sorted({*(layer for layer in beside if layer < i), i}))
                found += [(FUSED, read, j) for j in targets if i < j and len(read) > 1]
        return found


def _beside(fused: Sequence[int] | str, num_layers: int) -> set[int]:
    """The layers that fused shortcuts read; a rule takes the embeddings too, and of a shallow backbone these alone.

    Raises:
        ValueError: If they are no layers.
    """
    rule = re.fullmatch(r"every:(\d+)", fused) if isinstance(fused, str) else None
    if rule is not None and int(rule[1]) > num_layers:
        return {0}
    try:
        return {*resolve_layers(fused, num_layers), *([0] if isinstance(fused, str) else [])}
    except ValueError as error:
        raise ValueError(str(error).replace("fusion_layers", "fused")) from error


@dataclass
class Fitted:
    """What a fit gave.

    Attributes:
        shortcuts: The shortcuts.
        positions: The number of positions that they were fitted to.
        seconds: Of the pass and of the solving.
        options: How.
    """

    shortcuts: ShortcutSet
    positions: int
    seconds: float
    options: FitOptions = field(default_factory=FitOptions)


def fit_shortcuts(
    model: nn.Module | Source,
    rows: Rows,
    collator: Collator,
    options: FitOptions | None = None,
    *,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Fitted:
    """Fits linear shortcuts to the layer states of rows in one pass over them.

    The sums of products are in float64 and as large for ten thousand tokens as for a billion.

    Args:
        model: A transformers model, with or without its head and adapters; nothing inside it may train.
        rows: Tokenised rows.
        collator: Pads a list of rows on the right.
        options: Which shortcuts.
        folder: Where the sums are kept meanwhile, so that a fit that was stopped goes on, with the same result to the bit. Removed at
            the end.
        progress: Show a bar.

    Raises:
        SingularError: If the equations are singular, see `solve`.
        ValueError: If a layer is out of range or a state not finite.
        StaleCacheError: If the folder holds the sums of another fit.
    """
    options, started = options or FitOptions(), time.perf_counter()
    source = source_of(model).whole
    backbone = source.backbone
    wanted = options.wanted(backbone.num_layers)
    if options.rank is not None:
        Shortcut(backbone.hidden_size, [0], 1, rank=options.rank)  # refuses a rank that cannot be, before the pass
    moments = Moments(backbone.hidden_size, [pair for _, sources, target in wanted for pair in pairs_of(sources, target)])
    _accumulate(source, rows, collator, options, moments, None if folder is None else Path(folder), progress)
    shortcuts = ShortcutSet([], backbone.hidden_size, backbone.num_layers)
    for kind, sources, target in tqdm(wanted, desc="solving", unit="map", disable=not progress):
        shortcuts.add(solve(moments, sources, target, bias=options.bias, ridge=options.ridge, rank=options.rank, kind=kind))
    if folder is not None:
        (Path(folder) / PROGRESS).unlink(missing_ok=True)
    return Fitted(shortcuts.to(backbone.device), moments.count, time.perf_counter() - started, options)


def _accumulate(
    source: Source,
    rows: Rows,
    collator: Collator,
    options: FitOptions,
    moments: Moments[int],
    folder: Path | None,
    progress: bool,
) -> None:
    backbone = source.backbone
    choice = options.choice(backbone.causal)
    key = _key(source, rows, choice, options.batch_size, moments)
    file = None if folder is None else folder / PROGRESS
    batches = batches_of(rows, options.batch_size)
    first = 0 if file is None or not file.is_file() else _resumed(file, key, moments)
    saved = time.monotonic()
    bar = tqdm(total=len(batches), initial=first, desc="layer states", unit="batch", disable=not progress)
    with bar:
        for number, chunk in enumerate(
            stream(source, rows, moments.layers, collator, choice, options.batch_size, first), start=first + 1
        ):
            moments.add(chunk.states)
            bar.update()
            # at the end too: where the equations turn out to be singular, another ridge needs no other pass
            if file is not None and (number == len(batches) or time.monotonic() - saved > SAVE_EVERY):
                _save(file, key, number, moments)
                saved = time.monotonic()


def _save(file: Path, key: str, done: int, moments: Moments[int]) -> None:
    with written_whole(file) as temporary:
        save_file(moments.tensors(), temporary, metadata={"key": key, "batches": str(done)})


def _resumed(file: Path, key: str, moments: Moments[int]) -> int:
    """The number of batches that the sums in a file cover."""
    try:
        with safe_open(file, "pt") as opened:
            notes = opened.metadata() or {}
            if notes.get("key") != key:
                raise StaleCacheError(
                    f"{str(file)!r} holds the sums of another fit: other rows, another backbone, or other options. Give another folder, "
                    "or delete the file."
                )
            moments.load({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
            return int(notes["batches"])
    except SafetensorError as error:
        raise ValueError(
            f"{str(file)!r}, the sums of a fit that was stopped, is damaged ({' '.join(str(error).split())}). Delete it; the fit then "
            "begins anew."
        ) from error


def _key(source: Source, rows: Rows, choice: Choice, batch_size: int, moments: Moments[int]) -> str:
    """What sums depend on, as a digest."""
    digest = hashlib.sha256(weights_signature(source.backbone, source.idle, source.scalings).encode())
    said: dict[str, Any] = {
        "choice": asdict(choice),
        "batch": batch_size,
        "pairs": sorted(moments.products),
        "adapters": source.adapters,
    }
    digest.update(json.dumps(said).encode())
    names = [*known_inputs(source.backbone), *(["labels"] if choice.positions == "labelled" else [])]
    for row in rows:
        digest.update(row_signature(row, names))
    return digest.hexdigest()
