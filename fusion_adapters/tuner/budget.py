"""Parameter counts, and the solver that fits a method to a budget. Nothing here needs the backbone's weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..backbone.blocks import LAYER_NAME, Backbone, find_backbones
from ..fusions import build_fusion, fusion_options
from .config import FusionConfig
from .sizes import DWATT_PAPER, lora_rank, read_count

BYTES_PER_PARAMETER = 4  # adapters are stored in float32
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # how configurations name the number of experts


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


class BudgetTooSmallError(ValueError):
    """A budget below the smallest size of a method.

    Attributes:
        smallest: The parameters of that size.
    """

    def __init__(self, what: str, smallest: int, parameters: int) -> None:
        self.smallest = smallest
        super().__init__(
            f"The budget of {parameters:,} parameters is too small: {what} trains {smallest:,}. Raise the budget to at "
            "least that, or choose another method."
        )
        self._arguments = (what, smallest, parameters)

    def __reduce__(self) -> tuple[type, tuple[str, int, int]]:
        """Lets the error cross from one process to another."""
        return type(self), self._arguments


def skeleton(model: str | PreTrainedConfig, model_class: Any = AutoModel) -> nn.Module:
    """A model without weights (meta device), from its configuration alone; of any size in seconds.

    Args:
        model: A hub id, a folder with a `config.json`, or a configuration.
        model_class: One of transformers' `AutoModel...` classes, for a model with a task head.

    Raises:
        OSError: If there is no configuration to be had under that name.
    """
    config = AutoConfig.from_pretrained(model) if isinstance(model, str) else model
    with init_empty_weights():
        return model_class.from_config(config)


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
        return count_trainable(get_peft_model(_empty_copy(model), config, low_cpu_mem_usage=True))


def _empty_copy(model: nn.Module) -> nn.Module:
    """A copy without weights, and without the adapters of a model that has some."""
    if _is_empty(model):
        return copy.deepcopy(model)
    try:
        return type(model)(model.config)  # type: ignore[call-arg]
    except (AttributeError, TypeError):  # a class of somebody's own, with other arguments or no configuration
        weights = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
        buffers: dict[int, Any] = {id(b): b.to("meta") for b in model.buffers()}
        return copy.deepcopy(model, {**weights, **buffers})


def fit_budget(config: FusionConfig, model: nn.Module, parameters: int) -> FusionConfig:
    """Chooses the free width of a method so that fusion and LoRA together train at most so many parameters.

    Free are the bottleneck of `dwatt`, `dwconcat`, `concat`, `laya` and `mlp`; feed-forward width and number of blocks of `deeper`, with
    `fusion_copy_last` the number of copies; and for `last` with LoRA the rank. The largest width that fits is taken. LoRA beside
    another fusion keeps its rank.

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
    if config.fusion_copy_last:
        return _fit_copies(config, model, parameters)
    lora = _count_lora(config, model) if config.has_lora else 0
    backbones = find_backbones(model, config.fusion_blocks, config.fusion_stack)

    def count(**options: Any) -> int:
        return lora + _count_fusions(config, backbones, **options)

    known = fusion_options(config.fusion)
    if "bottleneck" in known:
        width = _largest(lambda r: count(bottleneck=r), parameters)
        if width < 1:
            raise BudgetTooSmallError(f"{config.fusion!r} with a bottleneck of 1", count(bottleneck=1), parameters)
        while width > 1 and count(bottleneck=width - 1) == count(bottleneck=width):
            width -= 1  # a method that rounds its width down: say the one that is built
        return replace(config, fusion_bottleneck=width)
    if "feedforward" in known:
        return _fit_blocks(config, count, 4 * backbones[0].hidden_size, parameters)
    if count() > parameters:
        raise BudgetTooSmallError(f"{config.fusion!r}, which has no width to choose,", count(), parameters)
    return config


def resolve_budget(config: FusionConfig, model: nn.Module) -> int | None:
    """The number of parameters that `config.fusion_budget` stands for on this model.

    Args:
        config: `"dwatt-paper"` takes its stack and blocks; `"lora:r=16"` its `target_modules`, without them peft's usual choice.
        model: The model, with or without weights.

    Returns:
        The number; None if the config sets no budget.

    Raises:
        ValueError: If peft knows no usual modules for LoRA in this model.
    """
    budget = config.fusion_budget
    if budget is None or isinstance(budget, int):
        return budget
    if budget == DWATT_PAPER:
        backbones = find_backbones(model, config.fusion_blocks, config.fusion_stack)
        return _count_fusions(FusionConfig.paper("dwatt"), backbones)
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
    lora = FusionConfig(
        fusion="last",
        r=rank,
        target_modules=modules,
        fusion_blocks=config.fusion_blocks,
        fusion_stack=config.fusion_stack,
    )
    return count_config(lora, model)["lora"]


