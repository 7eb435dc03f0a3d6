"""What each layer would say at each position of a text: the logit lens, through shortcuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..states import Source, source_of
from .maps import FUSED, IDENTITY, MAT, ShortcutSet
from .readout import Readout
from .stream import Choice, stream


@dataclass
class View:
    """What layers say, of `N` layers at `T` positions.

    Attributes:
        layers: The layers, ascending; the last one is the last block, whose state is not cast: what the model itself says.
        kinds: The kind of shortcut by which each was cast; that of the last block is `identity`.
        tokens: int64 `(N, T)`, the first token.
        probabilities: float32 `(N, T)`, its probability.
    """

    layers: list[int]
    kinds: list[str]
    tokens: Tensor
    probabilities: Tensor

    @property
    def agrees(self) -> Tensor:
        """Whether a layer says what the model itself says, bool `(N, T)`."""
        return self.tokens == self.tokens[-1]


@torch.no_grad()
def look(
    model: nn.Module | Source,
    shortcuts: ShortcutSet,
    input_ids: Sequence[int],
    *,
    readout: Readout,
    kind: str | None = None,
) -> View:
    """Says of each layer, and each position of a text, the token that its cast state leads to.

    Args:
        model: The model.
        shortcuts: Its shortcuts.
        input_ids: The text.
        readout: Of the same model.
        kind: `fused`, `mat`, `identity` (the logit lens as it is known: states as they are), or another that is there; None for the
            fused one of a layer, and its `mat` where there is none.

    Raises:
        ValueError: If there is no shortcut of that kind to the last layer, or the text is empty.
    """
    if not len(input_ids):
        raise ValueError("The text has no word pieces, so there is nothing to look at. Give a text with words.")
    source = source_of(model)
    last = source.backbone.num_layers
    found = {layer: shortcuts.get(layer, kind=_kind(shortcuts, layer, kind)) for layer in _layers(shortcuts, kind, last)}
    wanted = sorted({layer for shortcut in found.values() for layer in shortcut.sources} | {last})
    row = {"input_ids": list(input_ids), "attention_mask": [1] * len(input_ids)}
    states = next(iter(stream(source, [row], wanted, _as_batch, Choice(), 1))).states  # (T, d) by layer
    tokens, probabilities = [], []
    for layer in (*found, last):
        state = states[last] if layer == last else found[layer](states)
        best = readout(state).float().softmax(-1).max(-1)  # (T,)
        tokens.append(best.indices.cpu())
        probabilities.append(best.values.cpu())
    kinds = [*(shortcut.kind for shortcut in found.values()), IDENTITY]
    return View([*found, last], kinds, torch.stack(tokens), torch.stack(probabilities))


def _layers(shortcuts: ShortcutSet, kind: str | None, last: int) -> list[int]:
    """The layers that have a shortcut of a kind to the last one; the identity is there for those that have any."""
    found = sorted({s.source for s in shortcuts if s.target == last and kind in (None, IDENTITY, s.kind)})
    if not found:
        there = ", ".join([*shortcuts.kinds(last), IDENTITY] if shortcuts.kinds(last) else []) or "none"
        raise ValueError(
            f"There is no {kind or ''!r} shortcut to layer {last}, the last, from which tokens are said. The kinds that go there are: "
            f"{there}. Choose one of them, or fit some."
        )
    return found


def _kind(shortcuts: ShortcutSet, layer: int, kind: str | None) -> str:
    if kind is not None:
        return kind
    there = [s.kind for s in shortcuts if s.source == layer and s.target == shortcuts.num_layers]
    return next((k for k in (FUSED, MAT) if k in there), there[0])


def _as_batch(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
