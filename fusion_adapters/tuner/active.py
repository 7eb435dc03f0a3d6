"""What trains or takes part inside the backbone: LoRA in the blocks, `modules_to_save` before them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from functools import cache
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..backbone.blocks import Backbone

FROZEN = ("base_layer", "original_module")  # what peft's wrappers call the module inside them


def adapters_in_use(backbone: Backbone) -> str:
    """The names of the adapters that take part in the layer states, those folded into the weights marked, or `none`."""
    names: set[str] = set()
    for module, used in _adapted(backbone):
        names.update(used, (f"{name} (merged)" for name in getattr(module, "merged_adapters", ())))
    return ", ".join(sorted(names)) or "none"


def idle_tensors(backbone: Backbone) -> set[int]:
    """The `id` of every tensor of an adapter that takes no part in the layer states: another is active, or it is merged."""
    return {
        id(tensor)
        for module, used in _adapted(backbone)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if name.split(".")[0] not in FROZEN and used.isdisjoint(name.split(".")[1:2])  # lora_A.NAME.weight
    }


def tensors_in_use(backbone: Backbone) -> Iterator[Tensor]:
    """The tensors of the adapters that take part in the layer states, in the order of the modules."""
    for module, used in _adapted(backbone):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if name.split(".")[0] not in FROZEN and not used.isdisjoint(name.split(".")[1:2]):
                yield tensor


def scalings_in_use(backbone: Backbone) -> list[float]:
    """The factors with which LoRA enters the blocks."""
    return [getattr(module, "scaling", {}).get(name, 1.0) for module, used in _adapted(backbone) for name in sorted(used)]


def modules_in(modules: Iterable[nn.Module | None], without: Container[nn.Module] = ()) -> Iterator[Any]:
    """Modules with all that is in them, except for what is in those of `without`.

    Runs several times in every step of a training from cached states: a fifth of the time of `nn.Module.modules`, which
    makes names on its way.
    """
    stack = [*modules]
    while stack:
        module = stack.pop()
        if module is not None and module not in without:
            yield module
            stack += module._modules.values()


def trains(modules: Iterable[nn.Module]) -> bool:
    """Whether a parameter in these modules requires a gradient."""
    return any(p is not None and p.requires_grad for m in modules_in(modules) for p in m._parameters.values())


def _adapted(backbone: Backbone) -> Iterator[tuple[Any, set[str]]]:
    """The modules that adapters put in place before or in the blocks, and the adapters that enter their calls."""
    for module in modules_in(backbone.upstream):
        if _holds_adapters(module.__class__):
            idle = module.disable_adapters or getattr(module, "merged_adapters", None)
            yield module, set() if idle else set(module.active_adapters) & module._get_available_adapters()


@cache
def _holds_adapters(kind: type) -> bool:
    return issubclass(kind, (BaseTunerLayer, ModulesToSaveWrapper))
