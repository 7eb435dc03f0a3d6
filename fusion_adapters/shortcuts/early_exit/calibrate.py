"""From a target agreement to the threshold of early exit on development data, and what it saves on test data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .margins import Margins, leave
from .options import LATER, ExitOptions
from .sure import NEVER

PAPER = tuple(round(0.1 * i, 1) for i in range(11))  # lambdas of the paper's curves, without those that always or never pass
CANDIDATES = 512
RESAMPLES, FEWEST = 1000, 20  # of the bootstrap; of fewer texts, resamples say little of others


@dataclass(frozen=True)
class Saving:
    """What early exit at one threshold saves, and what it costs in agreement.

    Attributes:
        threshold: `lambda`.
        agreement: The share of positions (of a classifier: texts) with the full model's first choice.
        agreement_interval: 95 %, by the bootstrap over texts; None for fewer than twenty.
        layers: The mean number of blocks that run before a position is decided, the paper's measure.
        saved: `1 - layers / L`.
        saved_interval: 95 %, likewise.
        looks: The mean number of looks at the head that did not end the pass.
        positions: How many were judged.
        texts: In how many rows.
    """

    threshold: float
    agreement: float
    agreement_interval: tuple[float, float] | None
    layers: float
    saved: float
    saved_interval: tuple[float, float] | None
    looks: float
    positions: int
    texts: int


@dataclass(frozen=True)
class Calibration:
    """Exits whose threshold was chosen on development data.

    Attributes:
        kind: The kind of shortcut.
        layers: The layers to leave at.
        num_layers: `L`.
        target: The agreement that was asked for.
        mean_length: `N` of the threshold, from the development data.
        dev: What the threshold does there.
        test: What it does on test data, if there are such.
    """

    kind: str
    layers: tuple[int, ...]
    num_layers: int
    target: float
    mean_length: float
    dev: Saving
    test: Saving | None = None

    @property
    def threshold(self) -> float:
        """`lambda`."""
        return self.dev.threshold

    def options(self, kv: str = LATER, short_list: Sequence[int] | None = None) -> ExitOptions:
        """For `EarlyExit` and `EarlyExitClassifier`."""
        return ExitOptions(self.layers, self.threshold, self.kind, self.mean_length, kv, short_list)

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


def calibrate(dev: Margins, target: float = 0.95, test: Margins | None = None) -> Calibration:
    """The lowest threshold from which upwards the agreement is at least the target on development data, and what it does on test data.

    Args:
        dev: Margins of the development data, of the layers to leave at; `dev.only([...])` for few of them.
        target: An agreement, from 0 to 1.
        test: Margins of the test data, of the same kind and layers at least.

    Raises:
        ValueError: If the target is none, or the margins do not fit together.
    """
    if not 0 < target <= 1:
        raise ValueError(
            f"target={target}: it is the share of positions that keep the full model's choice, above 0 and at most 1."
        )
    if test is not None:
        if (test.kind, test.num_layers) != (dev.kind, dev.num_layers):
            raise ValueError(
                f"The margins for the test are of {test.kind!r} shortcuts of {test.num_layers} blocks, those for the calibration of "
                f"{dev.kind!r} ones of {dev.num_layers}. Compute both by the same shortcuts."
            )
        test = test.only(dev.layers)
    passing = dev.passing()
    lam = _lowest(passing, dev.agrees, target)
    found = None if test is None else saving(test, lam, dev.mean_length)
    return Calibration(dev.kind, dev.layers, dev.num_layers, target, dev.mean_length, saving(dev, lam), found)


def saving(margins: Margins, lam: float, mean_length: float | None = None) -> Saving:
    """What a threshold saves at given positions.

    Args:
        margins: Of the positions.
        lam: `lambda`.
        mean_length: `N`; None for that of these positions.
    """
    first, right = margins.leave(lam, mean_length)
    depths = torch.tensor([*margins.layers, margins.num_layers])[first].double()  # (n,)
    texts, number = margins.rows.unique(return_inverse=True)
    sums = [
        torch.zeros(len(texts), dtype=torch.float64).index_add(0, number, x)
        for x in (right.double(), depths, torch.ones_like(depths))
    ]
    layers = float(depths.mean())
    return Saving(
        float(lam),
        float(right.double().mean()),
        _interval(sums[0], sums[2]),
        layers,
        1 - layers / margins.num_layers,
        _interval(sums[2] - sums[1] / margins.num_layers, sums[2]),
        float(first.double().mean()),
        len(depths),
        len(texts),
    )


def exit_curve(margins: Margins, lams: Sequence[float] | None = None, mean_length: float | None = None) -> list[Saving]:
    """What thresholds save and cost, from low to high.

    Args:
        margins: Of the positions.
        lams: The lambdas; None for the paper's, with its -1.112 (always) and 1.112 (never).
        mean_length: `N`; None for that of these positions.
    """
    chosen = [-NEVER, *PAPER, NEVER] if lams is None else sorted(lams)
    return [saving(margins, lam, mean_length) for lam in chosen]


def choose_exits(dev: Margins, count: int, target: float = 0.95, look_cost: float = 0.0) -> tuple[int, ...]:
    """Chooses few layers to leave at, one after the other, each the one that makes a position cheapest at the target agreement.

    Args:
        dev: Margins of the development data, of all layers that may be chosen.
        count: How many at most; fewer where one more would cost more than it saves.
        target: The agreement.
        look_cost: What a look at the head that does not end the pass costs, in blocks: parameters of the head (of the short list, where
            one is used) over those of a block.

    Raises:
        ValueError: If the count is below 1.
    """
    if count < 1:
        raise ValueError(f"count={count}: choose at least one layer to leave at.")
    passing, chosen = dev.passing(), list[int]()
    best = float("inf")
    for _ in range(min(count, len(dev.layers))):
        costs = {
            i: _cost(dev, passing, sorted([*chosen, i]), target, look_cost)
            for i in range(len(dev.layers))
            if i not in chosen
        }
        cheapest = min(costs, key=lambda i: costs[i])
        if costs[cheapest] >= best:
            break
        best = costs[cheapest]
        chosen.append(cheapest)
    return tuple(dev.layers[i] for i in sorted(chosen))


def _cost(dev: Margins, passing: Tensor, at: list[int], target: float, look_cost: float) -> float:
    """Of a position, in blocks."""
    some, agrees = passing[:, at], dev.agrees[:, at]
    first, _ = leave(some, agrees, _lowest(some, agrees, target, CANDIDATES // 4))
    depths = torch.tensor([*(dev.layers[i] for i in at), dev.num_layers])[first]
    return float(depths.double().mean()) + look_cost * float(first.double().mean())


def _lowest(passing: Tensor, agrees: Tensor, target: float, candidates: int = CANDIDATES) -> float:
    """The lowest of some lambdas at which, and above which, the agreement is at least the target; `passing` `(n, E)`."""
    top = passing.max(1).values.sort().values  # (n,): at a lambda of these, that position and those below leave nowhere
    steps = torch.linspace(0, len(top) - 1, min(candidates, len(top))).round().long().unique()
    lams = [float(passing.min()) - 1e-3, *top[steps].unique().tolist()]
    found = max(NEVER, lams[-1])
    for lam in reversed(lams):
        _, right = leave(passing, agrees, lam)
        if float(right.double().mean()) < target:
            break
        found = lam
    return float(found)


def _interval(sums: Tensor, counts: Tensor) -> tuple[float, float] | None:
    """Of a mean over positions, from its sums over texts `(texts,)`: texts drawn with replacement."""
    if len(sums) < FEWEST:
        return None
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(sums), (RESAMPLES, len(sums)), generator=generator)
    means = sums[drawn].sum(1) / counts[drawn].sum(1)  # (RESAMPLES,)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
