"""DWConcat: Concat through a normalised bottleneck, whose parts a token weighs by attention over depth. Our own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contract import Context, Fusion
from .numerics import bottleneck_width, check_init, each_layer, layer_norm, linear, linear_weight


class DWConcat(Fusion):
    """`h = z_L + U gelu(LN(sum_n a_n * W_n x_n + b)) + c` with `x_n` the layer states, normalised without parameters.

    With all weights `a_n = 1` the sum is a Concat through a bottleneck. The weights are attention over depth:
    `a_n = N softmax_n(q . k_n / sqrt(r / H) + s_n)` in each of `H` groups of the bottleneck's coordinates, with the query
    `q = W_q x_L` from the last layer and learned keys `k_n` and offsets `s_n` per layer. Keys and offsets start at zero,
    hence at Concat; `U` and `c` start at zero, hence at the identity. Parameters at `N` layers and bottleneck `r`:
    `N d r + 3 r + d r + d`, and for the attention `d r + N r + H N`.

    Args:
        hidden_size: Hidden size `d`.
        layers: The states to fuse.
        bottleneck: Width `r`; an int, or a float as fraction of `d`. It is rounded down to a multiple of `heads`.
        heads: Distributions over depth per token.
        weights: `"attention"`, or `"uniform"` for `a_n = 1`, without query, keys and offsets.
        init: `"identity"`, or `"paper"` for `U` and `c` started like a linear layer.
    """

    widths = ("bottleneck",)
    has_weights = True
    absorbs = True

    def __init__(
        self,
        hidden_size: int,
        layers: Sequence[int],
        *,
        bottleneck: int | float = 0.25,
        heads: int = 4,
        weights: str = "attention",
        init: str = "identity",
    ) -> None:
        super().__init__(hidden_size, layers)
        if weights not in ("attention", "uniform"):
            raise ValueError(f"fusion_weights={weights!r} is unknown. Use 'attention', or 'uniform' for the control.")
        depth, width = len(self.layers), bottleneck_width(bottleneck, hidden_size)
        self.attends = weights == "attention"
        if heads < 1:
            raise ValueError(f"fusion_heads={heads} must be at least 1.")
        self.heads = min(heads, width)
        width -= width % self.heads
        self.down_weight = nn.Parameter(linear_weight(depth, width, hidden_size).data * depth**-0.5)
        self.down_bias = nn.Parameter(torch.zeros(width))
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.norm_bias = nn.Parameter(torch.zeros(width))
        self.up_weight = linear_weight(hidden_size, width)
        self.up_bias = nn.Parameter(torch.zeros(hidden_size))
        if check_init(init) == "identity":
            nn.init.zeros_(self.up_weight)
        if self.attends:
            self.query_weight = linear_weight(width, hidden_size)
            self.key = nn.Parameter(torch.zeros(depth, width))
            self.offset = nn.Parameter(torch.zeros(self.heads, depth))

    def depth_weights(self, last: Tensor) -> Tensor:
        """The softmax over depth, float32, `(B, T, H, N)`, from the normalised last state `(B, T, d)`."""
        depth = len(self.layers)
        if not self.attends:
            return torch.full((*last.shape[:-1], self.heads, depth), 1 / depth, device=last.device)
        query = self.scaled(linear(last, self.query_weight)).float().unflatten(-1, (self.heads, -1))  # (B, T, H, r / H)
        scores = torch.einsum("bthc,nhc->bthn", query, self.scaled(self.key).float().unflatten(-1, (self.heads, -1)))
        return F.softmax(scores * query.shape[-1] ** -0.5 + self.scaled(self.offset), dim=-1)

    def forward(
        self, states: Sequence[Tensor], last: Tensor, context: Context | None = None, return_weights: bool = False
    ) -> Any:
        weights = self.depth_weights(_normalised(last))  # (B, T, H, N)
        mixed: Any = 0.0
        for state, down, share in zip(states, self.down_weight.unbind(0), self._shares(weights), strict=True):
            # summed in float32: rounding would grow with depth
            mixed = mixed + each_layer(self._weighed_part, context, state, down, share)
        fused = self._widened(mixed, last)
        if return_weights:
            return fused, weights.squeeze(2) if self.heads == 1 else weights
        return fused

    def absorb(self, kept: Any, index: int, state: Tensor) -> Any:
        return [*(kept or ()), linear(_normalised(state), self.down_weight[index])]  # (B, T, r) each

    def finish(self, kept: Any, last: Tensor) -> Tensor:
        mixed: Any = 0.0
        for i, share in enumerate(self._shares(self.depth_weights(_normalised(last)))):
            mixed = mixed + self._weighed(kept[i], share)
            kept[i] = None
        return self._widened(mixed, last)

    def _shares(self, weights: Tensor) -> tuple[Tensor, ...]:
        """The `a_n` of each layer, `(B, T, H, 1)`."""
        return (len(self.layers) * weights).unsqueeze(-1).unbind(-2)

    def _weighed_part(self, state: Tensor, down: Tensor, share: Tensor) -> Tensor:
        return self._weighed(linear(_normalised(state), down), share)

    def _weighed(self, narrow: Tensor, share: Tensor) -> Tensor:
        """A layer's part of the sum, `a_n * W_n x_n`, float32, `(B, T, H, r / H)`, with uniform weights `(B, T, r)`."""
        return share * narrow.unflatten(-1, (self.heads, -1)) if self.attends else narrow.float()

    def _widened(self, mixed: Tensor, last: Tensor) -> Tensor:
        """`z_L + U gelu(LN(m + b)) + c`, `(B, T, d)`, from the weighed sum `m`."""
        mixed = self.scaled((mixed.flatten(-2) if self.attends else mixed) + self.down_bias)
        hidden = F.gelu(self.scaled(layer_norm(mixed, self.norm_weight, self.norm_bias))).to(last.dtype)
        return self.added(last, self.scaled(linear(hidden, self.up_weight, self.up_bias)))


def _normalised(state: Tensor) -> Tensor:
    """Layer norm without parameters, computed in float32, returned in the dtype of `state`."""
    return F.layer_norm(state.float(), state.shape[-1:]).to(state.dtype)
