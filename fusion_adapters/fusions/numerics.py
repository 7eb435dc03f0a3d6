"""What several fusions compute alike: checks of options, linear maps and norms in the states' dtype, DWAtt's MLP."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .contract import Context
from .scaled import Scaled

_UNDRAWN = threading.local()


def bottleneck_width(bottleneck: int | float, hidden_size: int) -> int:
    """Width of a bottleneck: an int is the width itself, a float a fraction of the hidden size (the papers' gamma).

    Raises:
        ValueError: If the width would be below 1.
    """
    width = round(bottleneck * hidden_size) if isinstance(bottleneck, float) else bottleneck
    if width < 1:
        raise ValueError(
            f"fusion_bottleneck={bottleneck!r} gives a width of {width} at hidden size {hidden_size}. Give the width as "
            "an integer of at least 1, or a positive fraction of the hidden size as a float (0.5 for half of it)."
        )
    return width


def check_heads(heads: int, hidden_size: int) -> int:
    """Returns the number of heads if it divides the hidden size.

    Raises:
        ValueError: If it does not; the message lists the numbers that do.
    """
    if heads < 1 or hidden_size % heads:
        near = [h for h in range(1, min(hidden_size, 128) + 1) if hidden_size % h == 0]
        raise ValueError(f"fusion_heads={heads} does not divide the hidden size {hidden_size}. Possible values: {near}.")
    return heads


def check_init(init: str) -> str:
    """Returns `init` if it is a known start.

    Raises:
        ValueError: If it is neither `"identity"` nor `"paper"`.
    """
    if init not in ("identity", "paper"):
        raise ValueError(
            f"fusion_init={init!r} is unknown. Use 'identity' (a fresh adapter leaves the model's answers as they were) "
            "or 'paper' (the published form and start)."
        )
    return init


def each_layer(function: Callable[..., Tensor], context: Context | None, *args: Any) -> Tensor:
    """Calls `function(*args)`; where the context says so, its inner values are not kept for the backward pass.

    The function must draw no random numbers.
    """
    if context is None or not context.recompute or not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b` in the dtype of `x`, from float32 parameters (or those of a model that was cast as a whole)."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _linears(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `linear` for each layer: `(N, rows, in)` with `(N, out, in)` and `(N, out)`."""
    return torch.baddbmm(bias.to(x.dtype).unsqueeze(1), x, weight.to(x.dtype).mT)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Layer norm over the last axis, computed in float32, returned in the dtype of `x`."""
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float()).to(x.dtype)


def layer_norms(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `layer_norm`, each of `(N, rows, d)` with a weight and bias of its own, `(N, d)` each."""
    normed = F.layer_norm(x.float(), x.shape[-1:])
    return torch.addcmul(bias.float().unsqueeze(1), normed, weight.float().unsqueeze(1)).to(x.dtype)


def linear_weight(*shape: int) -> nn.Parameter:
    """A weight of shape `(..., out, in)`, started like `torch.nn.Linear`."""
    return _drawn(shape, shape[-1] ** -0.5)


def linear_bias(*shape: int, fan_in: int) -> nn.Parameter:
    """A bias of shape `(..., out)`, started like `torch.nn.Linear` with `fan_in` inputs."""
    return _drawn(shape, fan_in**-0.5)


def _drawn(shape: tuple[int, ...], bound: float) -> nn.Parameter:
    tensor = torch.empty(shape)
    return nn.Parameter(tensor if getattr(_UNDRAWN, "on", False) else tensor.uniform_(-bound, bound))


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """In the body, weights that this thread makes hold what was in memory: for those that a file fills, a quarter of a load's time."""
    _UNDRAWN.on = True
    try:
        yield
    finally:
        _UNDRAWN.on = False


class BottleneckMLP(Scaled):
    """DWAtt's MLP for each of `depth` layers: `f_n(x) = W_n LN_n(gelu(U_n x))` (arXiv 2209.15168, eq. 11).

    The weights of all layers lie in one tensor per kind, so that a checkpoint holds few tensors whatever the depth.
    """

    def __init__(self, depth: int, hidden_size: int, width: int) -> None:
        super().__init__()
        self.down_weight = linear_weight(depth, width, hidden_size)
        self.down_bias = linear_bias(depth, width, fan_in=hidden_size)
        self.norm_weight = nn.Parameter(torch.ones(depth, width))
        self.norm_bias = nn.Parameter(torch.zeros(depth, width))
        self.up_weight = linear_weight(depth, hidden_size, width)
        self.up_bias = linear_bias(depth, hidden_size, fan_in=width)

    def zero_output(self) -> None:
        """Makes every `f_n` return zero until it is trained."""
        nn.init.zeros_(self.up_weight)
        nn.init.zeros_(self.up_bias)

    def layers(self) -> list[tuple[Tensor, ...]]:
        """The parameters of each layer, for `apply_layer`."""
        # unbind, not indexing: the gradient of all layers is then built in one piece
        return list(zip(*(p.unbind(0) for p in self.parameters()), strict=True))

    def narrow(self, x: Tensor, down: Tensor, down_bias: Tensor, norm: Tensor, norm_bias: Tensor) -> Tensor:
        """The inner half of one layer's MLP, `LN_n(gelu(U_n x))`, `(B, T, d)` to `(B, T, r)`."""
        return self.scaled(layer_norm(F.gelu(self.scaled(linear(x, down, down_bias))), norm, norm_bias))

    def wide(self, narrow: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
        """The outer half, `W_n`, `(B, T, r)` to `(B, T, d)`."""
        return self.scaled(linear(narrow, up, up_bias))

    def together(self, x: Tensor, some: slice) -> Tensor:
        """Some layers' MLPs by operations over all of them, `(n, rows, d)` to the same shape; quicker for few rows."""
        down, down_bias, norm, norm_bias, up, up_bias = (p[some] for p in self.parameters())
        inner = self.scaled(layer_norms(F.gelu(self.scaled(_linears(x, down, down_bias))), norm, norm_bias))  # (n, rows, r)
        return self.scaled(_linears(inner, up, up_bias))

    def apply_layer(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """One layer's MLP, `(B, T, d)` to the same shape."""
        *inner, up, up_bias = parameters
        return self.wide(self.narrow(x, *inner), up, up_bias)

    def forward(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Maps `depth` states, each `(B, T, d)`, to as many of the same shape."""
        return [self.apply_layer(x, *parameters) for x, parameters in zip(states, self.layers(), strict=True)]
