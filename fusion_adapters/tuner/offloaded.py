"""Adapters on a backbone whose weights are partly on the disk or in CPU memory, and come for each call (accelerate's offload).

Between calls such a module holds tensors without values (meta device). What trains has values of its own all the time: LoRA
is made while its module is in memory, and a copy of the head is filled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..backbone.walk import modules_of

FAR = ("cpu", "disk")  # in a device map; peft's names


def offload_hook(module: nn.Module) -> Any:
    """The hook that brings a module's weights for each call; None if they are always there."""
    hook: Any = module.__dict__.get("_hf_hook")
    single = getattr(hook, "hooks", (hook,))
    return next((h for h in single if getattr(h, "offload", False) and h.weights_map is not None), None)


@contextlib.contextmanager
def in_memory(module: nn.Module) -> Iterator[None]:
    """In the body, the weights of a module or of the one that a tuner layer wraps are where it computes.

    Raises:
        ValueError: If the body changed them: the module would bring the old ones in the next call.
    """
    base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    hook = offload_hook(base)
    if hook is None:
        yield
        return
    hook.pre_forward(base)
    try:
        yield
        changed = [n for n, p in base._parameters.items() if p is not None and not _equal(p, hook.weights_map[n])]
    finally:
        hook.post_forward(base, torch.empty(0))
    if changed:
        raise ValueError(
            f"init_lora_weights changes the {changed[0]} of a {type(base).__name__} that is offloaded (device_map with 'cpu' or 'disk'), "
            "and each call brings the old one back. Use init_lora_weights=True, or load the model into memory for it."
        )


def fill_heads(model: nn.Module, adapter_name: str) -> None:
    """Gives an adapter's copies of offloaded modules (`modules_to_save`) values of their own, which stay in memory."""
    for wrapper in modules_of(model):
        if not isinstance(wrapper, ModulesToSaveWrapper) or adapter_name not in wrapper.modules_to_save:
            continue
        for module in modules_of(wrapper.modules_to_save[adapter_name]):
            hook = offload_hook(module)
            if hook is None:
                continue
            remove_hook_from_module(module)
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    # a copy: the values in CPU memory are the frozen module's own
                    value = hook.weights_map[name].detach().to(hook.execution_device, copy=True)
                    module._parameters[name] = nn.Parameter(value, parameter.requires_grad)
            add_hook_to_module(module, AlignDevicesHook(hook.execution_device))


def check_values(model: nn.Module, adapter: dict[str, Tensor]) -> None:
    """Looks for tensors that train or are saved and have no values; for a model that is offloaded.

    Args:
        model: The model, with the adapter.
        adapter: The adapter's tensors, by name.

    Raises:
        ValueError: If there are some.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    empty = [n for n, t in {**adapter, **trained}.items() if t.is_meta]
    if empty:
        raise ValueError(
            f"{len(empty)} tensors that the adapter trains or saves are offloaded (device_map with 'cpu' or 'disk'), for example "
            f"{empty[0]!r}: they have values within a call only, so nothing could be trained or saved. Load the modules that they "
            "belong to into memory (a device_map that puts them on a device), or leave them out of the config."
        )


def is_offloaded(model: nn.Module) -> bool:
    """Whether some of a model's weights come for each call."""
    return any(offload_hook(module) is not None for module in modules_of(model))


@contextlib.contextmanager
def placed(model: nn.Module, plain: bool = False) -> Iterator[None]:
    """In the body, peft and transformers load an adapter into an offloaded model as it stands.

    peft takes the hooks off such a model and spreads it anew over what it finds free: weights on the disk have no values
    meanwhile, and nothing tells whether the adapter belongs to them. transformers leaves an adapter's tensors on the disk.

    Args:
        model: The model.
        plain: Whether transformers loads, which asks where each tensor goes; peft is told of no map.
    """
    owner: Any = next((m for m in modules_of(model) if "hf_device_map" in m.__dict__), model)
    where = owner.__dict__.pop("hf_device_map", None)
    if plain:
        device = next(h.execution_device for m in modules_of(model) if (h := offload_hook(m)) is not None)
        owner.hf_device_map = {n: device if d in FAR else d for n, d in (where or {"": device}).items()}
    try:
        yield
    finally:
        owner.__dict__.pop("hf_device_map", None)
        if where is not None:
            owner.hf_device_map = where


def _equal(here: Tensor, kept: Tensor) -> bool:
    return here.data_ptr() == kept.data_ptr() or torch.equal(here.detach().cpu(), kept.cpu().to(here.dtype))
