"""What a config says of LoRA: whether it asks for LoRA, and into which modules it goes."""

from __future__ import annotations

import warnings
from collections.abc import Container
from dataclasses import MISSING, fields
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

# Fields of LoraConfig that say what trains or is saved beside LoRA's matrices, or that name its modules themselves.
_BESIDE = {
    *(
        "modules_to_save",
        "trainable_token_indices",
        "ensure_weight_tying",
        "layer_replication",
        "megatron_config",
        "megatron_core",
    ),
    *("target_modules", "target_parameters"),
}
_DEFAULTS: dict[str, Any] = {
    f.name: f.default if f.default_factory is MISSING else f.default_factory()
    for f in fields(LoraConfig)
    if f.init and f.name not in _BESIDE | {f.name for f in fields(PeftConfig)}
}


def names_lora(named: Container[str]) -> bool:
    """Whether an option of LoRA is among the arguments that somebody wrote for a config."""
    if "peft_type" in named:  # a copy, or read from a file: all fields are there
        return False
    return any(name in named for name in _DEFAULTS)


def changes_lora(config: LoraConfig) -> bool:
    """Whether an option of LoRA differs from its default."""
    return any(getattr(config, name) != default for name, default in _DEFAULTS.items())


def choose_targets(config: LoraConfig, model: nn.Module) -> None:
    """Puts the modules that peft's LoRA takes by default in this model into a config that asks for LoRA and names none.

    Raises:
        ValueError: If peft knows none for this type of model.
    """
    if config.target_modules or config.target_parameters:
        return
    model_type = str(getattr(getattr(model, "config", None), "model_type", None))
    modules: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    if not modules:
        raise ValueError(
            f"The config asks for LoRA (r={config.r}, lora_alpha={config.lora_alpha}) without target_modules, and peft knows no "
            f"default modules for a {model_type!r}. Name them in target_modules, or leave LoRA's options out to train the fusion alone."
        )
    config.target_modules = modules if isinstance(modules, str) else set(modules)  # type: ignore[assignment]
    named = modules if isinstance(modules, str) else ", ".join(sorted(modules))
    warnings.warn(
        f"LoRA of rank {config.r} trains beside the fusion, in peft's default modules for a {model_type!r}: {named}. The config "
        "gives options of LoRA without target_modules, which name others; fusion_lora=False trains the fusion alone.",
        stacklevel=2,
    )
