"""Several models on one backbone: copies of the modules that share every tensor, so that a further model weighs next to nothing."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .walk import modules_of

_QUANTISED = (
    "is_quantized",
    "is_loaded_in_8bit",
    "is_loaded_in_4bit",
    "quantization_method",
    "hf_quantizer",
    "hf_device_map",
)


def twin(model: nn.Module, config: Any = None) -> Any:
    """A copy of a model, hooks included, whose parameters and buffers are those of the model itself.

    Args:
        model: The model.
        config: Stands in the place of the model's configuration; None for a copy of that.

    Raises:
        ValueError: If weights of the model lie on disk or in the memory of the host (`device_map` with offloading).
    """
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(
            f"Weights of this {type(model).__name__} are offloaded (device_map): they are brought for each call, and cannot be shared by "
            "several models. Load the model into the memory of its devices."
        )
    shared: dict[int, Any] = {} if config is None else {id(model.config): config}
    for module in modules_of(model):
        # bitsandbytes unpacks what it loaded at the first call, for the module that is called first
        if hasattr(module, "init_8bit_state") and getattr(module.weight, "CB", None) is not None:
            module.init_8bit_state()  # type: ignore[operator]
        for value in _tensors(module):
            shared[id(value)] = value
    return copy.deepcopy(model, shared)


def _tensors(module: nn.Module) -> list[Tensor]:
    """The tensors that a module holds, those beside its parameters and buffers too, and the packed ones of bitsandbytes."""
    own = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
    own += [
        value for state in (getattr(module, "state", None), module._parameters.get("weight")) for value in _values(state)
    ]
    return [value for value in own if isinstance(value, Tensor)]


def _values(state: Any) -> list[Any]:
    return list(getattr(state, "__dict__", {}).values())


def share_backbone(model: PreTrainedModel, auto_class: Any, **options: Any) -> Any:
    """A model with another head on the backbone of a model: no weight of the backbone is copied, loaded or drawn.

    What changes the backbone in place (training it, moving it to another device) changes both models. Adapters are
    attached to each of them by itself, and saved and loaded as on a model that was loaded alone.

    Args:
        model: A model of transformers without adapters, with any head or none.
        auto_class: `AutoModelForTokenClassification` and the like, or a model class.
        **options: Fields of the configuration: `num_labels`, `id2label`, `problem_type`, ...

    Returns:
        The new model, in evaluation mode, with a fresh head in the backbone's dtype. A head over the vocabulary that the model has
        itself comes along; of another one the embeddings, which it must be tied to, are the backbone's.

    Raises:
        ValueError: If the class is built on another backbone, or on parts that the model was loaded without (BERT's pooler),
            the model carries adapters, or its head is no other than that of a checkpoint.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"This {type(model).__name__} carries adapters. Share the backbone of the plain model, before adapters are attached to it."
        )
    base: Any = model.base_model
    config = copy.deepcopy(base.config)
    for name, value in options.items():
        setattr(config, name, value)
    kind = getattr(auto_class, "config_class", None)
    if kind is not None and not isinstance(config, kind):
        raise ValueError(
            f"{auto_class.__name__} is built from a {kind.__name__}, and the model's configuration is a {type(config).__name__}: they have "
            "no backbone in common. Give the class of a head for this backbone."
        )
    make = getattr(auto_class, "from_config", None) or auto_class._from_config
    with torch.device("meta"):
        other = make(config)
    if type(other) is type(model) and other.get_output_embeddings() is not None:
        return twin(model, config).eval()
    name = other.base_model_prefix
    built: Any = other.base_model
    if built is other or type(built) is not type(base):
        raise ValueError(
            f"{type(other).__name__} is built on {type(built).__name__}, and the model's backbone is {type(base).__name__}: they "
            "have no backbone in common. Give the class of a head for this backbone."
        )
    own = twin(base, config)
    _agree_on_parts(own, built, type(other).__name__)
    setattr(other, name, own)
    _fill_head(other, own)
    for flag in _QUANTISED:
        if flag in vars(model):
            setattr(other, flag, copy.copy(vars(model)[flag]))
    return other.eval()


def stand_on(model: PreTrainedModel, other: PreTrainedModel) -> PreTrainedModel:
    """Puts a model with a head of its checkpoint onto the backbone of another; returns it. Its own backbone is dropped.

    Args:
        model: A model of transformers without adapters.
        other: Another, whose backbone holds the same weights.

    Raises:
        ValueError: If the backbones are of different classes, or that of `other` lacks a part (BERT's pooler).
    """
    mine: Any = model.base_model
    name = type(model).__name__
    if mine is model or type(mine) is not type(other.base_model):
        raise ValueError(
            f"{name} is built on {type(mine).__name__}, and the other model's backbone is {type(other.base_model).__name__}: they have no "
            "backbone in common. Leave the two apart."
        )
    own = twin(other.base_model, model.config)
    _agree_on_parts(own, mine, name)
    output: Any = model.get_output_embeddings()
    tied = output is not None and output.weight is model.get_input_embeddings().weight
    setattr(model, model.base_model_prefix, own)
    if tied:
        output.weight = model.get_input_embeddings().weight
    return model


def _agree_on_parts(own: nn.Module, built: nn.Module, wanted: str) -> None:
    """Takes off the parts of the backbone that the class is built without, such as BERT's pooler for a head over tokens."""
    for name, part in built._modules.items():
        if part is not None and own._modules.get(name) is None:
            raise ValueError(
                f"{wanted} needs the backbone's {name!r}, and the model was loaded without it. Load the model by AutoModel, which has "
                "all parts of the checkpoint, and share that."
            )
    for name in own._modules:
        if built._modules.get(name) is None:
            own._modules[name] = None


def _fill_head(other: Any, own: nn.Module) -> None:
    """Gives what lies outside of the backbone its values: fresh ones, or those of the embeddings that it is tied to."""
    first = next(own.parameters())
    dtype = next((p.dtype for p in own.parameters() if p.is_floating_point()), torch.float32)
    inside = {id(m) for m in modules_of(own)}
    outside = [m for m in modules_of(other) if id(m) not in inside]
    for module in outside:
        for name, value in module._parameters.items():
            if value is not None and value.is_meta:
                module._parameters[name] = nn.Parameter(torch.empty_like(value, device=first.device, dtype=dtype))
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros_like(buffer, device=first.device)
    for module in outside:
        if module is not other and module._parameters:
            other._init_weights(module)
    other.tie_weights()
    output = other.get_output_embeddings()
    if output is not None and output.weight is not other.get_input_embeddings().weight:
        raise ValueError(
            f"The head of {type(other).__name__} over the vocabulary is not tied to the embeddings: its weights stand in a checkpoint, not "
            f"in the backbone. Load the model by {type(other).__name__}.from_pretrained, and share that: its head comes along."
        )
