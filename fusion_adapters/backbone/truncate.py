"""Models without their upper blocks: loaded so, or cut when they are in memory."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import AutoConfig
from transformers import logging as transformers_logging

from .blocks import find_backbones
from .families import ACROSS_BLOCKS, SCALED_BY_DEPTH, is_per_block, output_embeddings, text_config

logger = logging.getLogger("fusion_adapters")
COUNT = "num_hidden_layers"
# What AutoModel gives to the hub, beside what it gives to the configuration.
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# What is not for the configuration: a checkpoint's own value must stand there until the model reads ours.
_OF_MODEL = ("dtype", "torch_dtype", "quantization_config", "device_map")


def load_cut(auto_class: Any, name: str, depth: int | float, **options: Any) -> Any:
    """Loads the first blocks of a model: what a `FusionConfig(fusion_depth=depth)` needs of it.

    The blocks above are neither built nor read from the checkpoint. The final norm, the pooler and the head come after the last
    block that is left.

    Args:
        auto_class: A class of transformers with `from_pretrained`, `AutoModelForTokenClassification` for example.
        name: A folder or a hub id.
        depth: How many blocks, or a fraction of them.
        **options: Those of `auto_class.from_pretrained`. With `output_loading_info=True` the result is a pair, as there.

    Raises:
        ValueError: If the model has fewer blocks, two stacks, or blocks that cannot be had without those above them; if there are
            blocks above, and an output layer over the vocabulary; or the checkpoint lacks weights of a block.
        OSError: If there is no such model.
    """
    with_info = options.pop("output_loading_info", False)
    config, rest, (blocks, whole) = cut_config(auto_class, name, depth, **options)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report would list every tensor of the blocks above
    try:
        model, info = auto_class.from_pretrained(name, config=config, output_loading_info=True, **rest)
    finally:
        transformers_logging.set_verbosity(verbosity)
    if blocks < whole and output_embeddings(model) is not None:
        raise ValueError(vocabulary_refusal(f"depth={depth}", type(model).__name__, blocks, whole))
    absent = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == blocks]
    lacking = sorted(key for key in absent if any(key.startswith(f"{name}.") for name in lists))
    if lacking:
        raise ValueError(
            f"The checkpoint {name!r} lacks {len(lacking)} tensors of the first {blocks} blocks of {type(model).__name__}, "
            f"{lacking[0]!r} for example, or has them in other shapes. "
            + (
                "Load the whole model: the blocks above are skipped there too."
                if blocks < whole
                else "Load a checkpoint that is whole and of this class."
            )
        )
    if absent and not with_info and verbosity <= transformers_logging.WARNING:
        logger.warning("Not in the checkpoint %s, and new: %s.", name, ", ".join(sorted(absent)))
    return (model, info) if with_info else model


class UncuttableError(ValueError):
    """Raised for a model whose lower blocks are not to be had without those above; nothing was loaded."""


@dataclass(frozen=True)
class CutClass:
    """Stands for a class of transformers where models are loaded by one: its models are cut.

    Attributes:
        auto_class: The class.
        depth: See `load_cut`.
    """

    auto_class: Any
    depth: int | float

    def from_pretrained(self, name: str, **options: Any) -> Any:
        """See `load_cut`."""
        return load_cut(self.auto_class, name, self.depth, **options)


def cut_config(
    auto_class: Any, name: str, depth: int | float, **options: Any
) -> tuple[Any, dict[str, Any], tuple[int, int]]:
    """The configuration of a model's first blocks, the options that are not for it, and how many blocks of how many these are.

    Args:
        auto_class: See `load_cut`.
        name: See there.
        depth: See there.
        **options: See there.
    """
    loader = getattr(auto_class, "config_class", None) or AutoConfig
    hub = {key: options.pop(key) for key in _HUB if key in options}
    kept = {key: options.pop(key) for key in _OF_MODEL if key in options}
    trust: dict[str, Any] = {key: options[key] for key in ("trust_remote_code", "code_revision") if key in options}
    config = options.pop("config", None)
    if config is None:
        config, options = loader.from_pretrained(name, return_unused_kwargs=True, **hub, **options)
    config = copy.deepcopy(config)
    counts = truncate(config, depth)
    return config, {**options, **trust, **hub, **kept}, counts


def truncate(config: Any, depth: int | float) -> tuple[int, int]:
    """Makes a configuration in place that of the first blocks; returns their number, and that of all of them.

    Raises:
        UncuttableError: If the blocks of this kind of model depend on how many there are.
        ValueError: If there are fewer.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind, blocks = getattr(text, "model_type", type(text).__name__), getattr(text, COUNT, None)
    if getattr(config, "is_encoder_decoder", False) or not isinstance(blocks, int):
        raise UncuttableError(
            f"depth={depth}: a {kind!r} has more than one stack of blocks, or its configuration does not tell their number, so it "
            "is not cut. Load the whole model; FusionConfig(fusion_depth=...) skips the blocks above there."
        )
    wanted = blocks_of_fraction(depth, blocks)
    if wanted > blocks:
        raise ValueError(f"depth={depth}: the model has {blocks} blocks. Choose from 1 to {blocks}, or a fraction below 1.")
    across = [name for name in ACROSS_BLOCKS if getattr(text, name, None)]
    groups = getattr(text, "num_hidden_groups", None) or 1
    if wanted < blocks and (across or groups > 1 or kind in SCALED_BY_DEPTH):
        reason = (
            f"{across[0]}={getattr(text, across[0])}"
            if across
            else f"num_hidden_groups={groups}"
            if groups > 1
            else "by its formula"
        )
        raise UncuttableError(
            f"depth={depth}: the blocks of a {kind!r} depend on how many there are ({reason}), so the first {wanted} of a smaller model "
            f"would not be those of the {blocks}. Load the whole model; FusionConfig(fusion_depth=...) skips the blocks above there."
        )
    keep_in_config(text, range(wanted), blocks)
    return wanted, blocks


