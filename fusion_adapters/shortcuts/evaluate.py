"""How well shortcuts stand in: r2 of states, and of what the head then says Precision@k and surprisal (arXiv 2303.09435, section 4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..states import Source, source_of
from .maps import IDENTITY, Shortcut, ShortcutSet, identity
from .readout import Readout
from .stream import Choice, Chunk, Collator, Rows, stream
from .texts import TextReadout

TOPS = (1, 5, 10)
FLAT = 1e-12  # of the mean variance: a coordinate that varies less has been switched off by a norm (some of MiniLM's: 1e-60)
AT_ONCE = 512  # positions whose logits are held at a time


@dataclass(frozen=True)
class Score:
    """How one shortcut does on held-out positions.

    Attributes:
        kind: `mat`, `fused`, `identity`, ...
        source: The layer that it casts from.
        target: The layer that it stands in for.
        positions: The number of positions.
        r2: Of the states, a mean over their coordinates (scikit-learn's `r2_score`). A coordinate of the target that varies by less than
            a millionth of the others counts as constant: 1 where it is met, else 0.
        precision: For each k of 1, 5, 10: how often the first token after the cast is among the first k of the full model; empty for a
            target below the last layer. Of a classifier: the class of a text, for each k below the number of classes.
        surprisal: The mean of `-log p_full` of that token or class, in nats; None likewise.
        predictions: The number of tokens, or of classes, that were compared: positions, or texts; 0 likewise.
    """

    kind: str
    source: int
    target: int
    positions: int
    r2: float
    precision: dict[int, float]
    surprisal: float | None
    predictions: int = 0

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        tops = {f"precision@{k}": v for k, v in self.precision.items()}
        return {
            **{"kind": self.kind, "source": self.source, "target": self.target, "positions": self.positions, "r2": self.r2},
            **tops,
            **({} if self.surprisal is None else {"surprisal": self.surprisal, "predictions": self.predictions}),
        }


class R2:
    """`1 - sum (y - f)^2 / sum (y - mean y)^2`, summed coordinate by coordinate over chunks, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.errors = self.sums = self.squares = torch.zeros((), dtype=torch.float64)  # become (d,)

    def add(self, wanted: Tensor, found: Tensor, shift: Tensor) -> None:
        """Takes in states `(n, d)` and what stands for them; `shift` `(d,)` is near their mean, the same in each call."""
        wide = wanted.double() - shift  # near the mean, so that the squares are of what varies
        self.count += len(wide)
        self.errors = self.errors + (wanted.double() - found.double()).square().sum(0)
        self.sums = self.sums + wide.sum(0)
        self.squares = self.squares + wide.square().sum(0)

    def value(self) -> float:
        """The mean over the coordinates."""
        total = self.squares - self.sums**2 / self.count  # (d,)
        flat = FLAT * total.mean()
        each = torch.where(total > flat, 1 - self.errors / total.clamp_min(1e-300), (self.errors <= flat).double())
        return float(each.mean())


def evaluate_shortcuts(
    model: nn.Module | Source,
    shortcuts: ShortcutSet,
    rows: Rows,
    collator: Collator,
    choice: Choice | None = None,
    *,
    readout: Readout | TextReadout | None = None,
    with_identity: bool = True,
    batch_size: int = 8,
    progress: bool = True,
) -> list[Score]:
    """Judges every shortcut of a set, and the identity from the same layers, on rows that it was not fitted to.

    Args:
        model: The model.
        shortcuts: The shortcuts.
        rows: Tokenised rows.
        collator: Pads them on the right.
        choice: Which positions; None for all but the first in a causal model.
        readout: Of the same model; of a classifier of texts a `TextReadout`, for which all positions of a text are cast, whatever
            `choice` says, and r2 is over these; None for r2 alone.
        with_identity: Also judge the states as they are.
        batch_size: Rows of one call.
        progress: Show a bar.
    """
    source = source_of(model).whole
    backbone = source.backbone
    choice = Choice() if isinstance(readout, TextReadout) else choice or Choice(skip=int(backbone.causal))
    maps: list[Shortcut] = list(shortcuts)
    if with_identity:
        ends = sorted({(s.source, s.target) for s in maps if s.kind != IDENTITY})
        maps += [identity(shortcuts.hidden_size, i, j) for i, j in ends]
    last = backbone.num_layers
    layers = sorted({layer for s in maps for layer in (*s.sources, s.target)} | {last})
    r2 = {i: R2() for i in range(len(maps))}
    said = {i: _Said() for i, s in enumerate(maps) if readout is not None and s.target == last}
    shifts: dict[int, Tensor] = {}
    count = 0
    chunks: Iterable[Any] = stream(source, rows, layers, collator, choice, batch_size)
    with torch.no_grad():
        for chunk in tqdm(chunks, total=-(-len(rows) // batch_size), unit="batch", desc="judging", disable=not progress):
            for some, logits_of in _parts(chunk, readout):
                count += len(some[last])
                for layer in {s.target for s in maps}:
                    shifts.setdefault(layer, some[layer].double().mean(0))
                full = FullModel(logits_of(some[last])) if said else None
                for number, shortcut in enumerate(maps):
                    cast = shortcut(some)
                    r2[number].add(some[shortcut.target], cast, shifts[shortcut.target])
                    if full is not None and number in said:
                        said[number].add(full, logits_of(cast))
    if not count:
        raise ValueError("There is no position to judge by. Give rows that are longer than what is left out of them.")
    return [
        Score(*(s.kind, s.source, s.target, count, r2[i].value()), *(said[i].values() if i in said else ({}, None, 0)))
        for i, s in enumerate(maps)
    ]


class FullModel:
    """What the full model says at some positions.

    Args:
        logits: `(n, V)`.
    """

    def __init__(self, logits: Tensor) -> None:
        self.log_probabilities = logits.float().log_softmax(-1)
        choices = logits.shape[-1]
        # among the first ten of five classes is every class
        self.tops = tuple(k for k in TOPS if k == 1 or k < choices)
        self.top = logits.topk(max(self.tops), dim=-1).indices  # (n, 10)

    def hits(self, tokens: Tensor, k: int) -> int:
        """How many tokens `(n,)` are among its first k."""
        return int((self.top[:, :k] == tokens[:, None]).any(-1).sum())

    def surprisal(self, tokens: Tensor) -> float:
        """The sum of `-log p` of tokens `(n,)`, in nats."""
        return -float(self.log_probabilities.gather(-1, tokens[:, None]).double().sum())


class _Said:
    """How what is said after a cast compares with the full model, summed up over parts."""

    def __init__(self) -> None:
        self.count, self.surprisal = 0, 0.0
        self.hits: dict[int, int] = {}

    def add(self, full: FullModel, logits: Tensor) -> None:
        first = logits.argmax(-1)  # (n,)
        self.count += len(first)
        self.surprisal += full.surprisal(first)
        for k in full.tops:
            self.hits[k] = self.hits.get(k, 0) + full.hits(first, k)

    def values(self) -> tuple[dict[int, float], float, int]:
        """Precision by k, surprisal, and the number of predictions."""
        return {k: hits / self.count for k, hits in self.hits.items()}, self.surprisal / self.count, self.count


def _parts(chunk: Chunk, readout: Readout | TextReadout | None) -> Iterable[tuple[dict[int, Tensor], Any]]:
    """States `(n, d)` by layer, and what makes logits of such: of few positions at a time, or of whole texts."""
    if isinstance(readout, TextReadout):
        yield chunk.states, partial(readout.of_positions, chunk)
        return
    count = len(next(iter(chunk.states.values())))
    for start in range(0, count, AT_ONCE):
        yield {layer: state[start : start + AT_ONCE] for layer, state in chunk.states.items()}, readout


def best_of(scores: Sequence[Score], kind: str) -> dict[int, Score]:
    """The scores of a kind by the layer that it casts from, to the highest target there is."""
    top = max((s.target for s in scores), default=0)
    return {s.source: s for s in scores if (s.kind, s.target) == (kind, top)}
