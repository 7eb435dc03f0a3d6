"""Saved adapters of different tasks on one backbone: the model that each needs, with its head, sharing all weights."""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import MethodType
from typing import Any

import transformers
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..backbone.share import share_backbone
from ..backbone.taps import Taps
from ..backbone.walk import parameters_of
from .config import FusionConfig
from .heads import task_heads
from .layer import fusion_layers
from .weights import read_weights

_TRIED = 2  # outputs of a head that is made to see which of its tensors count them
AUTO_CLASSES = {
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def load_shared(
    plain: PreTrainedModel, name: str, folder: str | os.PathLike[str], head: Any, others: Iterable[PeftModel]
) -> PeftModel:
    """Loads a saved adapter onto a model of its own that shares a backbone, or onto one of those that are there.

    Args:
        plain: A model without adapters on the backbone.
        name: The adapter's name there.
        folder: Where it was saved.
        head: The class of its model; None for that of its `task_type`.
        others: Models that were made here before; one with the same head takes the adapter, too.

    Returns:
        The model, with the adapter among its own.

    Raises:
        ValueError: If it is no fusion adapter, holds LoRA, its class is unknown, or leaves parts of its head to a checkpoint.
    """
    folder = os.fspath(folder)
    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, FusionConfig):
        raise ValueError(f"The adapter in {folder!r} is of the method {config.peft_type}, and this takes fusion adapters.")
    if config.has_lora:
        raise ValueError(
            f"The adapter in {folder!r} holds LoRA (r={config.r}): it changes the blocks, whose states would not be those of the other "
            "adapters. Load it onto a model of its own by PeftModel.from_pretrained."
        )
    task = str(getattr(config.task_type, "value", config.task_type))
    if head is None and task not in AUTO_CLASSES:
        raise ValueError(
            f"The adapter in {folder!r} has task_type={task!r}, which does not say what head its model has. Name the class: "
            f"heads={{{name!r}: AutoModelFor...}}."
        )
    kind = head or getattr(transformers, AUTO_CLASSES[task])
    options = _outputs(config, plain, kind, folder)
    for model in others:
        if model.__dict__.get("_made_for") == (kind, options):
            model.load_adapter(folder, adapter_name=name)
            return model
    made = share_backbone(plain, kind, **dict(options))
    _check_head(made, plain, folder)
    model = PeftModel.from_pretrained(made, folder, adapter_name=name)
    model.__dict__["_made_for"] = (kind, options)
    (layer,) = fusion_layers(model)
    blocks = {*map(id, layer.backbone.blocks)}
    for module in layer.backbone.upstream:
        if id(module) not in blocks:
            module.forward = _Embedding(module, layer.taps)  # type: ignore[method-assign]
    return model


class _Embedding:
    """Takes the place of the `forward` of a module before the blocks, whose answer nobody reads where a fused state stands for them.

    Args:
        module: The module.
        taps: Those of the model's backbone.
    """

    def __init__(self, module: nn.Module, taps: Taps) -> None:
        self.module, self.taps = module, taps
        self.alike: bool | None = None  # whether it answers with a tensor of the shape of the states; known after a call

    @property
    def __wrapped__(self) -> Any:
        """For `inspect.signature`."""
        return MethodType(type(self.module).forward, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answers with the fused state, which has the right shape, or as the module does."""
        state = self.taps.fused_before
        if state is not None and self.alike:
            return state
        answer = type(self.module).forward(self.module, *args, **kwargs)
        if state is not None and self.alike is None:
            self.alike = isinstance(answer, Tensor) and answer.shape == state.shape and answer.dtype == state.dtype
        return answer


def _check_head(made: PreTrainedModel, plain: PreTrainedModel, folder: str) -> None:
    """Raises ValueError if parts of a head that was made here are to be those of a checkpoint: they would have fresh values."""
    if type(made) is type(plain) and made.get_output_embeddings() is not None:
        return  # the plain model's own
    below = {id(p) for p in parameters_of(made.base_model)}
    saved = {k.removeprefix("base_model.model.") for k in read_weights((folder, {}))}
    lacking = [name for name, p in made.named_parameters() if id(p) not in below and name not in saved]
    if lacking:
        kind = type(made).__name__
        raise ValueError(
            f"The adapter in {folder!r} leaves {len(lacking)} tensors of the head of {kind} to the checkpoint ({lacking[0]!r}, ...), and "
            f"on a shared backbone they would be drawn anew. Load the plain model by {kind} if that is a head over the vocabulary; or "
            "load the adapter onto a model of its own by PeftModel.from_pretrained, and give the models to ManyAdapters(*models)."
        )


def _outputs(config: FusionConfig, plain: PreTrainedModel, kind: Any, folder: str) -> tuple[tuple[str, Any], ...]:
    """How many outputs the head has, and their names where the adapter knows them, as options of a configuration."""
    if config.fusion_labels is not None:
        names = dict(enumerate(config.fusion_labels))
        return (("id2label", names), ("label2id", {label: i for i, label in names.items()}))
    heads = [*task_heads(config), *(config.modules_to_save or [])]
    if not heads:
        return ()
    saved = {k.removeprefix("base_model.model."): t for k, t in read_weights((folder, {})).items()}
    trial = share_backbone(plain, kind, num_labels=_TRIED)
    for key, tensor in trial.state_dict().items():
        there = saved.get(key)
        if there is not None and _another_number(there, tensor):
            return (("num_labels", len(there)),)
    return (("num_labels", _TRIED),)


def _another_number(saved: Tensor, tried: Tensor) -> bool:
    return len(tried) == _TRIED and saved.shape[1:] == tried.shape[1:] and len(saved) != _TRIED
