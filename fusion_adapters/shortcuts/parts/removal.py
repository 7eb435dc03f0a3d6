"""Blocks removed for good, with a linear map in their place that is folded into the weights (ReplaceMe, arXiv 2505.02819)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...backbone.thinned import Thinning, check_whole_weights
from ...states import Source, source_of
from ..readout import Readout
from ..stream import Choice, Collator, Rows, batches_of, stream
from .folding import fit_folds

AT_ONCE = 512  # positions whose logits are held at a time


@dataclass(frozen=True)
class RemovalOptions:
    """How blocks are removed.

    Attributes:
        first: The number of the first block that goes, from 1; None chooses the run whose input and output are closest by cosine.
        fold: Fit a map to what the removed blocks did, and fold it into the feed-forward of the block below them.
        ridge: Of this fit, see `solve`; it draws the map to leaving the blocks out.
        feed_forward: What the feed-forward is called inside of a block, for families that are not known.
        skip: How many positions at the beginning of each row are left out, see `Choice`; None for 1 in a causal model, else 0.
        batch_size: Rows of one call.

    Raises:
        ValueError: If an option cannot be.
    """

    first: int | None = None
    fold: bool = True
    ridge: float = 0.0
    feed_forward: str | None = None
    skip: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.first is not None and self.first < 1 + self.fold:
            raise ValueError(
                f"first={self.first}: blocks are numbered from 1"
                + (
                    ", and the map needs a block below the removed ones to be folded into. Choose from 2 on."
                    if self.fold
                    else "."
                )
            )
        if not self.ridge >= 0:
            raise ValueError(f"ridge={self.ridge}: it must be 0 or more.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: it must be at least 1.")
        Choice(skip=self.skip or 0)


@dataclass
class Removed:
    """A model from which blocks were removed.

    Attributes:
        model: The model, changed in place.
        first: The number that the first of them had, from 1.
        count: How many.
        distance: The mean cosine distance between what went into them and what came out; None where `first` was given.
    """

    model: nn.Module
    first: int
    count: int
    distance: float | None


def remove_blocks(
    model: nn.Module,
    count: int,
    rows: Rows,
    collator: Collator,
    options: RemovalOptions | None = None,
    *,
    progress: bool = True,
) -> Removed:
    """Removes a run of blocks from a model, in place: what is left is an ordinary transformers model that saves, loads and trains as such.

    Without a map the state goes on past the gap as it is. With one, the feed-forward of the block below the gap is changed so that the
    state moves, by a linear function of what that feed-forward adds, as the removed blocks would have moved it.

    Args:
        model: A transformers model in floating point, without adapters.
        count: How many blocks.
        rows: Tokenised rows, by which the run is chosen and the map fitted.
        collator: Pads them on the right.
        options: How.
        progress: Show bars.

    Raises:
        SingularError: If the equations are singular, see `solve`.
        ValueError: If there are not so many blocks, or the model is quantised, carries adapters, or has blocks that depend on their
            number or take in no map; the model is then as it was.
    """
    options = options or RemovalOptions()
    check_whole_weights(model)
    source = source_of(model)
    choice = Choice(skip=int(source.backbone.causal) if options.skip is None else options.skip)
    _check_counts([count], source, options)
    distance = None
    if options.first is None:
        distances = block_distances(model, rows, collator, choice, batch_size=options.batch_size, progress=progress)
        first = chosen_run(distances, count, options.fold)
        distance = float(distances[first - 1, first - 1 + count])
    else:
        first = options.first
    thinning = Thinning(model, range(first - 1, first - 1 + count))
    if options.fold:
        (fold,) = fit_folds(model, [(first, count)], rows, collator, choice, **_fit(options), progress=progress)
        fold.into(model)
    thinning.apply()
    return Removed(model, first, count, distance)


def _fit(options: RemovalOptions) -> dict[str, Any]:
    return {"ridge": options.ridge, "name": options.feed_forward, "batch_size": options.batch_size}


def _check_counts(counts: Sequence[int], source: Source, options: RemovalOptions) -> None:
    blocks = source.backbone.num_layers
    most = blocks - (options.fold if options.first is None else options.first - 1)
    wrong = [count for count in counts if not 1 <= count <= min(most, blocks - 1)]
    if wrong or not counts:
        raise ValueError(
            f"count={', '.join(map(str, wrong or counts))}: of {blocks} blocks"
            + (f", from block {options.first} on," if options.first is not None else "")
            + f" from 1 to {min(most, blocks - 1)} can be removed"
            + (": the map is folded into a block below them." if options.fold else ".")
        )


def block_distances(
    model: nn.Module | Source,
    rows: Rows,
    collator: Collator,
    choice: Choice | None = None,
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> Tensor:
    """The mean of `1 - cos(z_i, z_j)` over positions, for all layers: which blocks turn the state least (ReplaceMe, equation 3).

    Args:
        model: The model.
        rows: Tokenised rows.
        collator: Pads them on the right.
        choice: Which positions; None for all but the first in a causal model.
        batch_size: Rows of one call.
        progress: Show a bar.

    Returns:
        `(L + 1, L + 1)`, float64.

    Raises:
        ValueError: If no position counts.
    """
    source = source_of(model)
    backbone = source.backbone
    choice = choice or Choice(skip=int(backbone.causal))
    layers = list(range(backbone.num_layers + 1))
    total, count = torch.zeros(len(layers), len(layers), dtype=torch.float64), 0
    chunks = stream(source, rows, layers, collator, choice, batch_size)
    batches = len(batches_of(rows, batch_size))
    for chunk in tqdm(chunks, total=batches, desc="distances of layers", unit="batch", disable=not progress):
        states = torch.stack([F.normalize(chunk.states[i].to(backbone.device).float(), dim=-1) for i in layers], dim=1)
        total += torch.einsum("nid,njd->ij", states, states).double().cpu()  # (L + 1, L + 1), of (n, L + 1, d)
        count += len(states)
    if not count:
        raise ValueError(
            "There is no position to compare layers at. Give rows that are longer than what is left out of them."
        )
    return 1 - total / count


def chosen_run(distances: Tensor, count: int, fold: bool = True) -> int:
    """The number, from 1, of the first of the `count` blocks that turn the state least; with a map not block 1, which has none below."""
    lowest = int(fold)
    each = distances.diagonal(count)[lowest:]  # from layer i to layer i + count
    return lowest + 1 + int(each.argmin())


@dataclass(frozen=True)
class RemovalScore:
    """What is left of a language model without some blocks.

    Attributes:
        count: How many were removed.
        first: The number of the first of them, from 1; 0 where none was.
        parameters: Of what is left.
        perplexity: With the map.
        dropped: Without it.
    """

    count: int
    first: int
    parameters: int
    perplexity: float
    dropped: float

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


def removal_curve(
    model: nn.Module,
    counts: Sequence[int],
    rows: Rows,
    judged: Rows,
    collator: Collator,
    options: RemovalOptions | None = None,
    *,
    progress: bool = True,
) -> list[RemovalScore]:
    """Perplexity over the number of blocks removed, with the map and without; the model stays as it is.

    Args:
        model: A causal language model, see `remove_blocks`.
        counts: Numbers of blocks.
        rows: Tokenised rows, by which runs are chosen and maps fitted.
        judged: Others, for the perplexity.
        collator: Pads rows on the right.
        options: How; `fold` must be on.
        progress: Show bars.

    Returns:
        The whole model (`count=0`), then one score for each count, ascending.

    Raises:
        ValueError: See `remove_blocks`.
    """
    options = options or RemovalOptions()
    if not options.fold:
        raise ValueError("fold=False: the curve shows both, with the map and without. Leave fold as it is.")
    check_whole_weights(model)
    source = source_of(model)
    counts = sorted({int(count) for count in counts})
    _check_counts(counts, source, options)
    choice = Choice(skip=int(source.backbone.causal) if options.skip is None else options.skip)
    if options.first is None:
        distances = block_distances(model, rows, collator, choice, batch_size=options.batch_size, progress=progress)
        runs = [(chosen_run(distances, count), count) for count in counts]
    else:
        runs = [(options.first, count) for count in counts]
    folds = fit_folds(model, runs, rows, collator, choice, **_fit(options), progress=progress)
    whole = perplexity(model, judged, collator, batch_size=options.batch_size, progress=progress)
    scores = [RemovalScore(0, 0, sum(p.numel() for p in model.parameters()), whole, whole)]
    for (first, count), fold in zip(runs, folds, strict=True):
        # another structure of the same tensors
        thin = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
        Thinning(thin, range(first - 1, first - 1 + count)).apply()
        dropped = perplexity(thin, judged, collator, batch_size=options.batch_size, progress=progress)
        fold.into(thin)
        mapped = perplexity(thin, judged, collator, batch_size=options.batch_size, progress=progress)
        scores.append(RemovalScore(count, first, sum(p.numel() for p in thin.parameters()), mapped, dropped))
    return scores


@torch.no_grad()
def perplexity(model: nn.Module, rows: Rows, collator: Collator, *, batch_size: int = 8, progress: bool = True) -> float:
    """`exp` of the mean loss of a causal language model over all tokens of rows but their first.

    Raises:
        ValueError: If the model is not causal, or no row has two tokens.
    """
    source, readout = source_of(model), Readout(model)
    backbone = source.backbone
    if not backbone.causal:
        raise ValueError(f"{type(model).__name__} is not causal, so it has no perplexity. Give a causal language model.")
    last, loss, count = backbone.num_layers, 0.0, 0
    chunks = stream(source, rows, [last], collator, Choice(), batch_size)
    batches = len(batches_of(rows, batch_size))
    for chunk in tqdm(chunks, total=batches, desc="perplexity", unit="batch", disable=not progress):
        following = [
            _following(rows[row], place) for row, place in zip(chunk.rows.tolist(), chunk.places.tolist(), strict=True)
        ]
        within = torch.tensor([token is not None for token in following], dtype=torch.bool)
        follow = torch.tensor([token for token in following if token is not None], dtype=torch.long)
        states = chunk.states[last][within.to(chunk.states[last].device)]
        count += len(follow)
        for state, token in zip(states.split(AT_ONCE), follow.split(AT_ONCE), strict=True):
            loss += float(F.cross_entropy(readout(state).float(), token.to(state.device), reduction="sum"))
    if not count:
        raise ValueError("No row has two tokens, so nothing is predicted. Give longer rows.")
    return math.exp(loss / count)


def _following(row: Mapping[str, Any], place: int) -> int | None:
    """The token after a place in a row; None after the last."""
    mask, ids = row.get("attention_mask"), row["input_ids"]
    length = len(ids) if mask is None else int(torch.as_tensor(mask).sum())
    return int(ids[place + 1]) if place + 1 < length else None
