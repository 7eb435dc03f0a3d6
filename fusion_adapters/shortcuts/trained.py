"""One shortcut in training: what is added to it, in units that suit one rate for all of its values."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from .held import HeldStates
from .maps import MAT, Shortcut

KL = "kl"
AT_ONCE = 1024  # positions that are cast at a time


def tuned_kind(kind: str) -> str:
    """What a kind of shortcut is called once it was trained: `mat` becomes `kl`, `fused` becomes `kl fused`."""
    return KL if kind == MAT else f"{KL} {kind}"


class TrainedMap:
    """A shortcut and what training adds to it, in units in which the values of each channel have a variance of 1.

    `A = A_0 + diag(s_y) C diag(1 / s_x)`, `b = b_0 + s_y c - (A - A_0) m_x`; of low rank, the two factors change likewise, with the
    values between them in the place of `y` and of `x`. States' channels differ by orders of size, and one rate is then right for all.

    Args:
        start: The shortcut.
        held: States.
        numbers: The positions that are trained on.
    """

    def __init__(self, start: Shortcut, held: HeldStates, numbers: Tensor) -> None:
        self.start = start
        device = next(start.parameters()).device
        x = torch.cat([_moments(held.states[layer][numbers], start.bias is not None) for layer in start.sources], dim=1)
        y = _moments(held.states[max(held.states)][numbers], start.bias is not None)
        self.mean, self.inner, self.outer = x[0].to(device), x[1].to(device), y[1].to(device)  # (k d,), (k d,), (d,)
        if start.rank is None:
            self.between = torch.ones(0)
            changes = [torch.zeros_like(start.weight)]
        else:
            spread = [
                F.linear(
                    torch.cat([held.states[i][some] for i in start.sources], dim=1).to(device, torch.float32), start.down
                )
                for some in numbers.split(AT_ONCE)
            ]
            self.between = _moments(torch.cat(spread), start.bias is not None)[1]  # (r,)
            changes = [torch.zeros_like(start.up), torch.zeros_like(start.down)]
        if start.bias is not None:
            changes.append(torch.zeros_like(start.bias))
        self.parameters = [change.requires_grad_() for change in changes]

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The matrix `(d, k d)`, or its factors `(d, r)` and `(r, k d)`; then the constant `(d,)`."""
        start, change = self.start, self.parameters
        if start.rank is None:
            step = self.outer[:, None] * change[0] / self.inner
            first, second, moved = start.weight + step, None, step @ self.mean
        else:
            first = start.up + self.outer[:, None] * change[0] / self.between
            second = start.down + self.between[:, None] * change[1] / self.inner
            moved = first @ (second @ self.mean) - start.up @ (start.down @ self.mean)
        return first, second, None if start.bias is None else start.bias + self.outer * change[-1] - moved

    def __call__(self, states: dict[int, Tensor]) -> Tensor:
        """Casts states, float32."""
        first, second, bias = self.weights()
        x = torch.cat([states[layer] for layer in self.start.sources], dim=-1)  # (n, k d)
        return F.linear(x if second is None else F.linear(x, second), first, bias)

    def state(self) -> list[Tensor]:
        """What was trained so far."""
        return [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def load(self, state: list[Tensor]) -> None:
        """Goes back to a `state`."""
        for parameter, value in zip(self.parameters, state, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def result(self) -> Shortcut:
        """The trained shortcut."""
        result = copy.deepcopy(self.start)
        result.kind = tuned_kind(self.start.kind)
        first, second, bias = self.weights()
        if second is None:
            result.weight.data = first
        else:
            result.up.data, result.down.data = first, second
        if bias is not None:
            result.bias.data = bias  # type: ignore[union-attr]
        return result


def _moments(states: Tensor, centred: bool) -> Tensor:
    """The mean and the root mean square about it of each channel, `(2, d)`, float32; about 0 where nothing is to be centred."""
    wide = states.double()
    mean = wide.mean(0) if centred else torch.zeros(wide.shape[1], dtype=torch.float64, device=wide.device)
    spread = (wide - mean).square().mean(0).sqrt()
    return torch.stack([mean, spread.clamp_min(float(spread.max()) * 1e-6 + 1e-30)]).float()
