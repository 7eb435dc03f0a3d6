"""AttnRes as an output fusion: a static query, the layer states as keys (arXiv 2603.15031; the adaptation is ours)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contract import Context, Fusion
from .numerics import check_init

EPSILON = 1e-6


class AttnRes(Fusion):
    """`h = z_L + gamma sum_n softmax_n(w . RMSNorm(z_n)) z_n`, `gamma = 0` at the start, hence the identity.

    The mirror image of DWAtt: the query is static, the keys are content. With `init="paper"` the published form of the
    mix, `h = sum_n softmax_n(w . RMSNorm(z_n)) z_n`. The query `w` is zero at the start in both, a uniform average.
    Parameters: `2 d + 1`, in the published form `2 d`.

    Args:
        hidden_size: Hidden size `d`.
        layers: The states to attend over.
        init: `"identity"` or `"paper"`, as above.
    """

    has_weights = True

    def __init__(self, hidden_size: int, layers: Sequence[int], *, init: str = "identity") -> None:
        super().__init__(hidden_size, layers)
        self.query = nn.Parameter(torch.zeros(hidden_size))
        self.key_norm_weight = nn.Parameter(torch.ones(hidden_size))
        self.gamma = nn.Parameter(torch.zeros(1)) if check_init(init) == "identity" else None

    def forward(
        self, states: Sequence[Tensor], last: Tensor, context: Context | None = None, return_weights: bool = False
    ) -> Any:
        # the norm's gain and the query meet in one product
        probe = (self.scaled(self.query) * self.scaled(self.key_norm_weight)).float()
        scores = torch.stack([F.rms_norm(z.float(), (self.hidden_size,), eps=EPSILON) @ probe for z in states], dim=-1)
        weights = F.softmax(scores, dim=-1)  # (B, T, N)
        mixed = torch.zeros_like(last, dtype=torch.float32)
        for share, state in zip(weights.unbind(-1), states, strict=True):
            mixed = mixed + share.unsqueeze(-1) * self.seen(state)
        fused = mixed.to(last.dtype) if self.gamma is None else self.added(last, self.scaled(self.gamma) * mixed)
        return (fused, weights) if return_weights else fused
