"""A folder that is loaded into an adapter that the model has already: a best checkpoint, one to resume from."""

from __future__ import annotations

import os
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME

from ..backbone.fingerprint import fingerprints, join_fingerprints
from ..fusions import resolve_layers
from .binding import bind
from .config import FusionConfig
from .digest import check_options
from .labels import check_labels
from .layer import fusion_layers
from .load import Load
from .lower import depth_in
from .weights import check_weights, tensors_in_file, weights_of

# Fields that change an adapter's answers and that its tensors do not show; those of LoRA, if there is any.
_OPTIONS = (
    "fusion",
    "fusion_heads",
    "fusion_scale",
    "fusion_weights",
    "fusion_temperature",
    "fusion_copy_last",
    "fusion_stack",
    "fusion_pool",
    "fusion_norm",
    "fusion_alpha",
    "fusion_depth",
)
_LORA = ("r", "lora_alpha", "alpha_pattern", "use_rslora")


def check_refill(model: PeftModel, adapter_name: str, load: Load) -> None:
    """Compares a folder with the adapter into which it is about to be loaded.

    Raises:
        ValueError: If it is of another method, its options or its backbone are others, or the file is damaged.
    """
    saved = _config_in(load)
    config: Any = model.peft_config[adapter_name]
    if saved is not None and not isinstance(saved, FusionConfig):
        raise ValueError(
            f"The adapter in {load.folder!r} is of type {getattr(saved.peft_type, 'value', saved.peft_type)}, and {adapter_name!r} in the "
            "model is a fusion adapter. Load it into a model of its own."
        )
    if saved is not None:
        check_options(saved, load.source)
    base = model.get_base_model()
    try:
        check_weights(base, saved, load, weights_of(load), tensors_in_file(model, adapter_name))
    except ValueError as error:
        raise ValueError(f"{error}{_other_size(saved, config)}") from error
    if saved is None or not saved.bound:
        return
    layers = [layer for layer in fusion_layers(base) if adapter_name in layer.fusions]
    backbones = [layer.backbone.lower(depth_in(saved, layer.backbone)) for layer in layers]
    known = [layer.fingerprints.get(b.depth) for layer, b in zip(layers, backbones, strict=True)]
    marks = [fingerprints(b, saved.fusion_fingerprint, each) for b, each in zip(backbones, known, strict=True)]
    bind(saved, backbones, join_fingerprints(marks))
    check_labels(saved, base)
    where = f"{adapter_name!r} has in the model"
    check_same_options(saved, config, layers[0].backbone.num_layers, where, load.folder)


def _other_size(saved: Any, config: FusionConfig) -> str:
    """A sentence on widths that differ, which is why tensors do; nothing if they do not."""
    if not isinstance(saved, FusionConfig) or saved.fusion != config.fusion or saved.widths == config.widths:
        return ""
    pairs = ", ".join(
        f"fusion_{name} is {saved.widths[name]} there and {width} here" for name, width in config.widths.items()
    )
    return f" The sizes differ: {pairs}. Give the config that size; the method's own, the default of 0.1.0, is fusion_budget='none'."


def check_same_options(saved: FusionConfig, config: FusionConfig, depth: int, holder: str, folder: str | None) -> None:
    """Raises ValueError if options of an adapter that was saved are others than those it gets, and its tensors would not show it.

    Args:
        saved: The config that was saved.
        config: The one that is used, with all its options settled.
        depth: The backbone's number of blocks.
        holder: Who has the options of `config`, for the message.
        folder: Where the adapter was saved.
    """
    fields = (*_OPTIONS, *(_LORA if config.has_lora else ()))
    if config.alpha != 1:  # which of its modules are a head that is scaled
        fields = (*fields, "task_type")
    pairs = [(name, _option(saved, name, depth), _option(config, name, depth)) for name in fields]
    others = [f"{name} is {there!r} there and {here!r} here" for name, there, here in pairs if there != here]
    if _layers(saved, depth) != _layers(config, depth):
        others.append(f"fusion_layers is {saved.fusion_layers} there and {config.fusion_layers} here")
    if others:
        raise ValueError(
            f"The adapter in {folder!r} was saved with other options than {holder}: {'; '.join(others)}. Its answers would be others. "
            "Load it with the config that was saved with it (leave config out), under a name of its own."
        )


def _option(config: FusionConfig, name: str, depth: int) -> Any:
    """What an option means; adapters of 0.1.0 know neither norm nor alpha, and all blocks may be counted or left unsaid."""
    value = getattr(config, name)
    if value is None:
        return {"fusion_norm": "none", "fusion_alpha": 1.0}.get(name)
    return None if name == "fusion_depth" and value == depth else getattr(value, "value", value)


def _config_in(load: Load) -> Any:
    """The config beside the weights; None if there is none, which peft does not ask for here."""
    folder, where = load.folder or "", load.where
    path = os.path.join(folder, where.get("subfolder") or "")
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, CONFIG_NAME)):
        return None
    return FusionConfig.from_pretrained(folder, **where)


def _layers(config: FusionConfig, depth: int) -> list[int]:
    return list(resolve_layers(config.fusion_layers, int(config.fusion_depth or depth)))
