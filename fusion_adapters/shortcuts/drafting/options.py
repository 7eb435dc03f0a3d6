"""What a drafter is made of, and how it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...backbone.blocks import Backbone
from .drafter import DrafterShape

PART_OF_HEAD = 64  # channels of a head


@dataclass(frozen=True)
class DrafterOptions:
    """What is drafted from, and how the drafter is trained.

    Attributes:
        layers: Layers that the drafter reads; None for a low, a middle and the last one (6, 18 and 30 of 30).
        tokens: How many of the most frequent tokens of the text it can say; None for the whole vocabulary.
        inner: Width of its feed-forward part; None for twice the hidden size.
        steps: Drafted tokens a position is trained on: 1, or more, in which the drafter reads its own states as when it drafts.
        epochs: Passes over the text; 0 for the closed-form first weights alone, which take seconds.
        batch_size: Rows of a step.
        learning_rate: Of AdamW, after a warm-up, falling to a tenth along a cosine.
        weight_decay: Of AdamW.
        temperature: Of the backbone's distribution that is learned; below 1 the greedy token counts for more.
        seed: Of the order of rows and the first weights.

    Raises:
        ValueError: If an option cannot be.
    """

    layers: Sequence[int] | None = None
    tokens: int | None = 8192
    inner: int | None = None
    steps: int = 1
    epochs: float = 4
    batch_size: int = 8
    learning_rate: float = 3e-4
    weight_decay: float = 0.05
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 1.")
        if not self.epochs >= 0:
            raise ValueError(f"epochs={self.epochs}: it must be 0 (the closed-form weights alone) or more.")
        for name in ("learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: it must be above 0.")

    def layers_of(self, num_layers: int) -> tuple[int, ...]:
        """The layers to read, ascending.

        Raises:
            ValueError: If one is out of range.
        """
        found = (num_layers // 5, 3 * num_layers // 5, num_layers) if self.layers is None else tuple(self.layers)
        wrong = [layer for layer in found if not 0 <= layer <= num_layers]
        if wrong or not found:
            raise ValueError(
                f"layers={list(found)}: {wrong or 'none'} can be read. A backbone of {num_layers} blocks has the layers 0 (embeddings) to "
                f"{num_layers} (last block)."
            )
        return tuple(sorted(set(found)))

    def shape_of(self, backbone: Backbone, tokens: int | None) -> DrafterShape:
        """The shape of the drafter for a backbone."""
        size = backbone.hidden_size
        heads = max(1, size // PART_OF_HEAD)
        while size % (2 * heads):
            heads -= 1
        return DrafterShape(size, self.layers_of(backbone.num_layers), heads, self.inner or 2 * size, tokens)
