"""The baseline that a fusion is compared with: more blocks on top of the last layer (arXiv 2209.15168)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contract import Context, Fusion
from .numerics import check_heads, check_init, layer_norm, linear, linear_bias, linear_weight
from .scaled import Scaled
from .widths import Budget, BudgetTooSmallError


class EncoderBlock(Scaled):
    """A pre-norm transformer block: self-attention and a gelu MLP, each added to its input.

    Parameters: `12 d^2 + 13 d` at the usual feed-forward width of `4 d`.
    """

    def __init__(self, hidden_size: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_weight = nn.Parameter(torch.ones(2, hidden_size))
        self.norm_bias = nn.Parameter(torch.zeros(2, hidden_size))
        self.qkv_weight = linear_weight(3 * hidden_size, hidden_size)
        self.qkv_bias = linear_bias(3 * hidden_size, fan_in=hidden_size)
        self.out_weight = linear_weight(hidden_size, hidden_size)
        self.out_bias = linear_bias(hidden_size, fan_in=hidden_size)
        self.up_weight = linear_weight(feedforward, hidden_size)
        self.up_bias = linear_bias(feedforward, fan_in=hidden_size)
        self.down_weight = linear_weight(hidden_size, feedforward)
        self.down_bias = linear_bias(hidden_size, fan_in=feedforward)

    def zero_output(self) -> None:
        """Makes the block the identity until it is trained."""
        for parameter in (self.out_weight, self.out_bias, self.down_weight, self.down_bias):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        first, second = zip(self.norm_weight.unbind(0), self.norm_bias.unbind(0), strict=True)
        qkv = self._linear(self.scaled(layer_norm(x, *first)), self.qkv_weight, self.qkv_bias)  # (B, T, 3 d)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, d / H)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None)
        x = x + self._linear(attended.transpose(1, 2).flatten(-2), self.out_weight, self.out_bias)  # (B, T, d)
        normed = self.scaled(layer_norm(x, *second))
        hidden = F.gelu(self._linear(normed, self.up_weight, self.up_bias))  # (B, T, feedforward)
        return x + self._linear(hidden, self.down_weight, self.down_bias)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.scaled(linear(x, weight, bias))


class GatedCopy(Scaled):
    """A trainable float32 copy of the backbone's last block, `h = z + g (block(z) - z)`; without a gate, `block(z)`.

    The gate starts at zero, which makes the copy the identity. `alpha` is the gate's; the block has trained weights to start from, and
    learns at the rate as it is.
    """

    def __init__(self, block: nn.Module, gated: bool) -> None:
        super().__init__()
        self.block = block
        self.gate = nn.Parameter(torch.zeros(1)) if gated else None

    def forward(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        answer = self.block(x, *args, **kwargs)
        answer = answer[0] if isinstance(answer, (tuple, list)) else answer
        return answer if self.gate is None else x + self.scaled(self.gate) * (answer - x)


class Deeper(Fusion):
    """The deeper baseline: extra blocks on `z_L`, no view of the other layers. It mixes positions.

    Bidirectional on encoders, causal on decoders; padding is left out as in the backbone. How the paper placed and
    started its extra layers is not known.

    Args:
        hidden_size: Hidden size `d`.
        layers: Ignored; the blocks read `z_L`.
        num_blocks: How many blocks to add.
        feedforward: Width of the new blocks' MLP; None means `4 d`. Not with `copy_last`.
        heads: Attention heads of the new blocks; None means heads of size 64, or one head. Not with `copy_last`.
        copy_last: Start from copies of the backbone's last block instead of random blocks.
        init: `"identity"` zeroes what each new block adds (a copy gets a gate that starts at zero); `"paper"` does not.
        last_block: The backbone's last block, needed by `copy_last`.

    Raises:
        ValueError: If an option does not fit.
    """

    paper: ClassVar[dict[str, Any]] = {"num_blocks": 1, "init": "paper"}
    widths = ("num_blocks", "feedforward")
    mixes_positions = True

    def __init__(
        self,
        hidden_size: int,
        layers: Sequence[int],
        *,
        num_blocks: int = 1,
        feedforward: int | None = None,
        heads: int | None = None,
        copy_last: bool = False,
        init: str = "identity",
        last_block: nn.Module | None = None,
    ) -> None:
        super().__init__(hidden_size, ())
        if num_blocks < 1:
            raise ValueError(f"fusion_num_blocks={num_blocks}: 'deeper' adds at least one block; fusion='last' adds none.")
        identity = check_init(init) == "identity"
        self.copied = copy_last
        if copy_last:
            if feedforward is not None or heads is not None:
                raise ValueError(
                    "fusion_copy_last=True takes the shape of the backbone's last block: leave fusion_feedforward and "
                    "fusion_heads unset, or set fusion_copy_last=False."
                )
            self.blocks = nn.ModuleList(_trainable_copy(last_block, identity) for _ in range(num_blocks))
            return
        if heads is None:
            heads = hidden_size // 64 if hidden_size % 64 == 0 else 1
        check_heads(heads, hidden_size)
        width = 4 * hidden_size if feedforward is None else feedforward
        self.blocks = nn.ModuleList(EncoderBlock(hidden_size, heads, width) for _ in range(num_blocks))
        if identity:
            for block in self.blocks:
                block.zero_output()  # type: ignore[operator]

    @classmethod
    def fit_widths(cls, budget: Budget) -> dict[str, int]:
        if budget.options.get("copy_last"):
            return _fit_copies(budget)
        return _fit_blocks(budget)

    def forward(
        self, states: Sequence[Tensor], last: Tensor, context: Context | None = None, return_weights: bool = False
    ) -> Any:
        context = context or Context()
        check_no_cache("deeper", context)
        if self.copied:
            # the copy is an ordinary module with weights in float32, unless the model was cast as a whole
            dtype = next(self.blocks.parameters()).dtype
            args, kwargs = _to_dtype(context.block_args, dtype), _to_dtype(context.block_kwargs or {}, dtype)
            x = last.to(dtype)
            for block in self.blocks:
                x = block(x, args, kwargs)
            return x.to(last.dtype)
        mask = attention_bias(context, last)
        x = start = self.seen(last)
        for block in self.blocks:
            x = block(x, mask, context.causal)
        return x if self.norm == "none" else self.added(last, x.float() - start.float())


def check_no_cache(name: str, context: Context) -> None:
    """Raises ValueError if earlier positions lie in a KV cache, where a fusion that reads them cannot see them."""
    if context.cached_positions:
        raise ValueError(
            f"fusion={name!r} attends over positions, but {context.cached_positions} positions of this call lie in "
            "the backbone's KV cache, where its own blocks cannot see them. Generate with use_cache=False, or use a "
            "fusion over depth (dwatt, concat, scalar_mix), which needs no cache."
        )


def attention_bias(context: Context, states: Tensor) -> Tensor | None:
    """The mask for scaled dot-product attention over `states` `(B, T, d)`.

    Returns:
        None where nothing needs masking (plain causal attention included); a boolean `(B, 1, T, T)` or `(B, 1, 1, T)`
        mask, true where attention is allowed; or the backbone's own 4-D additive mask.
    """
    mask, length = context.attention_mask, states.shape[1]
    own = (context.block_kwargs or {}).get("attention_mask")  # what the backbone made for its last block
    if mask is None and isinstance(own, Tensor) and own.dim() == 4:
        mask = own  # of rows that hold several texts, say, told apart by positions that begin again
        if mask.dtype == torch.bool and mask.shape[-2] == length:
            # a position sees itself, which tells whether true means allowed, as for most, or masked (MPT)
            mask = mask == mask.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    elif mask is not None and mask.shape[-1] != length:
        # sound models: the mask counts samples, the states are frames; or the backbone padded (Longformer)
        mask = own
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.is_floating_point():
            mask = mask >= 0  # an additive one
    if mask is None:
        return None
    if mask.dim() == 4:
        return mask if mask.dtype == torch.bool else mask.to(states.dtype)
    allowed = mask.bool()[:, None, None, :]  # (B, 1, 1, T)
    if context.causal:
        allowed = allowed & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        # a padded query would see nothing, and softmax over nothing is NaN: let it see itself
        allowed = allowed | torch.eye(length, dtype=torch.bool, device=mask.device)
    return allowed


def _trainable_copy(block: nn.Module | None, gated: bool) -> GatedCopy:
    if block is None:
        raise ValueError("fusion_copy_last=True needs the backbone's last block, and none was given.")
    return GatedCopy(copy.deepcopy(block).float().requires_grad_(True), gated)


def _to_dtype(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_to_dtype(v, dtype) for v in value)
    if isinstance(value, dict):
        return {k: _to_dtype(v, dtype) for k, v in value.items()}
    return value


def _fit_copies(budget: Budget) -> dict[str, int]:
    """The largest number of copies of the backbone's last block within the budget: the count is linear in it."""
    one, two = (budget.count(num_blocks=blocks) for blocks in (1, 2))
    if one > budget.parameters:
        what = f"{budget.fusion!r} with one copy of the backbone's last block"
        raise BudgetTooSmallError(what, one, budget.parameters)
    return {"num_blocks": 1 + (budget.parameters - one) // (two - one)}


def _fit_blocks(budget: Budget) -> dict[str, int]:
    """The number of blocks, each up to the usual feed-forward width, that comes nearest to the budget from below."""
    one = budget.count(num_blocks=1, feedforward=1)
    # linear in the number of blocks and in their width
    block = budget.count(num_blocks=2, feedforward=1) - one
    unit = budget.count(num_blocks=1, feedforward=2) - one
    if one > budget.parameters:
        raise BudgetTooSmallError("'deeper' of one block with a feed-forward width of 1", one, budget.parameters)
    fits = []  # parameters, fewer blocks first, width
    for blocks in range(1, 2 + (budget.parameters - one) // block):
        smallest = one + (blocks - 1) * block
        width = min(4 * budget.hidden_size, 1 + (budget.parameters - smallest) // (blocks * unit))
        fits.append((smallest + blocks * (width - 1) * unit, -blocks, width))
    _, blocks, width = max(fits)
    return {"num_blocks": -blocks, "feedforward": width}
