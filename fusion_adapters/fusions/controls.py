"""Controls that read the last layer only: what a fusion must beat to show that depth helped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from .contract import Context, Fusion
from .numerics import BottleneckMLP, bottleneck_width, check_init


class Last(Fusion):
    """No fusion: `h = z_L`, no parameters. The plain frozen-backbone baseline."""

    paper: ClassVar[dict[str, Any]] = {}

    def __init__(self, hidden_size: int, layers: Sequence[int]) -> None:
        super().__init__(hidden_size, ())

    def forward(
        self, states: Sequence[Tensor], last: Tensor, context: Context | None = None, return_weights: bool = False
    ) -> Any:
        return last


class MLP(Fusion):
    """A residual MLP on the last layer, `h = z_L + f(z_L)` with DWAtt's `f` (arXiv 2209.15168, eq. 11).

    Parameters: `2 d r + 3 r + d`.

    Args:
        hidden_size: Hidden size `d`.
        layers: Ignored; the MLP reads `z_L`.
        bottleneck: Width `r`; an int, or a float as fraction of `d`.
        init: `"identity"` starts the second map at zero, `"paper"` like a linear layer.
    """

    widths = ("bottleneck",)

    def __init__(
        self,
        hidden_size: int,
        layers: Sequence[int],
        *,
        bottleneck: int | float = 4.0,
        init: str = "identity",
    ) -> None:
        super().__init__(hidden_size, ())
        self.mlp = BottleneckMLP(1, hidden_size, bottleneck_width(bottleneck, hidden_size))
        if check_init(init) == "identity":
            self.mlp.zero_output()

    def forward(
        self, states: Sequence[Tensor], last: Tensor, context: Context | None = None, return_weights: bool = False
    ) -> Any:
        (update,) = self.mlp([self.seen(last)])
        return self.added(last, update)
