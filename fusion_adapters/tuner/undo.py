"""A model as it was before an adapter came: what a failing call puts back."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..backbone.walk import modules_of, parameters_of
from .labels import MARK
from .layer import fusion_layers

_TREE = ("_modules", "_parameters", "_forward_hooks", "_forward_pre_hooks")
_LABELS = ("id2label", "label2id")
_TRANSFORMERS = "_hf_peft_config_loaded"  # on a plain model that carries adapters


class Before:
    """Keeps a model as it is now: modules, hooks, what trains, who is active, its adapters' configs, its labels.

    Args:
        model: The model without peft's wrapping.
        adapter_name: An adapter that is being added; its config may be in the model already, and is not kept.
    """

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self.model = model
        modules = modules_of(model)
        self.layers = fusion_layers(model)
        self.training = [(m, m.training) for m in modules]
        self.trains = [(p, p.requires_grad) for p in parameters_of(model)]
        self.contents = [(own, own.copy()) for m in modules for own in _containers(m)]
        self.plain = [(m, name, value) for m in modules for name, value in _plain_state(m)]
        added = not any(adapter_name in layer.fusions for layer in self.layers)
        self.configs = model.__dict__.get("peft_config")
        self.kept = {k: v for k, v in (self.configs or {}).items() if k != adapter_name or not added}
        config = getattr(model, "config", None)
        self.labels = {name: value for name, value in getattr(config, "__dict__", {}).items() if name in _LABELS}
        self.mark = model.__dict__.get(MARK)

    def restore(self) -> None:
        """Puts the model back."""
        for attached in fusion_layers(self.model):
            if not any(attached is layer for layer in self.layers):
                attached.taps.remove()
        for own, then in self.contents:
            own.clear()
            own.extend(then) if isinstance(own, list) else own.update(then)
        for parameter, requires_grad in self.trains:
            parameter.requires_grad_(requires_grad)
        for module, name, value in self.plain:
            setattr(module, name, value)
        for module, training in self.training:
            module.training = training
        self._restore_attributes()

    def _restore_attributes(self) -> None:
        own = self.model.__dict__
        if self.configs is not None:
            self.configs.clear()
            self.configs.update(self.kept)
            own["peft_config"] = self.configs
        if not self.kept:  # transformers says so before it adds the first
            own.pop("peft_config", None)
            own.pop(_TRANSFORMERS, None)
        own.pop(MARK, None)
        if self.mark is not None:
            own[MARK] = self.mark
        if self.labels:
            self.model.config.__dict__.update(self.labels)  # type: ignore[union-attr]


def _containers(module: nn.Module) -> list[Any]:
    """What a module keeps its parts and hooks in; for one of peft's also what it knows of each adapter."""
    values = vars(module)
    if isinstance(module, (AuxiliaryTrainingWrapper, BaseTunerLayer)):
        return [v for v in values.values() if isinstance(v, (dict, list, set))]
    return [values[name] for name in _TREE]


def _plain_state(module: nn.Module) -> list[tuple[str, Any]]:
    """The attributes of a module of peft's that are replaced, not changed, where another adapter becomes active."""
    if not isinstance(module, (AuxiliaryTrainingWrapper, BaseTunerLayer)):
        return []
    return [(name, value) for name, value in vars(module).items() if name in ("_active_adapter", "_disable_adapters")]
