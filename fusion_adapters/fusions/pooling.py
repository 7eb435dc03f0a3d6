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
