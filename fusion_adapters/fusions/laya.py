"""LAYA: weights over depth from the content of all layers together (arXiv 2511.12723)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contract import Context, Fusion
from .numerics import bottleneck_width, check_init, linear, linear_bias, linear_weight


class LAYA(Fusion):
    """`h = z_L + U sum_n a_n x_n + c` with `x_n = W_n z_n + b_n` and `a = softmax(S gelu(R [x_1; ..; x_N]) / tau)`.

    The scores see the content of every layer at once. `x_n`, the scorer and its temperature are the paper's (`psi` the
    identity, a scorer twice as wide as `x_n`, `tau` fixed); the map `U` back to the hidden size is ours, because the
    model's head expects that size. The residual and `U = 0` at the start make it the identity; `init="paper"` has no
    residual. Parameters at `N` layers and bottleneck `r`: `N (d r + r) + (2 N r^2 + 2 r) + (2 r N + N) + (r d + d)`.

    Args:
        hidden_size: Hidden size `d`.
        layers: The states to fuse.
        bottleneck: Width `r` of the `x_n`; an int, or a float as fraction of `d`.
        temperature: `tau`, by which the scores are divided.
        init: `"identity"` or `"paper"`, as above.
    """

    paper: ClassVar[dict[str, Any]] = {"temperature": 1.5, "init": "paper"}
    widths = ("bottleneck",)
    has_weights = True

    def __init__(
        self,
        hidden_size: int,
        layers: Sequence[int],
        *,
        bottleneck: int | float = 0.25,
        temperature: float = 1.5,
        init: str = "identity",
    ) -> None:
        super().__init__(hidden_size, layers)
        if temperature <= 0:
            raise ValueError(f"fusion_temperature={temperature} must be above 0.")
        depth, width = len(self.layers), bottleneck_width(bottleneck, hidden_size)
        self.temperature = temperature
        self.residual = check_init(init) == "identity"
        self.down_weight = linear_weight(depth, width, hidden_size)
        self.down_bias = linear_bias(depth, width, fan_in=hidden_size)
        self.hidden_weight = linear_weight(2 * width, depth * width)
        self.hidden_bias = linear_bias(2 * width, fan_in=depth * width)
        self.score_weight = linear_weight(depth, 2 * width)
        self.score_bias = linear_bias(depth, fan_in=2 * width)
        self.up_weight = linear_weight(hidden_size, width)
        self.up_bias = linear_bias(hidden_size, fan_in=width)
        if self.residual:
            nn.init.zeros_(self.up_weight)
            nn.init.zeros_(self.up_bias)

    def forward(
        self, states: Sequence[Tensor], last: Tensor, context: Context | None = None, return_weights: bool = False
    ) -> Any:
        maps = zip(self.down_weight.unbind(0), self.down_bias.unbind(0), strict=True)
        narrow = [self.scaled(linear(self.seen(z), w, b)) for z, (w, b) in zip(states, maps, strict=True)]  # N of (B, T, r)
        hidden = F.gelu(self.scaled(linear(torch.cat(narrow, dim=-1), self.hidden_weight, self.hidden_bias)))  # (B, T, 2 r)
        scores = self.scaled(linear(hidden, self.score_weight, self.score_bias)).float()
        weights = F.softmax(scores / self.temperature, dim=-1)  # (B, T, N)
        mixed = torch.zeros_like(narrow[0], dtype=torch.float32)
        for share, x in zip(weights.unbind(-1), narrow, strict=True):
            mixed = mixed + share.unsqueeze(-1) * x
        update = self.scaled(linear(mixed.to(last.dtype), self.up_weight, self.up_bias))  # (B, T, d)
        fused = self.added(last, update) if self.residual else update
        return (fused, weights) if return_weights else fused
