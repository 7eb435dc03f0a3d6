"""The task head's share of `fusion_alpha`: a head that Adam moves as a higher learning rate would, and that answers as before."""

from __future__ import annotations

import warnings
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..backbone.blocks import Backbone
from ..backbone.walk import modules_of
from .config import FusionConfig
from .heads import modules_below_head, remove_float32_hook, task_heads, train_head_in_float32


def prepare_head(model: nn.Module, backbones: list[Backbone], config: FusionConfig, adapter_name: str) -> None:
    """Makes the task head of an adapter ready to train: in float32, and scaled by `fusion_alpha`."""
    train_head_in_float32(model, backbones, adapter_name)
    scale_head(model, backbones, config, adapter_name)


def plain_head(head: nn.Module) -> None:
    """Makes a trained head an ordinary module that answers the same."""
    remove_float32_hook(head)
    unscale_head(head)


def scale_head(model: nn.Module, backbones: list[Backbone], config: FusionConfig, adapter_name: str) -> None:
    """Divides the parameters of an adapter's task head by `fusion_alpha`, and multiplies what its layers answer.

    The head answers as before (to the last bit for powers of two), and a step of Adam changes its answers `alpha` times as much.
    In files its parameters are the divided ones. Heads of somebody's own stay as they are, with a warning: how their layers are
    called is not known.

    Args:
        model: The model, in which peft has wrapped the head.
        backbones: Its backbones, in which no head lies.
        config: The adapter's config.
        adapter_name: The adapter.
    """
    alpha, below = config.alpha, modules_below_head(model, backbones)
    if alpha == 1 or not task_heads(config):
        return
    for name, wrapper in model.named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper) or not name.endswith(tuple(task_heads(config))):
            continue
        if adapter_name not in wrapper.modules_to_save:
            continue
        head = wrapper.modules_to_save[adapter_name]
        if id(wrapper) in below or type(head).__module__.partition(".")[0] not in ("torch", "transformers"):
            warnings.warn(
                f"fusion_alpha={alpha:g} does not reach the trained module {name!r} ({type(head).__name__}): only heads of transformers, "
                "whose layers are called in a known way, are scaled. It learns at the learning rate as it is.",
                stacklevel=2,
            )
            continue
        for layer in modules_of(head):
            if type(layer) is nn.Linear and not any(isinstance(h, _Times) for h in layer._forward_hooks.values()):
                for parameter in layer.parameters():
                    parameter.data.div_(alpha)
                layer.register_forward_hook(_Times(alpha))


def unscale_head(head: nn.Module) -> None:
    """Takes back what `scale_head` did: the parameters are those of a plain head, and answer the same."""
    for layer in modules_of(head):
        for key, hook in list(layer._forward_hooks.items()):
            if isinstance(hook, _Times):
                del layer._forward_hooks[key]
                for parameter in layer.parameters():
                    parameter.data.mul_(hook.alpha)


class _Times:
    """A forward hook that multiplies what a layer answers."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], answer: Tensor) -> Tensor:
        return self.alpha * answer
