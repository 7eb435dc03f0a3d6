"""The names of a classifier's outputs: kept with the adapter, set on the model that loads it, and refused where they contradict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .card import class_of
from .config import FusionConfig
from .layer import fusion_layers

MARK = "_labels_of_adapter"  # on the model: the names that an adapter's load has set there


def labels_to_save(config: FusionConfig, model: nn.Module) -> list[str] | None:
    """The names of a classifier's outputs in their order; None where nobody named them, and for other models.

    Those of the model for an active adapter; another one keeps its own.
    """
    known: Any = getattr(model, "peft_config", {})
    active = [known.get(name) for layer in fusion_layers(model)[:1] for name in layer.active_adapters]
    names = [str(label) for label in class_of(model).labels]
    if not names or names == _numbered(len(names)) or not any(config is own for own in active):
        return config.fusion_labels
    return names


def check_labels(config: FusionConfig, model: nn.Module) -> None:
    """Raises ValueError if a saved adapter's outputs mean something else than the model says of its own."""
    saved, own = config.fusion_labels, [str(label) for label in class_of(model).labels]
    if saved is None or not config.bound or not own or own in (saved, getattr(model, MARK, None)):
        return
    if len(own) == len(saved) and own == _numbered(len(own)):
        return
    raise ValueError(
        f"The adapter's {len(saved)} outputs are {_some(saved)}, in this order; the model was loaded with {len(own)} outputs named "
        f"{_some(own)}. With these names its answers would mean something else. Load the model with id2label=dict(enumerate(labels)) "
        "and label2id={label: i for i, label in enumerate(labels)}, labels being the adapter's (fusion_labels in adapter_config.json; "
        "the lines stand in its card), and ignore_mismatched_sizes=True if its checkpoint has a head of its own."
    )


def set_labels(config: FusionConfig, model: nn.Module) -> None:
    """Names the model's outputs as the adapter does that becomes active. For an adapter that `check_labels` let pass."""
    saved = config.fusion_labels
    own = list(class_of(model).labels)
    if saved is None or not config.bound or len(own) != len(saved) or own == saved:
        return
    model_config: Any = model.config
    model_config.id2label = dict(enumerate(saved))
    model_config.label2id = {label: i for i, label in enumerate(saved)}
    setattr(model, MARK, list(saved))


def _numbered(count: int) -> list[str]:
    """The names that transformers gives where there are none."""
    return [f"LABEL_{i}" for i in range(count)]


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (f", and {len(names) - 8} more" if len(names) > 8 else "")
