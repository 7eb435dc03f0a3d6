"""How well shortcuts stand in: r2 of states, and of what the head then says Precision@k and surprisal (arXiv 2303.09435, section 4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..states import Source, source_of
from .maps import IDENTITY, Shortcut, ShortcutSet, identity
from .readout import Readout
from .stream import Choice, Collator, Rows, stream

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
            target below the last layer.
        surprisal: The mean of `-log p_full` of that token, in nats; None likewise.
    """

    kind: str
    source: int
    target: int
    positions: int
    r2: float
    precision: dict[int, float]
    surprisal: float | None

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        tops = {f"precision@{k}": v for k, v in self.precision.items()}
        return {
            **{"kind": self.kind, "source": self.source, "target": self.target, "positions": self.positions, "r2": self.r2},
            **tops,
            **({} if self.surprisal is None else {"surprisal": self.surprisal}),
        }


class _R2:
    """`1 - sum (y - f)^2 / sum (y - mean y)^2`, summed coordinate by coordinate over chunks, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.errors = self.sums = self.squares = torch.zeros((), dtype=torch.float64)  # become (d,)

    def add(self, wanted: Tensor, found: Tensor, shift: Tensor) -> None:
        wide = wanted.double() - shift  # near the mean, so that the squares are of what varies
        self.count += len(wide)
        self.errors = self.errors + (wanted.double() - found.double()).square().sum(0)
        self.sums = self.sums + wide.sum(0)
        self.squares = self.squares + wide.square().sum(0)

    def value(self) -> float:
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
    readout: Readout | None = None,
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
        readout: Of the same model; None for r2 alone.
        with_identity: Also judge the states as they are.
        batch_size: Rows of one call.
        progress: Show a bar.
    """
    source = source_of(model).whole
    backbone = source.backbone
    choice = choice or Choice(skip=int(backbone.causal))
    maps: list[Shortcut] = list(shortcuts)
    if with_identity:
        ends = sorted({(s.source, s.target) for s in maps if s.kind != IDENTITY})
        maps += [identity(shortcuts.hidden_size, i, j) for i, j in ends]
    last = backbone.num_layers
    layers = sorted({layer for s in maps for layer in (*s.sources, s.target)} | {last})
    r2 = {i: _R2() for i in range(len(maps))}
    hits: dict[int, dict[int, int]] = {i: dict.fromkeys(TOPS, 0) for i in range(len(maps))}
    surprisal = dict.fromkeys(range(len(maps)), 0.0)
    shifts: dict[int, Tensor] = {}
    count = 0
    chunks: Iterable[Any] = stream(source, rows, layers, collator, choice, batch_size)
    with torch.no_grad():
        for chunk in tqdm(chunks, total=-(-len(rows) // batch_size), unit="batch", desc="judging", disable=not progress):
            for some in _parts(chunk.states):
                count += len(some[last])
                for layer in {s.target for s in maps}:
                    shifts.setdefault(layer, some[layer].double().mean(0))
                full = None if readout is None else _Full(readout(some[last]))
                for number, shortcut in enumerate(maps):
                    cast = shortcut(some)
                    r2[number].add(some[shortcut.target], cast, shifts[shortcut.target])
                    if full is not None and readout is not None and shortcut.target == last:
                        first = readout(cast).argmax(-1)  # (n,)
                        for k in TOPS:
                            hits[number][k] += full.hits(first, k)
                        surprisal[number] += full.surprisal(first)
    if not count:
        raise ValueError("There is no position to judge by. Give rows that are longer than what is left out of them.")
    return [
        Score(
            *(s.kind, s.source, s.target, count, r2[i].value()),
            {k: hits[i][k] / count for k in TOPS} if readout is not None and s.target == last else {},
            surprisal[i] / count if readout is not None and s.target == last else None,
        )
        for i, s in enumerate(maps)
    ]


class _Full:
    """What the full model says at some positions.

    Args:
        logits: `(n, V)`.
    """

    def __init__(self, logits: Tensor) -> None:
        self.log_probabilities = logits.float().log_softmax(-1)
        self.top = logits.topk(min(max(TOPS), logits.shape[-1]), dim=-1).indices  # (n, 10)

    def hits(self, tokens: Tensor, k: int) -> int:
        return int((self.top[:, :k] == tokens[:, None]).any(-1).sum())

    def surprisal(self, tokens: Tensor) -> float:
        return -float(self.log_probabilities.gather(-1, tokens[:, None]).double().sum())


def _parts(states: Mapping[int, Tensor]) -> Iterable[dict[int, Tensor]]:
    count = len(next(iter(states.values())))
    for start in range(0, count, AT_ONCE):
        yield {layer: state[start : start + AT_ONCE] for layer, state in states.items()}


def best_of(scores: Sequence[Score], kind: str) -> dict[int, Score]:
    """The scores of a kind by the layer that it casts from, to the highest target there is."""
    top = max((s.target for s in scores), default=0)
    return {s.source: s for s in scores if (s.kind, s.target) == (kind, top)}
