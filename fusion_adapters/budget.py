"""Parameter counts: what trains, split by its part."""

from __future__ import annotations

from torch import nn

from .backbone import LAYER_NAME


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
