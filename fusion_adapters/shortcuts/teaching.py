"""How far what the head says of a cast state is from what it says of the true one: the divergence that maps are trained by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone.quantization import is_readable
from .readout import Readout

LIKELY = 16  # of the model's own first tokens at each position, which no step leaves out


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """`KL(p || q)` in nats, `(n,)`: `teacher` is `log p`, `q` the softmax of `student`, both `(n, V)`; the loss of tuned-lens."""
    return F.kl_div(student.float().log_softmax(-1), teacher, reduction="none", log_target=True).sum(-1)


@dataclass
class Words:
    """A part of the vocabulary that stands for all of it.

    Attributes:
        head: `(m, d)`, their rows of the head's matrix.
        offsets: float32 `(m,)`, the head's bias, and the log of how many tokens each stands for.
    """

    head: Tensor
    offsets: Tensor


class Teacher:
    """Compares states by what a model's head says of them, over its whole vocabulary or over a part that is drawn anew each step.

    Of the tokens of a step, those that the model finds likely at one of its positions are all there; of the others `drawn` are, and each
    stands for as many as were left out: its logit is raised by the log of that number. The divergence is then that of the two
    distributions which these logits make: 0 where the logits are equal, and the whole one when all are drawn.

    Args:
        readout: The head.
        dtype: That of the states which it reads.
        drawn: How many; None for the whole vocabulary.
    """

    def __init__(self, readout: Readout, dtype: torch.dtype, drawn: int | None) -> None:
        self.readout, self.dtype, self.drawn = readout, dtype, drawn or 0
        plain = drawn is not None and _is_plain(readout)
        # a part that is no smaller than the rest saves nothing
        self.linear = readout.linear if plain and readout.linear.out_features > 2 * self.drawn else None

    @torch.no_grad()
    def likely(self, states: Tensor) -> Tensor:
        """The tokens that the model finds likely, int64 `(n, 16)`, from the states of the last layer `(n, d)`."""
        return self.logits(states).topk(LIKELY, dim=-1).indices

    @torch.no_grad()
    def draw(self, likely: Tensor, generator: torch.Generator) -> Words:
        """The tokens of a step.

        Args:
            likely: See there, of the step's positions.
            generator: On the CPU.
        """
        assert self.linear is not None
        weight, bias = self.linear.weight, self.linear.bias
        others = torch.ones(len(weight), dtype=torch.bool)
        others[likely.flatten().cpu()] = False
        kept, rest = (~others).nonzero()[:, 0], others.nonzero()[:, 0]
        drawn = rest[torch.randperm(len(rest), generator=generator)[: self.drawn]]
        ids = torch.cat([kept, drawn]).to(weight.device)
        offsets = torch.zeros(len(ids), device=weight.device) if bias is None else bias[ids].float()
        if len(drawn):
            offsets[len(kept) :] += math.log(len(rest) / len(drawn))
        return Words(weight[ids], offsets)

    def says(self, states: Tensor, words: Words | None = None) -> Tensor:
        """The log-probabilities of `logits`, float32."""
        return self.logits(states, words).float().log_softmax(-1)

    def logits(self, states: Tensor, words: Words | None = None) -> Tensor:
        """`(n, m)` of states of the last layer `(n, d)`, over some tokens or, without these, over all."""
        states = states.to(self.dtype)
        if words is None:
            return self.readout(states)
        return F.linear(self.readout.normed(states), words.head).float() + words.offsets


def _is_plain(readout: Readout) -> bool:
    """Whether rows of the head's matrix can be taken alone."""
    try:
        linear = readout.linear
    except ValueError:
        return False
    return type(linear) is nn.Linear and is_readable(linear.weight, linear)
