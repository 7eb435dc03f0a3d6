"""Choosing the width of a fusion so that it fits a budget of parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

WIDEST = 2**32  # no width is searched beyond


@dataclass(frozen=True)
class Budget:
    """What may be trained, and what the fusion would train: all that `Fusion.fit_widths` goes by.

    Attributes:
        fusion: The method's name.
        parameters: The largest number of parameters allowed.
        hidden_size: Hidden size `d` of the backbone.
        options: The method's options that were set.
        count: The parameters trained at given widths, `count(bottleneck=8)`: those of the fusion (of the fusions of both
            stacks), and of LoRA beside it.
    """

    fusion: str
    parameters: int
    hidden_size: int
    options: dict[str, Any]
    count: Callable[..., int]


class BudgetTooSmallError(ValueError):
    """A budget below the smallest size of a method.

    Attributes:
        smallest: The parameters of that size.
    """

    def __init__(self, what: str, smallest: int, parameters: int) -> None:
        self.smallest = smallest
        super().__init__(
            f"The budget of {parameters:,} parameters is too small: {what} trains {smallest:,}. Raise the budget to at "
            "least that, or choose another method."
        )
        self._arguments = (what, smallest, parameters)

    def __reduce__(self) -> tuple[type, tuple[str, int, int]]:
        """Lets the error cross from one process to another."""
        return type(self), self._arguments


def largest_width(budget: Budget, name: str) -> int:
    """The largest whole number for the width `name` within the budget; the count must not fall as the width grows.

    Raises:
        BudgetTooSmallError: If a width of 1 is too large.
        ValueError: If the number of parameters does not depend on the width.
    """

    def count(width: int) -> int:
        return budget.count(**{name: width})

    low, high = 0, 1
    while count(high) <= budget.parameters:
        low, high = high, 2 * high
        if high > WIDEST:
            raise ValueError(
                f"{budget.fusion!r} trains {count(low):,} parameters whatever its fusion_{name}, so that no budget can choose it. "
                f"Leave {name!r} out of `widths` in the class of the fusion."
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= budget.parameters else (low, middle)
    if not low:
        article = "an" if name[0] in "aeiou" else "a"
        raise BudgetTooSmallError(f"{budget.fusion!r} with {article} {name} of 1", count(1), budget.parameters)
    while low > 1 and count(low - 1) == count(low):
        low -= 1  # a method that rounds its width down: say the one that is built
    return low
