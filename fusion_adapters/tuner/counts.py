"""Numbers of parameters, also of models and adapters that nobody has built."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftType, inject_adapter_in_model
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from ..backbone.blocks import LAYER_NAME
from .heads import task_heads


def count_trainable(model: nn.Module) -> dict[str, int]:
    """Counts the trainable parameters of an attached model.

    Returns:
        `fusion`, `lora`, `head` (everything in `modules_to_save`), `other`, and their sum, `total`.
    """
    counts = {"fusion": 0, "lora": 0, "head": 0, "other": 0}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if f".{LAYER_NAME}." in name:
            part = "fusion"
        elif ".lora_" in name:
            part = "lora"
        elif ".modules_to_save." in name:
            part = "head"
        else:
            part = "other"
        counts[part] += parameter.numel()
    return {**counts, "total": sum(counts.values())}


def count_lora(config: LoraConfig, model: nn.Module) -> dict[str, int]:
    """What the LoRA of a config would train on a model, split as in `count_trainable`; a fusion is left out.

    As beside a fusion, it does not go into the heads of the config's task, which train as a whole.

    It is injected into a copy without weights, so that the count holds for every option of LoRA and every model.

    Args:
        config: A config with LoRA; it is not changed.
        model: A model with or without weights, see `skeleton`.
    """
    config = copy.deepcopy(config)
    config.peft_type = PeftType.LORA  # peft's own method, whatever the class of the config
    # "all-linear" takes the heads too, and peft excludes those of a task only if they are named before
    config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *task_heads(config)])) or None
    config.init_lora_weights = True  # others refuse some ranks, or compute with weights that are not there
    with init_empty_weights(), torch.device("meta"):
        return count_trainable(inject_adapter_in_model(config, empty_copy(model), low_cpu_mem_usage=True))


def skeleton(model: str | PreTrainedConfig, model_class: Any = AutoModel, **options: Any) -> nn.Module:
    """A model without weights (meta device), from its configuration alone; of any size in seconds.

    Args:
        model: A hub id, a folder with a `config.json`, or a configuration.
        model_class: One of transformers' `AutoModel...` classes, for a model with a task head.
        **options: Of `from_pretrained`, for a name: `gguf_file`, `revision`.

    Raises:
        OSError: If there is no configuration to be had under that name.
    """
    config = AutoConfig.from_pretrained(model, **options) if isinstance(model, str) else model
    with init_empty_weights():
        return model_class.from_config(config)


def empty_copy(model: nn.Module) -> nn.Module:
    """A copy without weights, and without the adapters of a model that has some."""
    with init_empty_weights(), torch.device("meta"):
        if all(p.is_meta for p in model.parameters()):
            return copy.deepcopy(model)
        try:
            return type(model)(model.config)  # type: ignore[call-arg]
        except (AttributeError, TypeError):  # a class of somebody's own, with other arguments or no configuration
            weights = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
            buffers: dict[int, Any] = {id(b): b.to("meta") for b in model.buffers()}
            return copy.deepcopy(model, {**weights, **buffers})
