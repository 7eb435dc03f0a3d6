"""What a config costs on a model: the parameters that it trains, and beside them bytes and FLOPs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..backbone.blocks import find_backbones
from ..backbone.families import share_of_experts
from .budget import BudgetTooSmallError, fit_budget
from .config import FusionConfig
from .counts import count_trainable, empty_copy

BYTES_PER_PARAMETER = 4  # adapters are stored in float32


def count_config(config: FusionConfig, model: nn.Module) -> dict[str, int]:
    """What a config would train on a model, split as in `count_trainable`.

    The adapter is attached to a copy without weights, so that the count is that of the real adapter for every method,
    every option of LoRA and every model.

    Args:
        config: Any config; it is not changed.
        model: A model with or without weights, see `skeleton`.
    """
    config = copy.deepcopy(config)
    config.init_lora_weights = True  # others refuse some ranks, or compute with weights that are not there
    with init_empty_weights(), torch.device("meta"):
        return count_trainable(get_peft_model(empty_copy(model), config, low_cpu_mem_usage=True))


def compare_budgets(model: nn.Module, methods: list[str], parameters: int, lora: list[str]) -> list[dict[str, Any]]:
    """Fits methods to one budget.

    Args:
        model: The backbone, see `skeleton`.
        methods: Names in `FUSIONS`, with their defaults.
        parameters: The budget, heads excluded.
        lora: Modules for a row of LoRA alone; empty for none.

    Returns:
        A row a method: `method`, `choice` (the widths that were solved), `parameters`, `bytes` of the file's tensors, and
        `flops_percent`, the multiply-adds per token added to the forward pass, against those of the backbone's weights
        (two a weight; attention over positions and embeddings are left out on both sides). A method that does not fit has
        `smallest` instead, the budget that it needs.

    Raises:
        ValueError: If a name in `lora` is that of no module: peft would leave it out without a word.
    """
    names = [name for name, _ in model.named_modules()]
    unknown = [module for module in lora if not any(f".{name}".endswith(f".{module}") for name in names)]
    if unknown:
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))})
        raise ValueError(
            f"The model ({type(model).__name__}) has no module {unknown[0]!r} for LoRA. Its linear maps are: {', '.join(linear)}."
        )
    backbone = _weights_of_a_token(model)
    configs = [(name, FusionConfig(fusion=name)) for name in methods]
    if lora:
        configs.append(("lora", FusionConfig(fusion="last", r=1, target_modules=lora)))
    rows = []
    for name, config in configs:
        try:
            fitted = fit_budget(config, model, parameters)
        except BudgetTooSmallError as error:
            rows.append({"method": name, "smallest": error.smallest})
            continue
        counts = count_config(fitted, model)
        total = counts["fusion"] + counts["lora"]
        rows.append(
            {
                "method": name,
                "choice": _choice(fitted),
                "parameters": total,
                "bytes": BYTES_PER_PARAMETER * total,
                "flops_percent": 100 * total / backbone,
            }
        )
    return rows


def _weights_of_a_token(model: nn.Module) -> float:
    """Weights of the backbone, without embeddings, that a token is multiplied by.

    A block that runs several times (ALBERT) counts as often; of a mixture of experts only as many as the router chooses.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    blocks = [block for backbone in find_backbones(model) for block in backbone.blocks]
    runs = {id(p): max(1, sum(block is other for other in blocks)) for block in blocks for p in block.parameters()}
    share = share_of_experts(model)
    return sum(
        parameter.numel() * runs.get(id(parameter), 1) * (share if "experts" in name.split(".") else 1)
        for name, parameter in model.named_parameters()
        if id(parameter) not in embeddings
    )


def _choice(config: FusionConfig) -> dict[str, Any]:
    if config.has_lora:
        return {"r": config.r}
    return {name: width for name, width in config.widths.items() if width is not None}
