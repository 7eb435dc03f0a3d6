"""Means over the positions of a text, which stand in the place of its layer states (`fusion_pool="mean"`)."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Context


class Means:
    """Replaces each state of a text by a mean over its positions, so that a head that picks one position picks the mean.

    Let `R` be the real positions of a text, those with a mask of 1. In a decoder the state at position `t` becomes

        `m_t = 1 / |C_t| sum_{s in C_t} z_s`,  `C_t = {s in R : s <= t, s != min R}`,  and  `m_t = z_t` where `C_t` is empty,

    a running mean, in which no later token takes part: at the last real position it is that of the whole text. The first real
    position is left out as soon as there is a second. It is where decoders put their massive activations (arXiv 2402.17762),
    whether a BOS or a word stands there: in SmolLM2-135M, whose texts begin with no BOS, its state is about a hundred times as
    long as the others in blocks 12 to 20. And it has seen nothing but itself, which the states after it have read. The rule needs
    no list of special tokens, so it is the same live and from cached states.

    In a bidirectional backbone `m_t` is the mean over all of `R`, CLS and SEP included, the same at every position.

    Sums and counts are float32, whatever the dtype of the states and under autocast.

    Args:
        context: That of the call, with its mask `(B, T)`; without one every position is real.
        like: A layer state `(B, T, d)`.

    Raises:
        ValueError: If positions of the call lie in a KV cache, or the mask is not `(B, T)`.
    """

    def __init__(self, context: Context, like: Tensor) -> None:
        if context.cached_positions:
            raise ValueError(
                f"fusion_pool='mean' takes means over the positions of a text, but {context.cached_positions} positions of this call lie "
                "in the backbone's KV cache, where their layer states are no more. Give whole texts, without past_key_values."
            )
        mask, size = context.attention_mask, tuple(like.shape[:2])
        if mask is None:
            real = torch.ones(size, dtype=torch.bool, device=like.device)
        elif isinstance(mask, Tensor) and tuple(mask.shape) == size:
            real = mask.to(like.device) != 0
        else:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"fusion_pool='mean' needs an attention_mask that says for each position whether it is real, {list(size)}, and that of "
                f"this call is {shape}. Give the mask that the tokenizer makes, or leave fusion_pool unset."
            )
        # (B,), where a mean of the whole text stands
        self.ends = (real * torch.arange(size[1], device=like.device)).argmax(1)
        self.causal = context.causal
        if self.causal:
            real = real & (real.cumsum(1) > 1)
        self.counted = real.unsqueeze(-1)  # (B, T, 1)
        count = real.cumsum(1) if self.causal else real.sum(1, keepdim=True).expand(size)
        self.some = count.unsqueeze(-1) > 0  # (B, T, 1)
        self.share = 1 / count.clamp_min(1).float().unsqueeze(-1)  # (B, T, 1)

    def __call__(self, state: Tensor) -> Tensor:
        """The means in the place of a layer state: `(B, T, d)` in its dtype."""
        # where, not a product: padding may hold anything, NaN too
        values = torch.where(self.counted, state.float(), 0.0)
        sums = values.cumsum(1) if self.causal else values.sum(1, keepdim=True)
        return torch.where(self.some, sums * self.share, state.float()).to(state.dtype)

    def of_texts(self, state: Tensor) -> Tensor:
        """The mean of each whole text, `(B, d)`: what stands at its last real position."""
        return self(state)[torch.arange(len(state), device=state.device), self.ends]


class RunningMeans:
    """The means of `Means` in a decoder, over texts that come in pieces: a prompt, then the tokens that are written after it.

    Of what came before it keeps one float32 sum for each layer and text, and how many positions are in it.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}  # by layer, (B, 1, d)
        self._read: Tensor | int = 0  # real positions of the pieces before, (B, 1)
        self._piece: tuple[Tensor, Tensor, Tensor] | None = (
            None  # what is counted, where there is a mean, one over the count
        )

    def begin(self, real: Tensor) -> None:
        """The next piece; `real` is bool, `(B, n)`: which of its positions are no padding."""
        place = self._read + real.cumsum(1)  # (B, n), the number of each real position among those of its text
        counted = real & (place > 1)
        count = (place - 1).clamp_min(0)
        self._read = place[:, -1:]
        share = 1 / count.clamp_min(1).float()
        self._piece = counted.unsqueeze(-1), (count > 0).unsqueeze(-1), share.unsqueeze(-1)  # (B, n, 1) each

    def __call__(self, layer: int, state: Tensor) -> Tensor:
        """The means in the place of the piece of a layer state, `(B, n, d)` in its dtype."""
        assert self._piece is not None
        counted, some, share = (t.to(state.device) for t in self._piece)
        wide = state.float()
        sums = torch.where(counted, wide, 0.0).cumsum(1)
        if layer in self._sums:
            sums = sums + self._sums[layer]
        self._sums[layer] = sums[:, -1:].clone()  # not a view, which would keep the whole piece
        return torch.where(some, sums * share, wide).to(state.dtype)
