"""Shortcut fusion: each layer state cast to the last layer by a fixed linear map, and one softmax weight a layer over the casts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contract import Context, Fusion
from .numerics import check_init, linear


class ShortcutFusion(Fusion):
    """`h = z_L + g * sum_n softmax(w)_n (A_n z_n + b_n - z_L)`, `g = 0` at the start, hence the identity; `g` has a value a dimension.

    The maps `A_n z_n + b_n` are linear shortcuts (arXiv 2303.09435) that were fitted before, and stay as they are: buffers, saved with
    the adapter. That of `z_L` is the identity. With `init="paper"` the mix of the casts, ELMo's form: `g` starts at 1, and
    `h = sum_n softmax(w)_n (A_n z_n + b_n)`. Both start at uniform weights. Trained parameters: `N + d`.

    Args:
        hidden_size: Hidden size `d`.
        layers: The states to mix.
        num_layers: The number of blocks `L`.
        map_rank: Rank of the maps: `d` for whole matrices, less for two factors, 0 for none (each cast is the state itself). Filled in
            from the folder of shortcuts.
        init: `"identity"` or `"paper"`, as above.

    Raises:
        ValueError: If the rank is not from 0 to `d`.
    """

    has_weights = True
    absorbs = True
    map_weight: Tensor | None
    map_down: Tensor | None
    map_up: Tensor | None
    map_bias: Tensor | None

    def __init__(
        self, hidden_size: int, layers: Sequence[int], *, num_layers: int, map_rank: int = 0, init: str = "identity"
    ) -> None:
        super().__init__(hidden_size, layers)
        if not 0 <= map_rank <= hidden_size:
            raise ValueError(
                f"fusion_map_rank={map_rank}: a map of {hidden_size} dimensions has a rank from 1 to {hidden_size}, and 0 stands for "
                "no maps. Leave it unset; it is filled in from the shortcuts."
            )
        self.map_rank = map_rank
        self.mapped = tuple(layer for layer in self.layers if layer < num_layers) if map_rank else ()
        self.logits = nn.Parameter(torch.zeros(len(self.layers)))
        self.gain = nn.Parameter(torch.full((hidden_size,), 0.0 if check_init(init) == "identity" else 1.0))
        count, whole = len(self.mapped), map_rank == hidden_size
        shapes = {
            "map_weight": (count, hidden_size, hidden_size) if count and whole else None,
            "map_down": (count, map_rank, hidden_size) if count and not whole else None,
            "map_up": (count, hidden_size, map_rank) if count and not whole else None,
            "map_bias": (count, hidden_size) if count else None,
        }
        for name, shape in shapes.items():
            self.register_buffer(name, None if shape is None else torch.zeros(shape))

    def fill(self, maps: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Puts the values of the maps in.

        Args:
            maps: For each layer of `mapped` the tensors `weight` `(d, d)`, or `up` `(d, r)` and `down` `(r, d)`, and `bias` `(d,)` if
                there is one.
        """
        for name in ("weight", "down", "up", "bias"):
            buffer = getattr(self, f"map_{name}")
            for index, layer in enumerate(self.mapped if buffer is not None else ()):
                if name in maps[layer] or name != "bias":
                    buffer[index].copy_(maps[layer][name])

    def cast(self, index: int, state: Tensor) -> Tensor:
        """What stands for `z_L`, from the state of `layers[index]`; both `(B, T, d)`."""
        if index >= len(self.mapped) or self.map_bias is None:  # z_L itself, or no maps
            return state
        bias = self.map_bias[index]
        if self.map_weight is not None:
            return linear(state, self.map_weight[index], bias)
        assert self.map_down is not None and self.map_up is not None
        return linear(linear(state, self.map_down[index]), self.map_up[index], bias)

    def forward(
        self, states: Sequence[Tensor], last: Tensor, context: Context | None = None, return_weights: bool = False
    ) -> Any:
        kept = None
        for index, state in enumerate(states):
            kept = self.absorb(kept, index, state)
        fused = self.finish(kept, last)
        return (fused, self.weights().expand(*last.shape[:-1], -1)) if return_weights else fused  # (B, T, N)

    def weights(self) -> Tensor:
        """The weights over depth, `(N,)`."""
        return F.softmax(self.scaled(self.logits), dim=0)

    def absorb(self, kept: Any, index: int, state: Tensor) -> Any:
        part = self.weights()[index] * self.seen(self.cast(index, state)).float()
        return part if kept is None else kept + part

    def finish(self, kept: Any, last: Tensor) -> Tensor:
        return self.added(last, self.scaled(self.gain) * (kept - self.seen(last).float()))
