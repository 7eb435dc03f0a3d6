"""The look of all figures: readable in print and by the colour-blind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Okabe and Ito's colours, told apart by people with any colour vision; marker and dash tell them apart in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")


def pyplot() -> Any:
    """Matplotlib without a screen, in the style of our figures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150})
    return plt


def spaced(numbers: Sequence[int], most: int) -> list[int]:
    """Which of many ticks are labelled: the first, the last, and round numbers between them, none nearer than the labels need.

    Args:
        numbers: What the ticks stand for, ascending; one tick beside the other.
        most: How many labels there is room for; one more may come out, closer to an end.

    Returns:
        Indices into `numbers`, ascending; all of them where there is room.
    """
    count = len(numbers)
    if count <= most:
        return list(range(count))
    least = -(-count // max(2, most))  # ticks from one label to the next
    step = next(s for s in (2, 5, 10, 20, 25, 50, 100, 200, 500, 1000, count) if s >= least)
    chosen = [0]
    for i in range(1, count - 1):
        # not quite as far from the ends, or 10 would be missing between 1 and 20
        if numbers[i] % step == 0 and min(i - chosen[-1], count - 1 - i) >= 0.8 * least:
            chosen.append(i)
    return [*chosen, count - 1]


def apart(places: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Moves places of labels along a line as little as it takes that none is nearer to another than `least`.

    Args:
        places: Where each label would stand.
        least: The smallest distance of two labels.
        low: Where the line begins.
        high: Where it ends; passed over if the labels do not fit between the two.

    Returns:
        The places, in the order in which they were given.
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    groups: list[list[float]] = []  # of labels that touch: their middle, their number
    for i in order:
        groups.append([places[i], 1])
        while True:
            middle, count = groups[-1]
            half = (count - 1) * least / 2
            groups[-1][0] = max(low + half, min(high - half, middle))
            if len(groups) < 2 or groups[-1][0] - half - groups[-2][0] - (groups[-2][1] - 1) * least / 2 >= least * (
                1 - 1e-9
            ):
                break
            middle, count = groups.pop()
            before, others = groups[-1]
            groups[-1] = [(before * others + middle * count) / (others + count), others + count]
    found = [middle + (k - (count - 1) / 2) * least for middle, count in groups for k in range(int(count))]
    result = [0.0] * len(places)
    for i, place in zip(order, found, strict=True):
        result[i] = place
    return result
