"""Drafts of the next tokens while a model writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from .drafter import DraftCache, Drafter

SHARPENING = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)  # so that q is near p; they keep nothing in mind


@dataclass
class Drafts:
    """Tokens that may follow.

    Attributes:
        tokens: int64 `(B, k)`.
        chances: In sampling, for each of the `k` the distribution that it was drawn from, `(B, V)`.
    """

    tokens: Tensor
    chances: list[Tensor]


class Proposer:
    """Drafts for the texts of one call of `generate`.

    Args:
        drafter: The drafter.
        enough: See `DraftingOptions`.
        mask: bool `(B, T)` of the prompts, False where they are padded; None where none is.
        processors: Of the call; those that sharpen a distribution act on that of the drafter, too.
        sample: Whether tokens are drawn.
    """

    def __init__(
        self, drafter: Drafter, enough: float, mask: Tensor | None, processors: LogitsProcessorList, sample: bool
    ) -> None:
        self.drafter, self.enough, self.sample = drafter, enough, sample
        self.cache = DraftCache(mask)
        self.sharpening = LogitsProcessorList([p for p in processors if isinstance(p, SHARPENING)])
        self.size = int(drafter.readout.head.weight.shape[0]) if sample else 0  # type: ignore[arg-type,index]

    def draft(self, states: Mapping[int, Tensor], ids: Tensor, most: int, unfinished: Tensor) -> Drafts:
        """Reads what was checked since the last time, and drafts.

        Args:
            states: Layer states `(B, T, d)` of the positions that were checked.
            ids: The texts, whose last `T` tokens follow these positions.
            most: How many tokens at most.
            unfinished: int64 `(B,)`, 0 for texts that have ended and do not count.
        """
        drafter = self.drafter
        count = states[drafter.layers[0]].shape[1]
        own = drafter.begin([states[i] for i in drafter.layers], ids[:, -count:], self.cache)[:, -1:]  # (B, 1, d)
        checked = self.cache.length
        tokens: list[Tensor] = []
        chances: list[Tensor] = []
        right = torch.ones(len(ids), device=ids.device)
        while len(tokens) < most:
            logits = drafter.logits(own)[:, 0].float()  # (B, V')
            if self.sample:
                q = self._chances(logits, ids)
                sure, token = q.amax(-1), None  # of the distribution alone: what is drawn may not decide whether it counts
            else:
                best, number = logits.max(-1)
                sure, token = (best - logits.logsumexp(-1)).exp(), drafter.named(number)
            right = right * sure.where(unfinished.bool(), torch.ones_like(sure))
            if float(right.prod()) < self.enough:
                break
            if token is None:
                token = torch.multinomial(q, num_samples=1)[:, 0]
                chances.append(q)
            tokens.append(token)
            if len(tokens) < most:
                own = drafter.go_on(own, token[:, None], self.cache)
        self.cache.crop(checked)
        return Drafts(torch.stack(tokens, dim=1) if tokens else ids[:, :0], chances)

    def _chances(self, logits: Tensor, ids: Tensor) -> Tensor:
        """The distribution of a draft, `(B, V)`."""
        if self.drafter.tokens is not None:
            whole = logits.new_full((len(logits), self.size), -torch.inf)
            logits = whole.index_copy_(1, self.drafter.tokens, logits)
        sharpened: Any = self.sharpening
        return sharpened(ids, logits).softmax(-1)
