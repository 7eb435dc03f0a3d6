"""`Source`: where layer states come from. The only file of this room that knows adapters."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import xxhash
from torch import nn

from ..backbone.blocks import Backbone, find_backbones
from ..backbone.walk import evaluating
from ..tuner import (
    FusionLayer,
    adapters_in_use,
    fusion_layers,
    idle_tensors,
    layers_read,
    reads_means,
    scalings_in_use,
    tensors_in_use,
)


@dataclass(frozen=True)
class Source:
    """A backbone whose layer states can be cached, and what an extraction must know of adapters on it.

    `source_of(model)` looks at a model as it is at that moment. `Source(backbone)` is a backbone without adapters.

    Attributes:
        backbone: The stack of blocks.
        layers: The layer states that training the attached fusion needs, ascending, `L` among them; None without a fusion.
        adapters: The names of the adapters that take part in the states, or `none`.
        idle: The `id` of every tensor of an adapter that takes no part in them.
        scalings: The factors with which LoRA enters the blocks.
        fusions: The fusion layers, to be switched off while states are computed.
        means: Whether the model reads of each text one mean over its positions alone, see `reads_means`.
    """

    backbone: Backbone
    layers: tuple[int, ...] | None = None
    adapters: str = "none"
    idle: frozenset[int] = frozenset()
    scalings: tuple[float, ...] = ()
    fusions: tuple[FusionLayer, ...] = ()
    means: bool = False

    @property
    def whole(self) -> Source:
        """The same with all blocks, where the attached fusion ends below (`fusion_depth`): its states are among theirs."""
        backbone = self.backbone.whole
        adapters = adapters_in_use(backbone)
        idle, scalings = frozenset(idle_tensors(backbone)), tuple(scalings_in_use(backbone))
        return replace(self, backbone=backbone, adapters=adapters, idle=idle, scalings=scalings)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """For the time of the body: evaluation mode, and in this thread no graph and no fusion."""
        with contextlib.ExitStack() as stack, evaluating(self.backbone.base), torch.no_grad():
            for layer in self.fusions:
                stack.enter_context(layer.unfused())
            yield


def source_of(model: nn.Module | Source) -> Source:
    """The one stack of a model, attached or bare, whose states can be cached; a `Source` is returned as it is.

    Raises:
        ValueError: If something trains inside the backbone, or it is an encoder-decoder.
    """
    if isinstance(model, Source):
        return model
    fusions = fusion_layers(model)
    backbones = [layer.running for layer in fusions] or find_backbones(base_of(model))
    backbone = backbones[0]
    if len(backbones) > 1 or backbone.stack is not None:
        raise ValueError(
            f"The layer states of an encoder-decoder ({backbone.model_type!r}) cannot be cached: the decoder's depend on the "
            "encoder's and on the labels. Train it live, without a cache."
        )
    inside = {id(p) for m in backbone.upstream for p in m.parameters() if p.requires_grad} if fusions else set()
    trained = [n for n, p in backbone.base.named_parameters() if id(p) in inside]
    if trained:
        lora = any(".lora_" in f".{name}" for name in trained)
        raise ValueError(
            f"{len(trained)} parameters train inside the backbone ({'LoRA, ' if lora else ''}for example {trained[0]!r}), so its "
            "layer states change with every step and states computed once would be wrong from the second step on. Train "
            "live, without a cache; or train the fusion alone (target_modules=None), whose backbone stays as it is."
        )
    return Source(
        backbone,
        layers_read(fusions[0]) if fusions else None,
        adapters_in_use(backbone),
        frozenset(idle_tensors(backbone)),
        tuple(scalings_in_use(backbone)),
        tuple(fusions),
        bool(fusions) and reads_means(base_of(model), fusions[0]),
    )


def adapters_digest(backbone: Backbone) -> tuple[str, str]:
    """The names of the adapters that take part in a backbone's layer states, and a digest of their weights; `none` without any.

    The weights count as rounded to bfloat16, so that the digest survives a cast to it, and their names do not.
    """
    names = adapters_in_use(backbone)
    tensors = list(tensors_in_use(backbone))
    if not tensors:
        return names, "none"
    digest = xxhash.xxh3_128()
    for scaling in scalings_in_use(backbone):
        digest.update(struct.pack("<d", scaling))
    for tensor in tensors:
        value = tensor.detach().to(torch.bfloat16).cpu().contiguous()
        digest.update(f"{tuple(value.shape)}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return names, digest.hexdigest()


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a peft model."""
    get_base_model: Any = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()
