"""What a layer fusion is: the contract, the index rule, and the numerics shared by all methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass
class Context:
    """What one forward pass knows besides the layer states. Only fusions that mix positions read it.

    Attributes:
        attention_mask: `(B, T)`, non-zero at real tokens; or a 4-D mask as the backbone was given it; or None.
        causal: Whether a position may only see itself and earlier ones (decoders).
        cached_positions: Positions that the backbone keeps in its KV cache and does not show in this call.
        recompute: Whether to trade time for memory in training: keep the layer states, and compute what comes of each of
            them again in the backward pass.
        block_args: Positional arguments of the last block, without its hidden states.
        block_kwargs: Keyword arguments of the last block, without its hidden states.
    """

    attention_mask: Tensor | None = None
    causal: bool = False
    cached_positions: int = 0
    recompute: bool = False
    block_args: tuple[Any, ...] = ()
    block_kwargs: dict[str, Any] | None = None


class Fusion(nn.Module):
    """Maps the layer states of a position to one vector of the hidden size.

    Layer states are numbered as `z_0 .. z_L`: `z_0` is the input of the first block, `z_i` the output of block `i`,
    and `z_L` is taken before any final norm. Parameters are float32; matrix products run in the dtype of the states,
    norms and softmax in float32; the result has the dtype of `z_L`.

    A new method is a subclass in a file of its own and one line in the registry (`fusions/__init__.py`). Its keyword
    arguments are its options; `FusionConfig` offers each as `fusion_<option>`.

    Attributes:
        layers: Indices of the states that `forward` wants, ascending.
        stop_gradient: Whether the caller keeps this fusion's gradients from the backbone, all but that of `z_L` itself.
        paper: Options that give the published form.
        has_weights: Whether `forward(..., return_weights=True)` can return weights over depth.
        absorbs: Whether `absorb` and `finish` can take the place of `forward` where no gradient is needed.
        mixes_positions: Whether the result at a position depends on other positions (then a KV cache is refused).
    """

    paper: ClassVar[dict[str, Any]] = {"init": "paper"}
    has_weights: ClassVar[bool] = False
    absorbs: ClassVar[bool] = False
    mixes_positions: ClassVar[bool] = False

    def __init__(self, hidden_size: int, layers: Sequence[int]) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.layers = tuple(layers)
        self.stop_gradient = False

    def forward(
        self, states: Sequence[Tensor], last: Tensor, context: Context | None = None, return_weights: bool = False
    ) -> Any:
        """Fuses.

        Args:
            states: The states `z_i` for `i` in `self.layers`, each `(B, T, d)` and of one dtype.
            last: `z_L`, `(B, T, d)`; given also when `self.layers` leaves it out.
            context: Masks and the like; None stands for no padding, bidirectional.
            return_weights: Also return the weights over depth, float32, `(B, T, N)` or with heads `(B, T, H, N)`.

        Returns:
            The fused state `(B, T, d)` in the dtype of `last`; with `return_weights` the pair of it and the weights.
        """
        raise NotImplementedError

    def absorb(self, kept: Any, index: int, state: Tensor) -> Any:
        """Takes in one state, as the backbone reaches it, so that the state itself need not be kept.

        Args:
            kept: What the call for the state before returned; None for the first.
            index: Which of `self.layers` it is; the calls come in this order.
            state: That state, `(B, T, d)`.

        Returns:
            What `finish` needs of the states so far.
        """
        raise NotImplementedError

    def finish(self, kept: Any, last: Tensor) -> Tensor:
        """The fused state `(B, T, d)` from what `absorb` kept of all states, equal to that of `forward`."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, layers={list(self.layers)}"


def resolve_layers(layers: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """Turns a choice of layers into ascending indices of the states `z_0 .. z_L`.

    Args:
        layers: Indices into the `L + 1` states, negatives count from the end (`-1` is `z_L`); None means `1 .. L`.
        num_layers: The number of blocks `L`.

    Raises:
        ValueError: If the choice is empty, names a state twice, or names one that does not exist.
    """
    if layers is None:
        return tuple(range(1, num_layers + 1))
    count = num_layers + 1
    wrong = [i for i in layers if not -count <= i < count]
    if wrong:
        raise ValueError(
            f"fusion_layers={list(layers)}: {wrong} out of range. A backbone of {num_layers} blocks has the layer "
            f"states 0 (embeddings) to {num_layers} (last block), or {-count} to -1 from the end. Choose among these."
        )
    resolved = sorted(i % count for i in layers)
    if len(set(resolved)) != len(resolved) or not resolved:
        raise ValueError(
            f"fusion_layers={list(layers)} means the layer states {resolved}: name at least one state, and each "
            "only once (a negative index counts from the end, -1 is the last block)."
        )
    return tuple(resolved)


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


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Layer norm over the last axis, computed in float32, returned in the dtype of `x`."""
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float()).to(x.dtype)


def linear_weight(*shape: int) -> nn.Parameter:
    """A weight of shape `(..., out, in)`, started like `torch.nn.Linear`."""
    bound = shape[-1] ** -0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def linear_bias(*shape: int, fan_in: int) -> nn.Parameter:
    """A bias of shape `(..., out)`, started like `torch.nn.Linear` with `fan_in` inputs."""
    bound = fan_in**-0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class BottleneckMLP(nn.Module):
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

    @staticmethod
    def narrow(x: Tensor, down: Tensor, down_bias: Tensor, norm: Tensor, norm_bias: Tensor) -> Tensor:
        """The inner half of one layer's MLP, `LN_n(gelu(U_n x))`, `(B, T, d)` to `(B, T, r)`."""
        return layer_norm(F.gelu(linear(x, down, down_bias)), norm, norm_bias)

    @classmethod
    def apply_layer(cls, x: Tensor, *parameters: Tensor) -> Tensor:
        """One layer's MLP, `(B, T, d)` to the same shape."""
        *inner, up, up_bias = parameters
        return linear(cls.narrow(x, *inner), up, up_bias)

    def forward(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Maps `depth` states, each `(B, T, d)`, to as many of the same shape."""
        return [self.apply_layer(x, *parameters) for x, parameters in zip(states, self.layers(), strict=True)]
