"""When a token may leave early: the margin of its probabilities against a threshold that falls along the text (arXiv 2303.09435)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..readout import Readout

SCALE, DECAYING, TAU = 0.9, 0.1, 4.0  # of the threshold, the paper's constants
NEVER = 1.112  # the paper's greatest lambda: 0.9 * 1.112 is above 1, where no margin is
EVERYWHERE = 3.0  # the place `t` that the paper takes for masked models, whatever the position


def threshold(lam: float, places: Tensor, mean_length: float) -> Tensor:
    """`0.9 lambda + 0.1 exp(-4 t / N)`, float32, in the shape of `places`.

    Args:
        lam: `lambda`: above 1.11 no margin passes, below -0.11 each does.
        places: `t`, the 0-based places of tokens in their texts.
        mean_length: `N`, the mean of `t + 1` over the positions of the validation set.
    """
    return SCALE * lam + DECAYING * torch.exp(-TAU * places.float() / mean_length)


def passing_lambda(margins: Tensor, places: Tensor, mean_length: float) -> Tensor:
    """The least upper bound of the lambdas whose threshold a margin `(n, ...)` passes: it passes those below this, and no other."""
    decayed = DECAYING * torch.exp(-TAU * places.double() / mean_length)  # (n,)
    return (margins.double() - decayed.reshape(-1, *[1] * (margins.dim() - 1))) / SCALE


def margin(logits: Tensor) -> Tensor:
    """The two greatest probabilities' difference, float32: `(..., V)` to `(...)`."""
    wide = logits.float()
    two = wide.topk(2, dim=-1).values  # (..., 2)
    two = (two - wide.logsumexp(dim=-1, keepdim=True)).exp()
    return two[..., 0] - two[..., 1]


class TokenCheck:
    """Whether the tokens of a batch are sure at an exit.

    With a short list the head is first applied over a few frequent tokens, a fraction of its cost, and over the whole vocabulary only
    where these pass. The list decides nothing alone: a margin over the whole vocabulary has the last word, so a list leaves early only
    where the whole head would, and may miss some.

    Args:
        readout: Of the model.
        short_list: The ids of frequent tokens; None for no such list.

    Raises:
        ValueError: If an id is outside of the vocabulary, or the head is not linear and a list is given.
    """

    def __init__(self, readout: Readout, short_list: Iterable[int] | None) -> None:
        self.readout = readout
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if short_list is None:
            return
        ids, head = sorted({int(i) for i in short_list}), readout.linear
        if len(ids) < 2 or not 0 <= ids[0] <= ids[-1] < head.out_features:
            raise ValueError(
                f"short_list holds {len(ids)} tokens{f', from {ids[0]} to {ids[-1]}' if ids else ''}: it needs at least two, of the "
                f"vocabulary's {head.out_features} (0 to {head.out_features - 1}). Make it by frequent_tokens(rows, 4000)."
            )
        if type(head) is not nn.Linear:
            raise ValueError(
                f"The head is a {type(head).__name__}, of whose packed weights no part can be taken. Leave the short list unset."
            )
        self.weight = head.weight.detach()[ids].contiguous()  # (v, d)
        self.bias = None if head.bias is None else head.bias.detach()[ids].contiguous()  # (v,)

    def __call__(self, cast: Tensor, least: Tensor, counts: Tensor | None) -> Tensor | None:
        """The logits `(B, V)` if all tokens that count are sure, else None.

        Args:
            cast: `(B, d)`, in the place of the last layer's states.
            least: What margins must exceed, `(B,)` or `()`.
            counts: bool `(B,)`, which tokens must be sure; None for all.
        """
        if self.weight is not None:
            # the norm is applied twice where the list passes, which costs less than keeping it apart
            short = nn.functional.linear(self.readout.normed(cast), self.weight, self.bias)  # (B, v)
            if not _all_above(short, least, counts):
                return None
        logits = self.readout(cast)
        return logits if _all_above(logits, least, counts) else None


def _all_above(logits: Tensor, least: Tensor, counts: Tensor | None) -> bool:
    above = margin(logits) > least.to(logits.device)
    return bool(above.all() if counts is None else (above | ~counts.to(above.device)).all())