def settle_budget(config: FusionConfig, model: nn.Module) -> None:
    """Puts the width that fits `config.fusion_budget` into the config, in the budget's place."""
    parameters = resolve_budget(config, model)
    if parameters is None:
        return
    fitted = fit_budget(config, model, parameters)
    for name in ("fusion_budget", "fusion_bottleneck", "fusion_num_blocks", "fusion_feedforward", "r"):
        setattr(config, name, getattr(fitted, name))


def _count_fusions(config: FusionConfig, backbones: list[Backbone], **options: Any) -> int:
    chosen = {**config.options, **options}
    with torch.device("meta"):
        fusions = [
            build_fusion(config.fusion, b.hidden_size, b.num_layers, config.fusion_layers, **chosen) for b in backbones
        ]
    return sum(p.numel() for fusion in fusions for p in fusion.parameters())


def _count_lora(config: FusionConfig, model: nn.Module) -> int:
    """What LoRA trains: its matrices, and biases where `bias` asks for them."""
    counts = count_config(config, model)
    return counts["lora"] + counts["other"]


def _fit_rank(config: FusionConfig, model: nn.Module, parameters: int) -> FusionConfig:
    """The largest rank within the budget: what LoRA trains is linear in it, biases and DoRA's magnitudes are its offset."""
    one, two = (_count_lora(replace(config, r=rank), model) for rank in (1, 2))
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


def _fit_copies(config: FusionConfig, model: nn.Module, parameters: int) -> FusionConfig:
    """The largest number of copies of the backbone's last block within the budget: the count is linear in it."""
    counts = [count_config(replace(config, fusion_num_blocks=blocks), model) for blocks in (1, 2)]
    one, two = (sum(count[part] for part in ("fusion", "lora", "other")) for count in counts)
    if one > parameters:
        raise BudgetTooSmallError(f"{config.fusion!r} with one copy of the backbone's last block", one, parameters)
    return replace(config, fusion_num_blocks=1 + (parameters - one) // (two - one))


def _fit_blocks(config: FusionConfig, count: Callable[..., int], usual: int, parameters: int) -> FusionConfig:
    """The number of blocks, each up to the usual feed-forward width, that comes nearest to the budget from below."""
    one = count(num_blocks=1, feedforward=1)
    block, unit = count(num_blocks=2, feedforward=1) - one, count(num_blocks=1, feedforward=2) - one
    if one > parameters:
        raise BudgetTooSmallError("'deeper' of one block with a feed-forward width of 1", one, parameters)
    fits = []  # parameters, fewer blocks first, blocks, width
    for blocks in range(1, 2 + (parameters - one) // block):
        left = parameters - one - (blocks - 1) * block
        width = min(usual, 1 + left // (blocks * unit))
        fits.append((_blocks_count(one, block, unit, blocks, width), -blocks, width))
    _, blocks, width = max(fits)
    return replace(config, fusion_num_blocks=-blocks, fusion_feedforward=width)


def _blocks_count(one: int, block: int, unit: int, blocks: int, width: int) -> int:
    """Parameters of `blocks` equal blocks: linear in their number and in their width."""
    return one + (blocks - 1) * block + blocks * (width - 1) * unit


def _largest(count: Callable[[int], int], limit: int) -> int:
    """The largest width whose count is within the limit; 0 if none is."""
    low, high = 0, 1
    while count(high) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= limit else (low, middle)
    return low


def _is_empty(model: nn.Module) -> bool:
    return all(p.is_meta for p in model.parameters())


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
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    experts = next((getattr(config, n) for n in EXPERTS if getattr(config, n, None)), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    share = chosen / experts if chosen and experts else 1.0
    return sum(
        parameter.numel() * runs.get(id(parameter), 1) * (share if "experts" in name.split(".") else 1)
        for name, parameter in model.named_parameters()
        if id(parameter) not in embeddings
    )


def _choice(config: FusionConfig) -> dict[str, Any]:
    if config.has_lora:
        return {"r": config.r}
    names = ("bottleneck", "num_blocks", "feedforward")
    return {n: config.options[n] for n in names if n in config.options}
