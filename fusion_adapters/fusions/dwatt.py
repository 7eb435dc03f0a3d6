"""DWAtt: each token attends over the outputs of all layers (arXiv 2209.15168)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contract import Context, Fusion
from .numerics import (
    BottleneckMLP,
    bottleneck_width,
    check_heads,
    check_init,
    each_layer,
    layer_norm,
    layer_norms,
    linear_weight,
)

POSITION_SIZE = 24  # d_pos, the same for every depth (Table 4)
# From the identity start the outer gains must grow from 0 to about 1, a long way for an optimizer that moves each
# parameter by a learning rate of 3e-4 a step: the stored gain counts 16-fold (measured in docs/results/defaults.md).
GAIN_SCALE = 16.0
# Of few positions several layers are computed at once, so many values of a state together: a call of an operation costs more than its
# arithmetic there (for one position of 30 layers at d = 576, 7 ms layer by layer and 0.9 ms so); larger, and the caches are too small.
TOGETHER = 2**16


class DWAtt(Fusion):
    """Depth-wise attention, equations 4 to 11 of arXiv 2209.15168.

    `h = z_L + sum_n softmax_n(q . k_n) v_n` with the query `q = 1 + elu(z_L + f_Q(z_L))` from the last layer, static
    keys `k_n = W_K p_n` from learned layer embeddings `p_n`, and values `v_n = LN_n(f_n(z_n))` from a bottleneck MLP
    per layer. Parameters at `N` layers and bottleneck `r`:
    `N (2 d r + 3 r + 3 d) + (2 d r + 3 r + d) + 24 N + 24 d`, with uniform weights `N (2 d r + 3 r + 3 d)`.

    Beyond the paper: `heads` groups the coordinates of the hidden vector, and each group has its own distribution over
    depth; `scale` divides the scores by the square root of the group's size; `dropout` drops weights over depth.

    Args:
        hidden_size: Hidden size `d`.
        layers: The states to attend over.
        bottleneck: Width of the MLPs; an int, or a float as fraction of `d` (the paper's gamma).
        heads: Distributions over depth per token; must divide `d`.
        scale: Whether the scores are divided by the square root of the size of a head.
        dropout: Probability of dropping a weight over depth in training.
        weights: `"attention"`, or `"uniform"` for the control that gives every layer the same weight and has neither query
            nor keys: what the attention over depth adds is the difference between the two.
        init: `"identity"` starts the gain of every outer norm at zero and stores gain and bias as a sixteenth of what
            they count for, so that they learn fast enough; `"paper"` starts the gains at one.
    """

    paper: ClassVar[dict[str, Any]] = {"bottleneck": 0.5, "heads": 1, "scale": False, "dropout": 0.0, "init": "paper"}
    widths = ("bottleneck",)
    has_weights = True
    absorbs = True

    def __init__(
        self,
        hidden_size: int,
        layers: Sequence[int],
        *,
        bottleneck: int | float = 0.5,
        heads: int = 8,
        scale: bool = True,
        dropout: float = 0.0,
        weights: str = "attention",
        init: str = "identity",
    ) -> None:
        super().__init__(hidden_size, layers)
        if weights not in ("attention", "uniform"):
            raise ValueError(f"fusion_weights={weights!r} is unknown. Use 'attention', or 'uniform' for the control.")
        depth, width = len(self.layers), bottleneck_width(bottleneck, hidden_size)
        self.attends = weights == "attention"
        self.heads = check_heads(heads, hidden_size)
        self.scale = (hidden_size // self.heads) ** -0.5 if scale else 1.0
        self.dropout = dropout
        if self.attends:
            self.position = nn.Parameter(torch.rand(depth, POSITION_SIZE))
            self.key_weight = linear_weight(hidden_size, POSITION_SIZE)
            self.query = BottleneckMLP(1, hidden_size, width)
        self.value = BottleneckMLP(depth, hidden_size, width)
        gain, self.gain_scale = (1.0, 1.0) if check_init(init) == "paper" else (0.0, GAIN_SCALE)
        self.value_norm_weight = nn.Parameter(torch.full((depth, hidden_size), gain))
        self.value_norm_bias = nn.Parameter(torch.zeros(depth, hidden_size))

    def depth_weights(self, last: Tensor) -> Tensor:
        """The softmax over depth, float32, `(B, T, H, N)`, from the last state `(B, T, d)` (eqs. 5, 7, 10)."""
        if not self.attends:
            depth = len(self.layers)
            return torch.full((*last.shape[:-1], self.heads, depth), 1 / depth, device=last.device)
        last = self.seen(last)
        (offset,) = self.query([last])
        query = 1 + F.elu(last + offset).float()  # (B, T, d)
        keys = (self.scaled(self.position) @ self.scaled(self.key_weight).T).float()  # (N, d)
        # float32: unscaled scores reach tens, where a bf16 product would be off by a quarter
        scores = torch.einsum("bthc,nhc->bthn", query.unflatten(-1, (self.heads, -1)), keys.unflatten(-1, (self.heads, -1)))
        return F.softmax(scores * self.scale, dim=-1)

    def forward(
        self, states: Sequence[Tensor], last: Tensor, context: Context | None = None, return_weights: bool = False
    ) -> Any:
        weights = each_layer(self.depth_weights, context, last)  # (B, T, H, N)
        total = self._start(last)  # summed in float32: rounding would grow with depth
        few = not (
            torch.is_grad_enabled() or torch.compiler.is_compiling()
        )  # what is compiled or exported is for any length
        if few and (count := TOGETHER // max(1, last.numel())) > 1:
            for first in range(0, len(states), count):
                total = total + self._together(states, self._dropped(weights, last), slice(first, first + count))
        else:
            layers = self._layers(self._dropped(weights, last))
            for state, (share, gain, bias, *mlp) in zip(states, layers, strict=True):
                total = total + each_layer(self._weighed_value, context, self.seen(state), share, gain, bias, *mlp)
        fused = self._end(total, last)
        if return_weights:
            return fused, weights.squeeze(2) if self.heads == 1 else weights
        return fused

    def _together(self, states: Sequence[Tensor], weights: Tensor, some: slice) -> Tensor:
        """Part of the sum, float32 `(B, T, d)`: that of some of the layers by operations over all of them; weights `(B, T, H, N)`."""
        value = self.value.together(self.seen(torch.stack(list(states[some])).flatten(1, 2)), some)  # (n, B T, d)
        gain, bias = (self.gain_scale * self.scaled(p[some]) for p in (self.value_norm_weight, self.value_norm_bias))
        normed = layer_norms(value, gain, bias).unflatten(-1, (self.heads, -1))  # (n, B T, H, d / H)
        share = weights[..., some].flatten(0, 1).movedim(-1, 0).unsqueeze(-1)  # (n, B T, H, 1)
        return (share * normed).sum(0, dtype=torch.float32).view(states[0].shape)

    def absorb(self, kept: Any, index: int, state: Tensor) -> Any:
        *inner, _, _ = (parameter[index] for parameter in self.value.parameters())
        return [*(kept or ()), self.value.narrow(self.seen(state), *inner)]  # (B, T, r) each

    def finish(self, kept: Any, last: Tensor) -> Tensor:
        total = self._start(last)
        layers = self._layers(self._dropped(self.depth_weights(last), last))
        for i, (share, gain, bias, *_, up, up_bias) in enumerate(layers):
            total = total + self._weighed(self.value.wide(kept[i], up, up_bias), share, gain, bias)
            kept[i] = None
        return self._end(total, last)

    def _start(self, last: Tensor) -> Tensor:
        """What the values are added to, float32: `z_L`, or zeros where they are scaled before they meet it."""
        return last.float() if self.norm == "none" else torch.zeros_like(last, dtype=torch.float32)

    def _end(self, total: Tensor, last: Tensor) -> Tensor:
        return total.to(last.dtype) if self.norm == "none" else self.added(last, total)

    def _dropped(self, weights: Tensor, last: Tensor) -> Tensor:
        return F.dropout(weights, self.dropout, self.training).to(last.dtype)

    def _layers(self, weights: Tensor) -> list[tuple[Tensor, ...]]:
        """For each layer its weights `(B, T, H, 1)`, the gain and bias of its outer norm, and its MLP's parameters."""
        shares = weights.unsqueeze(-1).unbind(-2)
        gains, biases = (self.gain_scale * self.scaled(p) for p in (self.value_norm_weight, self.value_norm_bias))  # (N, d)
        rows = zip(shares, gains.unbind(0), biases.unbind(0), self.value.layers(), strict=True)
        return [(share, gain, bias, *mlp) for share, gain, bias, mlp in rows]

    def _weighed_value(self, state: Tensor, share: Tensor, gain: Tensor, bias: Tensor, *mlp: Tensor) -> Tensor:
        return self._weighed(self.value.apply_layer(state, *mlp), share, gain, bias)

    def _weighed(self, value: Tensor, share: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        """A layer's part of the sum, `s_n LN_n(f_n(z_n))`, `(B, T, d)`, from `f_n(z_n)`."""
        normed = layer_norm(value, gain, bias)
        return (share * normed.unflatten(-1, (self.heads, -1))).flatten(-2)
