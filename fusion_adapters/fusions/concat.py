"""Concat: one linear map over the concatenated layer states (arXiv 2209.15168, the form is inferred)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contract import Context, Fusion
from .numerics import bottleneck_width, check_init, linear, linear_bias, linear_weight


class Concat(Fusion):
    """`h = z_L + W [z_1; ..; z_N] + b`, or with a bottleneck `h = z_L + U gelu(W [z_1; ..; z_N] + b) + c`.

    With `init="paper"` the published form as far as it is known, `h = gelu(W [z_1; ..; z_N] + b)`; its exact layout
    stands in no text that could be read. Parameters: `N d^2 + d`, with a bottleneck `r`: `N d r + r + r d + d`.

    Args:
        hidden_size: Hidden size `d`.
        layers: The states to concatenate.
        bottleneck: Width `r` between the two maps; an int, or a float as fraction of `d`; None for a single map.
        init: `"identity"` adds to `z_L` and starts the last map at zero; `"paper"` has no residual.
    """

    widths = ("bottleneck",)
    absorbs = True

    def __init__(
        self,
        hidden_size: int,
        layers: Sequence[int],
        *,
        bottleneck: int | float | None = None,
        init: str = "identity",
    ) -> None:
        super().__init__(hidden_size, layers)
        self.residual = check_init(init) == "identity"
        width = hidden_size if bottleneck is None else bottleneck_width(bottleneck, hidden_size)
        fan_in = len(self.layers) * hidden_size
        self.weight = linear_weight(width, fan_in)
        self.bias = linear_bias(width, fan_in=fan_in)
        self.up_weight: nn.Parameter | None = None
        self.up_bias: nn.Parameter | None = None
        if bottleneck is not None:
            self.up_weight = linear_weight(hidden_size, width)
            self.up_bias = linear_bias(hidden_size, fan_in=width)
        if self.residual:
            last_map = (self.weight, self.bias) if self.up_weight is None else (self.up_weight, self.up_bias)
            for parameter in last_map:
                nn.init.zeros_(parameter)  # type: ignore[arg-type]

    def forward(
        self, states: Sequence[Tensor], last: Tensor, context: Context | None = None, return_weights: bool = False
    ) -> Any:
        # layer by layer, not one product: the concatenation would be a copy of all states
        kept = None
        # split, not sliced: the gradient of all layers is then built in one piece
        for state, weight in zip(states, self.weight.split(self.hidden_size, dim=1), strict=True):
            kept = self._added(kept, self.seen(state), weight)
        return self.finish(kept, last)

    def absorb(self, kept: Any, index: int, state: Tensor) -> Any:
        return self._added(kept, self.seen(state), self.weight[:, index * self.hidden_size :][:, : self.hidden_size])

    @staticmethod
    def absorb_together(fusions: Sequence[Concat], kept: Any, index: int, state: Tensor) -> Any:
        """`absorb` of several fusions of the same layers and norm, by one product: a large one takes less time than many small ones.

        Args:
            fusions: The fusions.
            kept: What the call for the state before returned, `(B T, R)` with the sum `R` of their widths; None for the first.
            index: See `absorb`.
            state: See `absorb`.
        """
        first = fusions[0]
        begin = index * first.hidden_size
        # put together for each layer: no copy of the weights is kept that could grow old
        weight = torch.cat([fusion.weight[:, begin : begin + first.hidden_size] for fusion in fusions])  # (R, d)
        bias = torch.cat([fusion.bias for fusion in fusions]) if kept is None else first.bias
        return _added(kept, first.seen(state), weight, bias)

    @staticmethod
    def apart(fusions: Sequence[Concat], kept: Tensor) -> list[Tensor]:
        """What `finish` of each wants, from what `absorb_together` returned for the last state."""
        return list(kept.split([len(fusion.bias) for fusion in fusions], dim=1))

    def _added(self, kept: Tensor | None, state: Tensor, weight: Tensor) -> Tensor:
        return _added(kept, state, weight, self.bias)

    def finish(self, kept: Any, last: Tensor) -> Tensor:
        mixed = self.scaled(kept).to(last.dtype).view(*last.shape[:-1], kept.shape[-1])
        if self.up_weight is not None:
            mixed = self.scaled(linear(F.gelu(mixed), self.up_weight, self.up_bias))  # (B, T, d)
        elif not self.residual:
            mixed = F.gelu(mixed)
        return self.added(last, mixed) if self.residual else mixed


def _added(kept: Tensor | None, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Adds a layer's product to the sum `(B T, r or d)`, float32: in 16 bits rounding would grow with depth."""
    flat = state.flatten(0, -2)
    # torch knows no autocast on the meta device
    if (
        flat.dtype == weight.dtype
        and flat.dtype.itemsize >= 4
        and (flat.is_meta or not torch.is_autocast_enabled(flat.device.type))
    ):
        return torch.addmm(bias, flat, weight.T) if kept is None else kept.addmm_(flat, weight.T)
    return (bias if kept is None else kept) + linear(flat, weight).float()
