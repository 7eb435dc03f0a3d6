"""How sure each layer is at each position, and whether it is right: all that early exit at any threshold can be judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...states import Source, source_of
from ..evaluate import AT_ONCE
from ..maps import IDENTITY, MAT, ShortcutSet
from ..readout import Readout
from ..stream import Choice, Collator, Rows, stream
from .sure import EVERYWHERE, margin, passing_lambda


@dataclass(frozen=True)
class Margins:
    """What the head says after a cast from each of some layers, beside the full model's answer.

    Attributes:
        kind: The kind of shortcut.
        layers: The `E` layers that are cast from, ascending.
        num_layers: `L`.
        margins: float32 `(n, E)`, the two greatest probabilities' difference.
        agrees: bool `(n, E)`, whether the greatest is the full model's.
        rows: int64 `(n,)`, the number of each position's row.
        places: `(n,)`, the 0-based places `t` of the positions; 3 everywhere for masked models, as in the paper; None for whole texts,
            whose threshold does not fall along the text.
    """

    kind: str
    layers: tuple[int, ...]
    num_layers: int
    margins: Tensor
    agrees: Tensor
    rows: Tensor
    places: Tensor | None

    @property
    def mean_length(self) -> float:
        """`N`, the mean of `t + 1`."""
        return 1.0 if self.places is None else float((self.places.double() + 1).mean())

    def only(self, layers: Sequence[int]) -> Margins:
        """Of some of the layers.

        Raises:
            ValueError: If one is not among them.
        """
        wrong = sorted(set(layers) - set(self.layers))
        if wrong or not layers:
            raise ValueError(f"The margins are of the layers {list(self.layers)}; {wrong or 'none'} of them was asked for.")
        at = [self.layers.index(layer) for layer in sorted(set(layers))]
        return replace(
            self, layers=tuple(self.layers[i] for i in at), margins=self.margins[:, at], agrees=self.agrees[:, at]
        )

    def passing(self, mean_length: float | None = None) -> Tensor:
        """float64 `(n, E)`: the lambdas below which each position leaves at each layer, if it comes so far.

        Args:
            mean_length: `N`; None for that of these positions.
        """
        if self.places is None:
            return self.margins.double()
        return passing_lambda(self.margins, self.places, self.mean_length if mean_length is None else mean_length)

    def leave(self, lam: float, mean_length: float | None = None) -> tuple[Tensor, Tensor]:
        """Where positions leave at a lambda, and whether they are right then.

        Returns:
            int64 `(n,)`, the number of the layer among `layers`, `E` for those that do not leave; and bool `(n,)`.
        """
        return leave(self.passing(mean_length), self.agrees, lam)


def leave(passing: Tensor, agrees: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """See `Margins.leave`; of `Margins.passing` and `Margins.agrees`."""
    passes = passing > lam  # (n, E)
    first = torch.where(passes.any(1), passes.int().argmax(1), passes.shape[1])  # (n,)
    right = torch.cat([agrees, agrees.new_ones(len(agrees), 1)], dim=1)  # the full model agrees with itself
    return first, right.gather(1, first[:, None])[:, 0]


def exit_margins(
    model: nn.Module | Source,
    shortcuts: ShortcutSet,
    rows: Rows,
    collator: Collator,
    kind: str = MAT,
    layers: Sequence[int] | None = None,
    choice: Choice | None = None,
    *,
    readout: Readout,
    batch_size: int = 8,
    progress: bool = True,
) -> Margins:
    """Looks at each position from each layer, in one pass over rows.

    Every layer costs one application of the head: 30 layers of 6,000 positions of a vocabulary of 49,000 take some minutes on a core.

    Args:
        model: A causal or masked language model.
        shortcuts: The shortcuts.
        rows: Tokenised rows.
        collator: Pads them on the right.
        kind: Which shortcuts to the last layer.
        layers: The layers to leave at; None for all from the first block on that such shortcuts go from.
        choice: Which positions; None for all but the first in a causal model.
        readout: Of the same model.
        batch_size: Rows of one call.
        progress: Show a bar.

    Raises:
        ValueError: If there is no such shortcut, or no position.
    """
    source = source_of(model)
    backbone = source.backbone
    last = backbone.num_layers
    choice = choice or Choice(skip=int(backbone.causal))
    if layers is None:
        layers = range(1, last) if kind == IDENTITY else [i for i in shortcuts.sources(kind=kind) if i]
    maps = [shortcuts.get(layer, kind=kind) for layer in sorted(set(layers))]
    if not maps:
        raise ValueError(
            f"There is no {kind!r} shortcut to the last layer from a block's output; the kinds here are: {shortcuts.kinds()}."
        )
    wanted = sorted({layer for shortcut in maps for layer in shortcut.sources} | {last})
    found: list[tuple[Tensor, Tensor]] = []
    numbers, places = [], []
    with torch.no_grad():
        batches = stream(source, rows, wanted, collator, choice, batch_size)
        for chunk in tqdm(batches, total=-(-len(rows) // batch_size), unit="batch", desc="margins", disable=not progress):
            numbers.append(chunk.rows)
            places.append(chunk.places)
            for start in range(0, len(chunk.rows), AT_ONCE):
                some = {layer: state[start : start + AT_ONCE] for layer, state in chunk.states.items()}
                full = readout(some[last]).argmax(-1)  # (n,)
                looks = [_look(readout(shortcut(some)), full) for shortcut in maps]
                found.append((torch.stack([m for m, _ in looks], 1), torch.stack([a for _, a in looks], 1)))
    if not found:
        raise ValueError("There is no position to judge by. Give rows that are longer than what is left out of them.")
    at = torch.cat(places)
    return Margins(
        kind,
        tuple(shortcut.source for shortcut in maps),
        last,
        torch.cat([m for m, _ in found]),
        torch.cat([a for _, a in found]),
        torch.cat(numbers),
        at if backbone.causal else torch.full(at.shape, EVERYWHERE),
    )


def _look(logits: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
    """Margins and agreement `(n,)` of logits `(n, V)`."""
    return margin(logits).cpu(), (logits.argmax(-1) == full).cpu()


def gathered(
    looks: Sequence[Mapping[int, Tensor]], answers: Sequence[Tensor], kind: str, num_layers: int, rows: Sequence[int]
) -> Margins:
    """Margins of whole texts from the class logits `(B, C)` of batches: by layer, and the full model's."""
    layers = tuple(sorted(looks[0]))
    pairs: list[list[tuple[Tensor, Tensor]]] = [
        [_look(batch[layer], answer.argmax(-1)) for layer in layers] for batch, answer in zip(looks, answers, strict=True)
    ]
    margins = torch.cat([torch.stack([m for m, _ in batch], 1) for batch in pairs])
    agrees = torch.cat([torch.stack([a for _, a in batch], 1) for batch in pairs])
    return Margins(kind, layers, num_layers, margins, agrees, torch.as_tensor(rows), None)
