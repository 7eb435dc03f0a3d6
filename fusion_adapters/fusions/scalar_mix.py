"""ScalarMix: one softmax weight a layer, the same at every token (ELMo; AllenNLP's form)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Context, Fusion, check_init


class ScalarMix(Fusion):
    """`h = z_L + gamma sum_n softmax(w)_n z_n`, `gamma = 0` at the start, hence the identity.

    With `init="paper"` ELMo's form: `h = gamma sum_n softmax(w)_n z_n`, `gamma = 1`. Both start at uniform weights.
    Parameters: `N + 1`.

    Args:
        hidden_size: Hidden size `d`.
        layers: The states to mix.
        init: `"identity"` or `"paper"`, as above.
    """

    has_weights = True

    def __init__(self, hidden_size: int, layers: Sequence[int], *, init: str = "identity") -> None:
        super().__init__(hidden_size, layers)
        self.residual = check_init(init) == "identity"
        self.logits = nn.Parameter(torch.zeros(len(self.layers)))
        self.gamma = nn.Parameter(torch.tensor([0.0 if self.residual else 1.0]))

    def forward(
        self, states: Sequence[Tensor], last: Tensor, context: Context | None = None, return_weights: bool = False
    ) -> Any:
        weights = F.softmax(self.logits, dim=0)  # (N,)
        fused = last.float() if self.residual else torch.zeros_like(last, dtype=torch.float32)
        for share, state in zip((self.gamma * weights).unbind(0), states, strict=True):
            fused = fused + share * state
        fused = fused.to(last.dtype)
        if return_weights:
            return fused, weights.expand(*last.shape[:-1], -1)  # (B, T, N)
        return fused
