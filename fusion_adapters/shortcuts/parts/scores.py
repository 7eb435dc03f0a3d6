"""What parts of blocks are worth: each replaced by its stand-in in all blocks above a layer (arXiv 2303.09435, section 7)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from torch import Tensor, nn
from tqdm.auto import tqdm

from ...backbone.fed import fed, watched
from ...backbone.record import recorded, run
from ...states import source_of
from ..evaluate import R2, TOPS, FullModel, Score
from ..maps import ShortcutSet
from ..readout import Readout
from ..stream import Choice, Collator, Places, Rows, batches_of, model_inputs, places_of
from .submodules import PartSet

AT_ONCE = 512  # positions whose logits are held at a time


def evaluate_parts(
    model: nn.Module,
    parts: PartSet,
    above: Sequence[int],
    rows: Rows,
    collator: Collator,
    *,
    shortcuts: ShortcutSet | None = None,
    readout: Readout | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> list[Score]:
    """Judges stand-ins against the full model: real blocks up to a layer, then one part replaced in every block above it.

    Args:
        model: The language model that they were fitted on.
        parts: The stand-ins.
        above: The layers up to which all is real.
        rows: Tokenised rows that nothing was fitted to.
        collator: Pads them on the right.
        shortcuts: Whole blocks beside: shortcuts from these layers to the last, of every kind; None leaves them out.
        readout: Of the same model; None makes one.
        batch_size: Rows of one call.
        progress: Show a bar.

    Returns:
        A score for each mode (as `kind`) and layer (as `source`), then those of the shortcuts at the same positions.

    Raises:
        ValueError: If a layer is out of range, or no position counts.
    """
    source = source_of(model).whole
    backbone = source.backbone
    last = backbone.num_layers
    above = sorted({int(layer) for layer in above})
    if not above or above[0] < 0 or above[-1] >= last:
        raise ValueError(f"above={above}: give layers from 0 (all blocks are replaced in part) to {last - 1}.")
    readout = readout or Readout(model)
    choice = Choice(skip=parts.skip)
    casts = [s for s in shortcuts or () if s.target == last and s.source in above]
    keys = [(mode, layer) for mode in parts.modes for layer in above] + [(s.kind, s.source) for s in casts]
    tallies = {key: _Tally() for key in keys}
    for batch in tqdm(batches_of(rows, batch_size), desc="judging", unit="batch", disable=not progress):
        inputs = model_inputs(backbone, [rows[i] for i in batch], collator)
        places = places_of(rows, batch, choice, backbone.device)
        with source.quiet():
            with watched(backbone) as seen:
                run(backbone, inputs)
            states = {layer: places.of(state) for layer, state in seen.states.items()}
            full = [FullModel(readout(some)) for some in states[last].split(AT_ONCE)]
            for layer in above:
                for mode in parts.modes:
                    # blocks up to the layer hand on what they are given, and the last of them answers with its true state
                    below = (
                        fed(backbone.lower(layer), seen.forms, {layer: seen.states[layer]})
                        if layer
                        else contextlib.nullcontext()
                    )
                    found: list[Tensor] = []

                    def take(_: int, state: Tensor, found: list[Tensor] = found, places: Places = places) -> None:
                        found.append(places.of(state))

                    with below, parts.replacing(backbone, mode, layer), recorded(backbone, [last], take):
                        run(backbone, inputs)
                    tallies[mode, layer].add(states[last], found[-1], full, readout)
            for cast in casts:
                tallies[cast.kind, cast.source].add(states[last], cast(states), full, readout)
    return [tally.score(kind, layer, last) for (kind, layer), tally in tallies.items()]


class _Tally:
    """Sums over positions of one way of replacing."""

    def __init__(self) -> None:
        self.count, self.surprisal = 0, 0.0
        self.r2, self.hits = R2(), dict.fromkeys(TOPS, 0)
        self.shift: Tensor | None = None

    def add(self, wanted: Tensor, found: Tensor, full: Sequence[FullModel], readout: Readout) -> None:
        """Takes in true last states `(n, d)`, what came in their place, and what the full model says of the former."""
        if not len(wanted):
            return
        self.shift = wanted.double().mean(0) if self.shift is None else self.shift
        self.count += len(wanted)
        self.r2.add(wanted, found, self.shift)
        for said, some in zip(full, found.split(AT_ONCE), strict=True):
            first = readout(some).argmax(-1)  # (n,)
            self.surprisal += said.surprisal(first)
            for k in TOPS:
                self.hits[k] += said.hits(first, k)

    def score(self, kind: str, source: int, target: int) -> Score:
        if not self.count:
            raise ValueError("There is no position to judge by. Give rows that are longer than what is left out of them.")
        precision = {k: hits / self.count for k, hits in self.hits.items()}
        return Score(kind, source, target, self.count, self.r2.value(), precision, self.surprisal / self.count)
