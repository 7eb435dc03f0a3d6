"""The tensors of a checkpoint in a model: by their own names whatever adapters wrap them, also where accelerate keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .blocks import LAYER_NAME, Backbone
from .families import HEAD_NAMES
from .quantization import is_readable

WRAPPED = (
    "base_layer",
    "original_module",
    "token_adapter",
    "_orig_mod",
)  # what peft and torch.compile call the module inside


@dataclass
class BaseTensor:
    """A parameter or a saved buffer of the backbone.

    Attributes:
        name: As in a checkpoint of the backbone, without adapters.
        tensor: What the module holds; on the meta device if its values are elsewhere.
        maps: Where accelerate keeps the values of a backbone spread over devices, each with the name there.
        before: Whether it runs before or in the blocks.
        readable: Whether its values are weights: quantised ones are not.
    """

    name: str
    tensor: Tensor
    maps: tuple[tuple[Mapping[str, Tensor], str], ...]
    before: bool
    readable: bool

    def value(self) -> Tensor | None:
        """The values; None if they are nowhere."""
        if not self.tensor.is_meta:
            return self.tensor.detach()
        for values, name in reversed(self.maps):
            try:
                found = values[name]
            except KeyError:
                continue
            if not found.is_meta:
                return found.detach()
        return None


def base_tensors(backbone: Backbone) -> list[BaseTensor]:
    """Every parameter and saved buffer of the backbone, once; adapters, fusions and output layers are left out.

    So are blocks that do not run, see `Backbone.lower`.

    Output layers (poolers): many checkpoints have none, and then a model draws one anew at each load. Buffers that are not
    saved (rotary frequencies, position numbers) follow from the configuration.
    """
    found: dict[int, BaseTensor] = {}
    upstream = set(map(id, backbone.upstream))
    for tensor in _walk(backbone.base, "", (), (upstream, backbone.unreached), False):
        if found.setdefault(id(tensor.tensor), tensor) is not tensor and tensor.before:
            found[id(tensor.tensor)].before = True
    return list(found.values())


def _walk(
    module: nn.Module,
    prefix: str,
    maps: tuple[tuple[Mapping[str, Tensor], str], ...],
    runs: tuple[set[int], set[int]],  # what stands before or in the blocks, and the blocks that do not run
    before: bool,
) -> Iterator[BaseTensor]:
    before = before or id(module) in runs[0]
    hook: Any = module.__dict__.get("_hf_hook")
    if hook is not None:
        single = [getattr(h, "weights_map", None) for h in getattr(hook, "hooks", (hook,))]
        maps = (*maps, *((values, "") for values in single if values is not None))
    children = module._modules
    inside = next((children[name] for name in WRAPPED if children.get(name) is not None), None) if children else None
    if inside is not None:
        yield from _walk(inside, prefix, maps, runs, before)
        return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield BaseTensor(prefix + name, parameter, _below(maps, name), before, is_readable(parameter, module))
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield BaseTensor(prefix + name, buffer, _below(maps, name), before, is_readable(buffer, module))
    for name, child in children.items():
        if child is not None and name not in (LAYER_NAME, *HEAD_NAMES) and id(child) not in runs[1]:
            yield from _walk(child, f"{prefix}{name}.", _below(maps, f"{name}."), runs, before)


def _below(maps: tuple[tuple[Mapping[str, Tensor], str], ...], part: str) -> tuple[tuple[Mapping[str, Tensor], str], ...]:
    return tuple((values, name + part) for values, name in maps) if maps else maps
