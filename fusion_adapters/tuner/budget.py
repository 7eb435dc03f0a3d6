"""Fits the size of a method to a budget of parameters. Nothing here needs the backbone's weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from ..backbone.blocks import Backbone
from ..fusions import Budget, BudgetTooSmallError, fusion_class
from ..fusions.numerics import undrawn
from .build import build_for
from .config import FusionConfig
from .counts import empty_copy
from .lower import lower_backbones
from .lower_lora import count_lora_below
from .sizes import DWATT_PAPER, UNFITTED, lora_rank, read_count

__all__ = [
    "BudgetTooSmallError",
    "default_budget",
    "default_parameters",
    "fit_budget",
    "has_own_width",
    "resolve_budget",
    "settle_budget",
    "size_is_meant",
    "warn_if_large",
]

# A fusion at its default width trains at most so many parameters for each block and each value of the hidden size: as many as a LoRA
# of rank 8 on four square projections of attention, and in no decoder more than one of rank 16 on the query and the output alone.
PER_BLOCK = 64
LARGE = 50_000_000  # parameters of a fusion that should be somebody's choice


def fit_budget(config: FusionConfig, model: nn.Module, parameters: int) -> FusionConfig:
    """Chooses the free width of a method so that fusion and LoRA together train at most so many parameters.

    Free are the `widths` of the method's class (the bottleneck; for `deeper` the number of blocks and their feed-forward width,
    with `fusion_copy_last` the number of copies), and for `last` with LoRA the rank. The largest that fits is taken, see
    `Fusion.fit_widths`. LoRA beside another fusion keeps its rank.

    Args:
        config: The config to start from; it is not changed.
        model: The model, with or without weights.
        parameters: The budget, heads excluded.

    Returns:
        A copy with the width filled in; `count_config` tells what it trains. Biases that LoRA trains count with it.

    Raises:
        BudgetTooSmallError: If the smallest width is too large, or the method has no width to choose and does not fit.
        ValueError: If the rank is to be chosen and `rank_pattern` sets it for every module.
    """
    config = replace(config, fusion_budget=None)
    if config.fusion == "last" and config.has_lora:
        return _fit_rank(config, model, parameters)
    lora = _lora_and_biases(config, model) if config.has_lora else 0
    # what is copied of the backbone is copied without its weights
    source = empty_copy(model) if config.fusion_copy_last else model
    backbones = lower_backbones(config, source)

    def count(**widths: int) -> int:
        return lora + _parameters(config, backbones, **widths)

    budget = Budget(config.fusion, parameters, backbones[0].hidden_size, config.options, count)
    widths: dict[str, Any] = fusion_class(config.fusion).fit_widths(budget)
    return replace(config, **{f"fusion_{name}": width for name, width in widths.items()})


def resolve_budget(config: FusionConfig, model: nn.Module) -> int | None:
    """The number of parameters that `config.fusion_budget` stands for on this model.

    Args:
        config: `"dwatt-paper"` takes its stack and blocks; `"lora:r=16"` its `target_modules`, without them peft's usual choice.
        model: The model, with or without weights.

    Returns:
        The number; None if the config sets no budget, or `"none"`.

    Raises:
        ValueError: If peft knows no usual modules for LoRA in this model.
    """
    budget = config.fusion_budget
    if budget is None or isinstance(budget, int):
        return budget
    if budget == UNFITTED:
        return None
    if budget == DWATT_PAPER:
        return _parameters(FusionConfig.paper("dwatt"), lower_backbones(config, model))
    rank = lora_rank(budget)
    if rank is None:
        return read_count(budget)
    model_type = str(getattr(getattr(model, "config", None), "model_type", None))
    modules: Any = config.target_modules or TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    if not modules:
        raise ValueError(
            f"fusion_budget={budget!r}: peft knows no usual modules for LoRA in a {model_type!r}. Set target_modules (then "
            "LoRA trains beside the fusion), or give the budget as a number of parameters."
        )
    lora = LoraConfig(r=rank, target_modules=modules, task_type=config.task_type, modules_to_save=config.modules_to_save)
    return count_lora_below(lora, model, lower_backbones(config, model))["lora"]


def settle_budget(config: FusionConfig, model: nn.Module) -> None:
    """Puts the widths that fit `config.fusion_budget` into the config, in the budget's place; without one, those of the default size.

    The default is `default_parameters`, or the method's own where that is less, or where even the smallest width is more.
    """
    parameters = resolve_budget(config, model) if has_own_width(config) else default_budget(config, model)
    if parameters is None:
        config.fusion_budget = None
        return
    fitted = fit_budget(config, model, parameters)
    for name in ("fusion_budget", "r", *(f"fusion_{width}" for width in config.widths)):
        setattr(config, name, getattr(fitted, name))


def default_parameters(backbones: Sequence[Backbone]) -> int:
    """What a fusion may train where nobody chose its size: 64 for each block that it reads and each value of the hidden size."""
    return sum(PER_BLOCK * backbone.hidden_size * backbone.num_layers for backbone in backbones)


def has_own_width(config: FusionConfig) -> bool:
    """Whether the size of the fusion was chosen: by a budget, a width, a published form, or when the adapter was made."""
    # a copy of the backbone's block has that block's size
    chosen = (config.fusion_budget, config.fusion_copy_last, *config.widths.values())
    return config.bound or config.options.get("init") == "paper" or any(value is not None for value in chosen)


def size_is_meant(config: FusionConfig) -> bool:
    """Whether the size of the fusion itself was chosen, not only with a published form."""
    return config.bound or (config.options.get("init") != "paper" and has_own_width(config))


def default_budget(config: FusionConfig, model: nn.Module) -> int | None:
    """The budget of a config that chooses no width: `default_parameters`, and what its LoRA trains.

    Returns:
        The number; None where the method's own width is less, or its smallest is more: it then keeps its own.
    """
    if not config.widths:
        return None
    backbones = lower_backbones(config, model)
    limit = default_parameters(backbones)
    if _parameters(config, backbones) <= limit:
        return None
    lora = _lora_and_biases(config, model) if config.has_lora else 0
    try:
        fit_budget(config, model, limit + lora)
    except BudgetTooSmallError:
        return None
    return limit + lora


def warn_if_large(config: FusionConfig, fusions: Sequence[nn.Module]) -> None:
    """Warns of a default or published size that is large on a large backbone."""
    count = sum(p.numel() for fusion in fusions for p in fusion.parameters())
    if count > LARGE and not any(p.is_meta for fusion in fusions for p in fusion.parameters()):
        size = "in its published form" if config.options.get("init") == "paper" else "at its own width"
        warnings.warn(
            f"fusion={config.fusion!r} {size} trains {count:,} parameters on this backbone: {count / 2**28:.1f} GiB in float32, four times "
            "that with gradients and Adam. Set fusion_budget, for example '10M', which chooses a width"
            f"{''.join(f' (fusion_{name})' for name in config.widths)}; or choose a smaller method.",
            stacklevel=2,
        )


def _parameters(config: FusionConfig, backbones: list[Backbone], **widths: int) -> int:
    with torch.device("meta"), undrawn():
        fusions = [build_for(backbone, config, **widths) for backbone in backbones]
    return sum(p.numel() for fusion in fusions for p in fusion.parameters())


def _lora_and_biases(config: FusionConfig, model: nn.Module) -> int:
    """What LoRA trains: its matrices, and biases where `bias` asks for them."""
    counts = count_lora_below(config, model, lower_backbones(config, model))
    return counts["lora"] + counts["other"]


def _fit_rank(config: FusionConfig, model: nn.Module, parameters: int) -> FusionConfig:
    """The largest rank within the budget: what LoRA trains is linear in it, biases and DoRA's magnitudes are its offset."""
    one, two = (_lora_and_biases(replace(config, r=rank), model) for rank in (1, 2))
    if one > parameters:
        raise BudgetTooSmallError("LoRA of rank 1", one, parameters)
    if one == two:
        raise ValueError(
            f"A budget of {parameters:,} parameters chooses LoRA's rank, but rank_pattern sets the rank of every module "
            f"({one:,} parameters). Leave out rank_pattern or the budget."
        )
    rank = 1 + (parameters - one) // (two - one)
    if str(config.init_lora_weights).lower() == "orthogonal" and rank % 2:  # peft halves the rank there
        rank -= 1
        if not rank:
            raise BudgetTooSmallError("LoRA of rank 2, the least with init_lora_weights='orthogonal',", two, parameters)
    return replace(config, r=rank)
