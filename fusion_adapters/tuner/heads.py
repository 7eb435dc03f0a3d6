"""Task heads: the check that none is quantised or forgotten, and float32 training of 16-bit ones."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..backbone.blocks import Backbone
from ..backbone.families import has_new_head
from .config import FusionConfig

# peft's own names; for some tasks it adds them to modules_to_save only after the injection
TASK_HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


def task_heads(config: FusionConfig) -> list[str]:
    """The names of the heads that peft trains for the config's task, which may be given as text or as peft's enum."""
    return TASK_HEADS.get(getattr(config.task_type, "value", config.task_type) or "", [])


def name_task_heads(config: FusionConfig) -> None:
    """Adds the task's heads to `modules_to_save`."""
    if heads := task_heads(config):
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *heads]))


def check_head(model: nn.Module, backbones: list[Backbone], config: FusionConfig) -> None:
    """Looks for a task head that cannot be trained, or that would stay frozen and not be saved.

    Raises:
        ValueError: If the head is quantised, or peft would train and save only a part of it.
    """
    wanted = config.modules_to_save or []
    in_backbone = _modules_of(model, backbones)
    forgotten = []
    for name, module in model.named_modules():
        covered = any(name.endswith(key) for key in wanted)
        quantised = [n for n, p in module.named_parameters() if not p.is_floating_point()]
        if covered and quantised:
            raise ValueError(
                f"The task head {name!r} ({type(module).__name__}) was quantised with the backbone ({', '.join(quantised)} "
                "is not floating point), so it cannot be trained. Load the model with "
                "quantization_config=fusion_adapters.quantization_config(bits=8), which leaves heads alone "
                f"(it sets llm_int8_skip_modules; yours must contain {name!r})."
            )
        own = next(module.named_parameters(recurse=False), None)
        parts = name.split(".")
        inside_covered = any(".".join(parts[:i]).endswith(key) for i in range(1, len(parts) + 1) for key in wanted)
        if own is not None and id(module) not in in_backbone and not inside_covered:
            forgotten.append(name or own[0])
    if not forgotten or not has_new_head(model) or config.inference_mode:
        return
    named = ", ".join(map(repr, forgotten))
    if task_heads(config):
        raise ValueError(
            f"The task head of {type(model).__name__} has parameters in {named}, which would stay "
            f"frozen and would not be saved: its task_type covers {', '.join(map(repr, wanted))} only. Add "
            "them to modules_to_save in the config."
        )
    warnings.warn(
        f"The task head of {type(model).__name__} ({named}) stays frozen and is not saved with the adapter. If it is new, "
        f"train it: modules_to_save={forgotten} in the config.",
        stacklevel=2,
    )


def _modules_of(model: nn.Module, backbones: list[Backbone]) -> set[int]:
    """The identities of the modules below the head; a model that is its own base (Whisper's) has its head beside a stack."""
    base = backbones[0].base
    inside = [base] if base is not model else [backbone.root for backbone in backbones]
    return {id(m) for module in inside for m in module.modules()}


def train_head_in_float32(model: nn.Module, backbones: list[Backbone], adapter_name: str) -> None:
    """Makes the trainable copy of a 16-bit head float32; peft leaves it in the dtype of the backbone."""
    in_backbone = _modules_of(model, backbones)
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    for wrapper in model.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper) or id(wrapper) in in_backbone:
            continue
        if adapter_name not in wrapper.modules_to_save:
            continue
        head = wrapper.modules_to_save[adapter_name]
        dtype = next((p.dtype for p in head.parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
        if dtype is not None:
            head.float()
            remove_float32_hook(head)
            head.register_forward_pre_hook(_inputs_to_head)
            # the wrapper's modules: the output embeddings may be the wrapper itself, or lie in another adapter's copy
            if outputs is not None and all(m is not outputs for m in wrapper.modules()):
                head.register_forward_hook(_OutputTo(dtype))  # a masked LM's transform: frozen 16-bit embeddings follow


def _inputs_to_head(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # float32, unless the model was cast as a whole since
    dtype = next(p.dtype for p in head.parameters() if p.is_floating_point())
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


class _OutputTo:
    """A forward hook that gives a head's result the dtype of what comes after it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, head: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return output.to(self.dtype) if isinstance(output, Tensor) else output


def remove_float32_hook(head: nn.Module) -> None:
    """Takes back what `train_head_in_float32` hooked on."""
    for key, hook in list(head._forward_pre_hooks.items()):
        if hook is _inputs_to_head:
            del head._forward_pre_hooks[key]
    for key, after in list(head._forward_hooks.items()):
        if isinstance(after, _OutputTo):
            del head._forward_hooks[key]
