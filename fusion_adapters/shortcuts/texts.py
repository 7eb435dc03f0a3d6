"""What a classifier of texts says of states that stand for those of its last block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.blocks import Backbone
from ..backbone.fed import fed, watched
from ..backbone.walk import evaluating
from .saving import backbone_of
from .stream import Chunk

PROBE = 4  # positions


class TextReadout:
    """All that comes after the blocks of a classifier (final norm, pooler, head): states of a text's positions to scores of classes.

    The model itself is called, with the states in the place of its blocks, so whatever it reads of a text (the first position, the last
    one, a mean) is read of the cast states.

    Args:
        model: A model with a head for classes of texts.

    Raises:
        ValueError: If it has none.
    """

    def __init__(self, model: nn.Module) -> None:
        base: Any = getattr(model, "get_base_model", None)
        self.model: nn.Module = model if base is None else base()
        self.backbone: Backbone = backbone_of(model)
        with evaluating(self.model), torch.no_grad(), watched(self.backbone) as seen:
            ids = torch.arange(PROBE, device=self.backbone.device).unsqueeze(0)
            logits = getattr(self.model(input_ids=ids), "logits", None)
        self._forms: list[Any] = list(seen.forms)
        if logits is None or logits.dim() != 2:
            raise ValueError(
                f"{type(self.model).__name__} gives no scores of classes for a text. Load it as a classifier "
                "(AutoModelForSequenceClassification); for a model with a head over the vocabulary use Readout."
            )

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor], state: Tensor) -> Tensor:
        """Scores of the classes.

        Args:
            inputs: What the model is called with for these texts: ids `(B, T)`, mask.
            state: `(B, T, d)`, in the place of the last block's.

        Returns:
            Logits `(B, K)`.
        """
        called = {name: value for name, value in inputs.items() if name != "use_cache"}
        with evaluating(self.model), fed(self.backbone, self._forms, {self.backbone.num_layers: state}):
            return self.model(**called).logits

    def of_positions(self, chunk: Chunk, states: Tensor) -> Tensor:
        """Scores `(B, K)` for the texts of a batch.

        Args:
            chunk: The batch, with all positions of its texts chosen.
            states: `(n, d)` of these, one after the other.
        """
        lines = torch.unique_consecutive(chunk.rows, return_inverse=True)[1]  # (n,)
        whole = states.new_zeros((*chunk.inputs["input_ids"].shape, states.shape[-1]))  # (B, T, d)
        whole[lines.to(states.device), chunk.places.to(states.device)] = states
        return self(chunk.inputs, whole)
