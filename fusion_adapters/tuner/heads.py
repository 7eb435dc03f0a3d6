"""Task heads: the check that none is quantised or forgotten, and float32 training of 16-bit ones."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..backbone.blocks import Backbone
from ..backbone.families import output_embeddings
from ..backbone.quantization import quantised_parameters
from ..backbone.walk import modules_of
from .config import FusionConfig
from .fresh import Fresh, find_fresh
from .pooling import check_pool

# peft's own names; for some tasks it adds them to modules_to_save only after the injection
TASK_HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}
TASK_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}


def task_heads(config: LoraConfig) -> list[str]:
    """The names of the heads that peft trains for the config's task, which may be given as text or as peft's enum."""
    return TASK_HEADS.get(getattr(config.task_type, "value", config.task_type) or "", [])


def name_task_heads(config: FusionConfig, model: nn.Module) -> None:
    """Adds the task's heads to `modules_to_save`.

    Raises:
        ValueError: If the model's head is for another task: one of tokens and one of texts have the same shape.
    """
    task = getattr(config.task_type, "value", config.task_type) or ""
    kind = type(model).__name__
    other = next((t for t, name in TASK_CLASSES.items() if name in kind and t != task), None)
    if other is not None and task in TASK_CLASSES:
        load = f"oad the model with AutoModel{TASK_CLASSES[task]}"
        raise ValueError(
            f"The config is for task_type={task!r}, and {kind} has a head for {other!r}: its outputs mean something else, even where "
            f"their number agrees. {f'L{load}, as the adapter was trained' if config.bound else f'Set task_type={other!r}, or l{load}'}."
        )
    if heads := task_heads(config):
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *heads]))


def check_head(model: nn.Module, backbones: list[Backbone], config: FusionConfig) -> None:
    """Looks for a task head that cannot be trained, and for fresh weights that would stay frozen and not be saved.

    Raises:
        ValueError: If the head is quantised, fresh weights would be other ones after each load, or it reads every position of an
            adapter that pools them.
    """
    check_pool(model, backbones, config)
    wanted = config.modules_to_save or []
    ends = tuple(wanted)
    for name, module in model.named_modules():
        if not name.endswith(ends):
            continue
        quantised = [n for n, _ in quantised_parameters(module)]
        if quantised:
            raise ValueError(
                f"The task head {name!r} ({type(module).__name__}) was quantised with the backbone ({', '.join(quantised)} "
                "holds packed values), so it cannot be trained. Load the model with "
                "quantization_config=fusion_adapters.quantization_config(bits=8), which leaves heads alone "
                f"(it sets llm_int8_skip_modules; yours must contain {name!r})."
            )
    fresh = find_fresh(model, backbones, wanted)
    if not (fresh.modules or fresh.bare) or (config.inference_mode and not fresh.known):
        return
    named = ", ".join(map(repr, (*fresh.modules, *fresh.bare)))
    kind, given = type(model).__name__, [name for name in wanted if name not in task_heads(config)]
    remedy = _remedy([*given, *fresh.names] if fresh.names else [], fresh)
    if fresh.known:
        _tell_of_lost_weights(kind, config, fresh, named, remedy)
    elif task_heads(config):
        raise ValueError(
            f"The task head of {kind} has parameters in {named}, which would stay frozen and would not be saved: "
            f"{_covered(model, wanted)}. {remedy}"
        )
    else:
        warnings.warn(
            f"The task head of {kind} ({named}) stays frozen and is not saved with the adapter. If it is new: {remedy}",
            stacklevel=2,
        )


def _covered(model: nn.Module, wanted: Sequence[str]) -> str:
    there = [key for key in wanted if any(n.endswith(key) for n, _ in model.named_modules())]
    return (
        f"its task_type covers {', '.join(map(repr, there))} only" if there else "its task_type covers none of its modules"
    )


def _remedy(names: list[str], fresh: Fresh) -> str:
    train, save = f"modules_to_save={names} in the config", "the model as it is now (save_pretrained)"
    if fresh.bare:
        return f"Save {save}, and attach to what is loaded from there{f', with {train}' if names else ''}."
    return f"Train what is named: {train}. Or save {save}, and attach to what is loaded from there."


def _tell_of_lost_weights(kind: str, config: FusionConfig, fresh: Fresh, named: str, remedy: str) -> None:
    """Raises or warns: the checkpoint lacked weights, and each load of it draws them anew."""
    what = (
        f"The checkpoint of {kind} lacks {named}: {'these have' if len(fresh.modules + fresh.bare) > 1 else 'it has'} random values, "
        "other ones after each load, and the adapter would neither train nor save them."
    )
    if fresh.output:
        remedy += " If these rows were in the checkpoint and you made room for more tokens (resize_token_embeddings), the same holds."
    if config.bound:
        remedy = (
            "The adapter was saved without them, so its answers are not those that it was trained to. Load the model that it was "
            "trained on, from a checkpoint that holds them."
        )
    if fresh.in_use and not (fresh.output or config.bound or config.inference_mode):
        raise ValueError(f"{what} {remedy}")
    warnings.warn(f"{what} {remedy}", stacklevel=2)


def warn_if_nothing_trains(model: nn.Module, config: FusionConfig) -> None:
    """Warns if an adapter that is to be trained has nothing that trains. Not for models without weights, which are counted."""
    parameters = list(model.parameters())
    if config.inference_mode or any(p.requires_grad or p.is_meta for p in parameters):
        return
    warnings.warn(
        f"Nothing trains: fusion={config.fusion!r} has no parameters here, and the config asks neither for LoRA nor for a head. Training "
        "would fail at its first step. Choose another fusion, give target_modules for LoRA, or name a head in modules_to_save.",
        stacklevel=2,
    )


def modules_below_head(model: nn.Module, backbones: list[Backbone]) -> set[int]:
    """The identities of the modules below the head; a model that is its own base (Whisper's) has its head beside a stack."""
    base = backbones[0].base
    inside = [base] if base is not model else [backbone.root for backbone in backbones]
    return {id(m) for m in modules_of(*inside)}


def train_head_in_float32(model: nn.Module, backbones: list[Backbone], adapter_name: str) -> None:
    """Makes the trainable copy of a 16-bit head float32; peft leaves it in the dtype of the backbone."""
    in_backbone = modules_below_head(model, backbones)
    outputs = output_embeddings(model)
    for wrapper in modules_of(model):
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
