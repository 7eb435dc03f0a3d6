"""AttnPool: weights over the tokens of each layer, then over the layers, for heads over whole texts (arXiv 2601.13288)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contract import EPSILON, Context, Fusion
from .deeper import attention_bias, check_no_cache
from .numerics import check_init, each_layer


class AttnPool(Fusion):
    """`h_t = z_L,t + gamma sum_n a_n,t p_n,t` with `p_n,t = sum_s softmax_s(w_n . rms(z_n,s)) z_n,s` and `a = softmax_n(v . rms(p_n,t))`.

    First each layer is one vector for the text so far, a mean with learned weights, then the layers are mixed by what these vectors say:
    the two stages of arXiv 2601.13288, with its gate of one score a token in each. `s` runs over the real positions up to `t` in a
    decoder, over all real ones in an encoder, so a head that reads one position gets the whole text. All weights are even at the start,
    and `gamma = 0`, hence the identity; with `init="paper"` there is no residual, `h_t = sum_n a_n,t p_n,t`. It mixes positions.
    Parameters at `N` layers: `(N + 1) d + 1`, in the published form one less.

    Args:
        hidden_size: Hidden size `d`.
        layers: The states to pool.
        init: `"identity"` or `"paper"`, as above.
    """

    has_weights = True
    mixes_positions = True

    def __init__(self, hidden_size: int, layers: Sequence[int], *, init: str = "identity") -> None:
        super().__init__(hidden_size, layers)
        self.token_query = nn.Parameter(torch.zeros(len(self.layers), hidden_size))
        self.layer_query = nn.Parameter(torch.zeros(hidden_size))
        self.gamma = nn.Parameter(torch.zeros(1)) if check_init(init) == "identity" else None

    def forward(
        self, states: Sequence[Tensor], last: Tensor, context: Context | None = None, return_weights: bool = False
    ) -> Any:
        context = context or Context()
        check_no_cache("attnpool", context)
        mask = attention_bias(context, last)
        queries = self.scaled(self.token_query).float()  # (N, d)
        pooled = [
            each_layer(self._pooled, context, self.seen(z), query, mask, context.causal)
            for z, query in zip(states, queries, strict=True)
        ]  # N of (B, T, d)
        layer_query = self.scaled(self.layer_query).float()
        weights = F.softmax(torch.stack([_unit(p) @ layer_query for p in pooled], dim=-1), dim=-1)  # (B, T, N)
        mixed = torch.zeros_like(last, dtype=torch.float32)
        for share, vector in zip(weights.unbind(-1), pooled, strict=True):
            mixed = mixed + share.unsqueeze(-1) * vector
        fused = mixed.to(last.dtype) if self.gamma is None else self.added(last, self.scaled(self.gamma) * mixed)
        return (fused, weights) if return_weights else fused

    def _pooled(self, state: Tensor, query: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """A layer's mean over the text so far, float32 `(B, T, d)`, weighed by the scores of its tokens."""
        values = state.float()
        scores = (_unit(state) @ query)[:, None, :, None]  # (B, 1, T, 1), the keys of one query that is 1 everywhere
        mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
        return F.scaled_dot_product_attention(
            torch.ones_like(scores), scores, values.unsqueeze(1), mask, is_causal=causal and mask is None, scale=1.0
        ).squeeze(1)


def _unit(x: Tensor) -> Tensor:
    """A vector over its root mean square, float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=EPSILON)
