"""What a layer fusion is: the contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from .scaled import Scaled
from .widths import Budget, BudgetTooSmallError, largest_width

EPSILON = 1e-8  # under the root of a mean square; the smallest states are some 1e-2


@dataclass
class Context:
    """What one forward pass knows besides the layer states. Only fusions that mix positions read it.

    Attributes:
        attention_mask: `(B, T)`, non-zero at real tokens; or a 4-D mask as the backbone was given it; or None.
        causal: Whether a position may only see itself and earlier ones (decoders).
        cached_positions: Positions that the backbone keeps in its KV cache and does not show in this call.
        means: Whether the states are means over positions already, see `Fusion.pools`.
        recompute: Whether to trade time for memory in training: keep the layer states, and compute what comes of each of
            them again in the backward pass.
        block_args: Positional arguments of the last block, without its hidden states.
        block_kwargs: Keyword arguments of the last block, without its hidden states.
    """

    attention_mask: Tensor | None = None
    causal: bool = False
    cached_positions: int = 0
    means: bool = False
    recompute: bool = False
    block_args: tuple[Any, ...] = ()
    block_kwargs: dict[str, Any] | None = None


class Fusion(Scaled):
    """Maps the layer states of a position to one vector of the hidden size.

    Layer states are numbered as `z_0 .. z_L`: `z_0` is the input of the first block, `z_i` the output of block `i`,
    and `z_L` is taken before any final norm. Parameters are float32; matrix products run in the dtype of the states,
    norms and softmax in float32; the result has the dtype of `z_L`.

    A new method is a subclass in a file of its own and one line in the registry (`fusions/__init__.py`). Its keyword-only
    arguments are its options; `FusionConfig` offers each as `fusion_<option>`, with the type in the signature and the
    meaning in the docstring's `Args`.

    Attributes:
        layers: Indices of the states that `forward` wants, ascending.
        norm: `"rms"`: the fusion computes in units of each state's root mean square, in which layers of very different scale
            are alike; `"none"`: on the states as they are.
        alpha: How many times a stored parameter counts, see `Scaled`: set by `scale_by`, and minded by `forward` (`scaled`).
        stop_gradient: Whether the caller keeps this fusion's gradients from the backbone, all but that of `z_L` itself.
        pools: Whether the caller puts means over positions in the place of the states, see `Means`.
        paper: Options that give the published form.
        widths: The options, whole numbers, that say how many parameters the fusion has; a budget may choose them.
        has_weights: Whether `forward(..., return_weights=True)` can return weights over depth.
        absorbs: Whether `absorb` and `finish` can take the place of `forward` where no gradient is needed.
        mixes_positions: Whether the result at a position depends on other positions (then a KV cache is refused).
    """

    paper: ClassVar[dict[str, Any]] = {"init": "paper"}
    widths: ClassVar[tuple[str, ...]] = ()
    has_weights: ClassVar[bool] = False
    absorbs: ClassVar[bool] = False
    mixes_positions: ClassVar[bool] = False

    def __init__(self, hidden_size: int, layers: Sequence[int]) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.layers = tuple(layers)
        self.stop_gradient = False
        self.pools = False
        self.norm = "none"

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

    def seen(self, state: Tensor) -> Tensor:
        """A state `(B, T, d)` as the fusion computes with it: with `norm="rms"` divided by its root mean square at each position."""
        return F.rms_norm(state, state.shape[-1:], eps=EPSILON) if self.norm == "rms" else state

    def added(self, last: Tensor, update: Tensor) -> Tensor:
        """`z_L + u`, with `norm="rms"` `z_L + rms(z_L) u`, in the dtype of `z_L`; both `(B, T, d)`."""
        if self.norm == "rms":
            size = (last.float().square().mean(-1, keepdim=True) + EPSILON).sqrt()  # (B, T, 1)
            return last + (size * update).to(last.dtype)
        return (last + update).to(last.dtype)

    @classmethod
    def fit_widths(cls, budget: Budget) -> dict[str, int]:
        """The `widths` with which the fusion comes nearest to a budget from below.

        One width gets the largest number that fits. A method of several has a solver of its own in the place of this one.

        Raises:
            BudgetTooSmallError: If the smallest widths are too large, or there is none to choose and the fusion does not fit.
        """
        if not cls.widths:
            if budget.count() > budget.parameters:
                what = f"{budget.fusion!r}, which has no width to choose,"
                raise BudgetTooSmallError(what, budget.count(), budget.parameters)
            return {}
        (width,) = cls.widths
        return {width: largest_width(budget, width)}

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, layers={list(self.layers)}"
