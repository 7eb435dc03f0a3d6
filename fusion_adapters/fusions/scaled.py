"""Parameters that count `alpha` times what is stored: what `alpha / r` is for LoRA."""

from __future__ import annotations

from torch import Tensor, nn


class Scaled(nn.Module):
    """A module that computes with `alpha` times its stored parameters.

    A step of Adam is as long as the learning rate says, whatever the gradient's size. One at rate `x` therefore moves what the
    module computes with as one at `alpha x` moves a module whose parameters are stored as they are. Weight decay stays that of
    `x`. With plain SGD, whose steps grow with the gradient, it is `alpha^2`.

    A subclass passes through `scaled` each of its own parameters, or what is linear in all of those that it takes (a linear map with
    its bias, a norm with its gain and bias).

    Attributes:
        alpha: How many times a stored parameter counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alpha = 1.0

    def scaled(self, value: Tensor) -> Tensor:
        """`alpha` times a parameter, or what is linear in the parameters it comes from."""
        return value if self.alpha == 1 else self.alpha * value

    def scale_by(self, alpha: float) -> None:
        """Sets `alpha` here and in the parts below, and divides their parameters by it: answers stay, learning is faster.

        For powers of two they stay to the last bit. Parts that are no `Scaled` are left alone, and learn at the rate as it is.
        """
        for part in self.modules():
            if isinstance(part, Scaled):
                for parameter in part.parameters(recurse=False):
                    parameter.data.mul_(part.alpha / alpha)
                part.alpha = alpha
