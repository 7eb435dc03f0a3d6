"""Early exit of classifiers of whole texts: those that are sure leave the batch, and the rest goes on without them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...backbone.families import state_in
from ...backbone.fed import fed
from ...backbone.walk import evaluating
from ...states.source import base_of
from ..maps import IDENTITY, MAT, ShortcutSet
from ..saving import backbone_of
from ..stream import Collator, Rows, batches_of
from .checks import check_classifier, check_exits
from .margins import Margins, gathered
from .options import ExitOptions
from .segments import Own, Segments
from .sure import margin


@dataclass
class Classified:
    """Answers of a classifier with early exit.

    Attributes:
        logits: `(B, C)`, of the layer that each text left at.
        layers: int64 `(B,)`, that layer; `L` is the last.
        num_layers: `L`.
    """

    logits: Tensor
    layers: Tensor
    num_layers: int

    @property
    def saved(self) -> float:
        """The share of layers that the texts did not need."""
        return 1 - float(self.layers.float().mean()) / self.num_layers


class _FewerError(Exception):
    """Ends a call at a layer that some texts, or all, leave at."""

    def __init__(self, layer: int, state: Tensor, stay: Tensor) -> None:
        super().__init__()
        self.layer, self.state, self.stay = layer, state, stay


class EarlyExitClassifier:
    """Early exit of a classifier of whole texts.

    At each chosen layer the states of all positions are cast to the last layer, and the model's own norm, pooler and head answer. Texts
    whose two likeliest classes lie at least the threshold apart leave; the others go on as a smaller batch.

    The model is changed only while it is called; other threads must not call it meanwhile.

    Args:
        model: A model of `AutoModelForSequenceClassification`; it may hold LoRA or be quantised.
        shortcuts: Of its backbone.
        options: Where and when; the threshold is a margin itself, and what concerns tokens (`kv`, `short_list`, `mean_length`) is not
            used.

    Raises:
        ValueError: If the model cannot exit early (two stacks, blocks that share weights, a fusion attached, a head without classes), or
            a shortcut or layer is not there.
    """

    def __init__(self, model: nn.Module, shortcuts: ShortcutSet, options: ExitOptions) -> None:
        self.host: Any = base_of(model)
        self.backbone = backbone_of(model)
        check_exits(model, self.backbone, shortcuts, options.layers)
        check_classifier(self.host)
        self.options = options
        self.maps = {layer: shortcuts.get(layer, kind=options.kind) for layer in options.layers}
        self.segments = Segments(self.backbone)
        self._reads = {source for shortcut in self.maps.values() for source in shortcut.sources}

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Classified:
        """Classifies a batch, as `model(**inputs)` does, in evaluation mode and without a graph.

        Args:
            **inputs: What the model takes; labels are left aside.
        """
        given = self._given(inputs)
        size = next(len(value) for value in given.values() if isinstance(value, Tensor) and value.dim())
        rows = torch.arange(size)  # those that are still in the batch
        layers = torch.full((size,), self.backbone.num_layers)
        answers: list[tuple[Tensor, Tensor]] = []  # numbers of rows, and their logits
        states: dict[int, Tensor] = {}  # (B, T, d) by layer
        start, state = 0, None

        def visit(layer: int, own: Own, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if layer in self._reads:
                states[layer] = self.segments.state(args, kwargs)
            if layer not in self.maps or layer == start:
                return
            logits = self._answer(given, layer, states)  # (B, C)
            sure = margin(logits) > self.options.threshold
            if bool(sure.any()):
                sure = sure.cpu()
                answers.append((rows[sure], logits[sure.to(logits.device)]))
                layers[rows[sure]] = layer
                raise _FewerError(layer, state_in(args, kwargs), ~sure)

        with evaluating(self.host), self.segments.attached():
            while len(rows):
                try:
                    answers.append((rows, self.segments.call(self.host, given, visit, start, state).logits))
                    break
                except _FewerError as fewer:
                    start, stay = fewer.layer, fewer.stay
                    state, rows = _of_rows(fewer.state, stay), rows[stay]
                    given = {n: _of_rows(v, stay) for n, v in given.items()}
                    states = {n: _of_rows(v, stay) for n, v in states.items()}
        order = torch.cat([number for number, _ in answers]).argsort()
        logits = torch.cat([found for _, found in answers])
        return Classified(logits[order.to(logits.device)], layers, self.backbone.num_layers)

    def _answer(self, inputs: dict[str, Any], layer: int, states: dict[int, Tensor]) -> Tensor:
        """Class logits `(B, C)` after a cast from a layer."""
        cast = self.maps[layer](states)  # (B, T, d)
        with fed(self.backbone, self.segments.forms(), {self.backbone.num_layers: cast}):
            logits: Tensor = self.host(**inputs).logits
        if logits.dim() != 2:
            raise ValueError(
                f"{type(self.host).__name__} answers with logits of the shape {tuple(logits.shape)}, where classes of whole texts, (texts, "
                "classes), are wanted. Early exit of classifiers is for AutoModelForSequenceClassification."
            )
        return logits

    def _given(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the model is given: no labels, and no cache, which nobody would read."""
        known = inspect.signature(self.host.forward).parameters
        return {n: v for n, v in inputs.items() if n != "labels"} | ({"use_cache": False} if "use_cache" in known else {})

    @torch.no_grad()
    def looks(self, inputs: dict[str, Any]) -> tuple[dict[int, Tensor], Tensor]:
        """What each exit would answer for a batch, and what the whole model does: class logits `(B, C)` by layer, and `(B, C)`."""
        given, states = self._given(inputs), dict[int, Tensor]()
        found: dict[int, Tensor] = {}

        def visit(layer: int, own: Own, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if layer in self._reads:
                states[layer] = self.segments.state(args, kwargs)
            if layer in self.maps:
                found[layer] = self._answer(given, layer, states)

        with evaluating(self.host), self.segments.attached():
            return found, self.segments.call(self.host, given, visit).logits


def _of_rows(value: Any, stay: Tensor) -> Any:
    """The rows of an input that stay in the batch; what has no rows as it is."""
    if not isinstance(value, Tensor) or not value.dim() or len(value) != len(stay):
        return value
    return value[stay.to(value.device)]


def text_margins(
    model: nn.Module,
    shortcuts: ShortcutSet,
    rows: Rows,
    collator: Collator,
    kind: str = MAT,
    layers: Sequence[int] | None = None,
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> Margins:
    """Looks at each text from each layer, see `exit_margins`; for `calibrate` and what else takes margins.

    Args:
        model: A classifier of whole texts.
        shortcuts: Of its backbone.
        rows: Tokenised rows.
        collator: Pads them.
        kind: Which shortcuts to the last layer.
        layers: The layers to leave at; None for all from the first block on that such shortcuts go from.
        batch_size: Rows of one call.
        progress: Show a bar.
    """
    if layers is None:
        layers = range(1, shortcuts.num_layers) if kind == IDENTITY else [i for i in shortcuts.sources(kind=kind) if i]
    exits = EarlyExitClassifier(model, shortcuts, ExitOptions(list(layers), 2.0, kind))
    looks, answers, numbers = [], [], list[int]()
    for batch in tqdm(batches_of(rows, batch_size), unit="batch", desc="margins", disable=not progress):
        given = dict(collator([dict(rows[i]) for i in batch]))
        device = exits.backbone.device
        found, answer = exits.looks({n: v.to(device) for n, v in given.items() if isinstance(v, Tensor)})
        looks.append(found)
        answers.append(answer)
        numbers += batch
    if not numbers:
        raise ValueError("There is no text to judge by. Give rows.")
    return gathered(looks, answers, kind, exits.backbone.num_layers, numbers)