def keep_in_config(text: Any, kept: Sequence[int], blocks: int) -> None:
    """Makes a configuration of so many blocks in place that of some of them, by their numbers from 0."""
    for key, value in list(vars(text).items()):
        if not key.startswith("_") and is_per_block(key, value, blocks):
            setattr(text, key, [value[i] for i in kept] if isinstance(value, list) else tuple(value[i] for i in kept))
    setattr(text, COUNT, len(kept))


def cut_model(model: nn.Module, depth: int | float) -> nn.Module:
    """Takes the blocks above the first so many off a model, in place, and returns it. It must not have adapters yet.

    Raises:
        ValueError: See `load_cut`; or if adapters are attached.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"depth={depth}: {type(model).__name__} carries adapters, which have parts in its blocks. Cut the model first, and attach "
            "then; an adapter with fusion_depth that was trained on the whole model loads there too."
        )
    (backbone,) = find_backbones(model)
    config: Any = model.config
    wanted, _ = truncate(copy.deepcopy(config), depth)
    if output_embeddings(model) is not None and wanted < backbone.num_layers:
        raise ValueError(vocabulary_refusal(f"depth={depth}", type(model).__name__, wanted, backbone.num_layers))
    blocks: Any = backbone.base.get_submodule(backbone.path)
    unreached = backbone.lower(wanted).unreached
    kept = [block for block in blocks if id(block) not in unreached]
    for each in configs_of(model, backbone.num_layers):
        truncate(each, depth)
    del blocks[len(kept) :]
    return model


def configs_of(model: nn.Module, blocks: int) -> list[Any]:
    """The configurations, of a model and of its parts, that say it has so many blocks; mostly one object."""
    found = (text_config(module) for module in model.modules())
    return list({id(c): c for c in found if getattr(c, COUNT, None) == blocks}.values())


def blocks_of_fraction(depth: int | float, blocks: int) -> int:
    """A number of blocks, given as one or as a fraction in (0, 1); at least 1."""
    return max(1, round(depth * blocks)) if isinstance(depth, float) and depth < 1 else int(depth)


def vocabulary_refusal(given: str, kind: str, depth: int, blocks: int) -> str:
    """Why a language model has no fusion of its lower blocks."""
    return (
        f"{given}: {kind} predicts tokens, and an output layer over the vocabulary was made for the last block "
        f"({blocks}): it cannot read the state after block {depth}. Use a model with a head that is "
        "trained (token or sequence classification), or fuse all blocks (leave the depth unset)."
    )
