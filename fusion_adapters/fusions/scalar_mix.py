"""ScalarMix: one softmax weight a layer, the same at every token (ELMo; AllenNLP's form)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contract import Context, Fusion
from .numerics import check_init


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
    absorbs = True

    def __init__(self, hidden_size: int, layers: Sequence[int], *, init: str = "identity") -> None:
        super().__init__(hidden_size, layers)
        self.residual = check_init(init) == "identity"
        self.logits = nn.Parameter(torch.zeros(len(self.layers)))
        self.gamma = nn.Parameter(torch.tensor([0.0 if self.residual else 1.0]))

    def forward(
        self, states: Sequence[Tensor], last: Tensor, context: Context | None = None, return_weights: bool = False
    ) -> Any:
        kept = None
        for index, state in enumerate(states):
            kept = self.absorb(kept, index, state)
        fused = self.finish(kept, last)
        if return_weights:
            return fused, F.softmax(self.scaled(self.logits), dim=0).expand(*last.shape[:-1], -1)  # (B, T, N)
        return fused

    def absorb(self, kept: Any, index: int, state: Tensor) -> Any:
        part = (self.scaled(self.gamma) * F.softmax(self.scaled(self.logits), dim=0))[index] * self.seen(state).float()
        return part if kept is None else kept + part

    def finish(self, kept: Any, last: Tensor) -> Tensor:
        return self.added(last, kept) if self.residual else kept.to(last.dtype)
