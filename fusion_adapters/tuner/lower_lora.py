"""LoRA beside a fusion of the lower blocks: it goes into the blocks that run, and nothing trains in those above (`fusion_depth`)."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import replace
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from ..backbone.blocks import Backbone
from ..backbone.walk import modules_of
from .config import FusionConfig
from .counts import count_lora


def count_lora_below(config: LoraConfig, model: nn.Module, backbones: list[Backbone]) -> dict[str, int]:
    """What the LoRA of a config trains in the blocks that run, see `count_lora`.

    Raises:
        ValueError: If all of its modules lie in those that do not.
    """
    below: LoraConfig = replace(config)
    if pattern := _pattern(_above(model, backbones)):
        below.exclude_modules = _joined(config.exclude_modules, pattern)
    with _told_of_above(config, model, backbones, config.exclude_modules):
        return count_lora(below, model)


@contextlib.contextmanager
def without_above(config: FusionConfig, model: nn.Module, backbones: list[Backbone]) -> Iterator[None]:
    """In the body, LoRA leaves out the blocks that do not run; not in what is saved, which fits a model without them too.

    Raises:
        ValueError: If all modules of its LoRA lie in those blocks.
    """
    own = config.exclude_modules
    if config.has_lora and (pattern := _pattern(_above(model, backbones))):
        if not config.bound:
            _warn_of_above(config, model, backbones)
        config.exclude_modules = _joined(own, pattern)
    try:
        with warnings.catch_warnings(), _told_of_above(config, model, backbones, own):
            if not own:  # all of LoRA may be below by itself
                warnings.filterwarnings("ignore", message="You have passed exclude_modules")
            yield
    finally:
        config.exclude_modules = own


def check_nothing_above(backbones: list[Backbone], adapter_name: str) -> None:
    """Raises ValueError if an adapter has parts in blocks that do not run: those would be saved, and never train."""
    for backbone in backbones:
        unreached = backbone.unreached
        for module in modules_of(*(block for block in backbone.above if id(block) in unreached)):
            if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                continue
            if adapter_name in module._get_available_adapters():
                raise ValueError(
                    f"fusion_depth={backbone.depth}: blocks {backbone.num_layers + 1} to {backbone.whole.num_layers} do not run, but the "
                    f"config puts trained weights into one of them ({type(module).__name__}; target_parameters or modules_to_save), "
                    "which would never get a gradient. Name modules below, with the number of their block."
                )


def _above(model: nn.Module, backbones: list[Backbone]) -> dict[str, int]:
    """The names of the blocks that do not run, and where they stand, from 1."""
    unreached = {i for backbone in backbones for i in backbone.unreached}
    found = [(name, id(module)) for name, module in model.named_modules() if id(module) in unreached] if unreached else []
    order = {id(block): i for backbone in backbones for i, block in enumerate(backbone.whole.blocks, start=1)}
    return {name: order[block] for name, block in found}


def _pattern(names: Iterable[str]) -> str:
    """Matches the names of all modules in these blocks; empty if there are none."""
    joined = "|".join(map(re.escape, names))
    return rf"(?:{joined})\..*" if joined else ""


def _joined(own: list[str] | str | None, pattern: str) -> str:
    """What somebody excluded, in peft's two forms, and the pattern."""
    if not own:
        return pattern
    return rf"(?:{own})|{pattern}" if isinstance(own, str) else rf"(?:.*\.)?(?:{'|'.join(map(re.escape, own))})|{pattern}"


@contextlib.contextmanager
def _told_of_above(
    config: LoraConfig, model: nn.Module, backbones: list[Backbone], excluded: list[str] | str | None
) -> Iterator[None]:
    """Says of a config whose LoRA found no module in the blocks that run that it names some in the others."""
    try:
        yield
    except NoMatchingPeftModuleError as error:
        asked = copy(config)
        asked.exclude_modules = excluded
        above = _above(model, backbones)
        matched = [name for name in _targets(asked, model) if re.fullmatch(_pattern(above), name)] if above else []
        if not matched:
            raise
        backbone = next(b for b in backbones if b.above)
        depth = backbone.num_layers
        lowest = min(number for block, number in above.items() if any(name.startswith(f"{block}.") for name in matched))
        which = "" if config.layers_to_transform is None else f", layers_to_transform={config.layers_to_transform}"
        more = f" and {len(matched) - 1} more" if len(matched) > 1 else ""
        raise ValueError(
            f"fusion_depth={depth}: all modules that LoRA is to go into lie in blocks {depth + 1} to {backbone.whole.num_layers}, which do "
            f"not run: target_modules={_listed(config.target_modules)}{which}, which means {matched[0]!r}{more}. Name modules of the "
            f"blocks below (peft counts blocks from 0: 0 to {depth - 1}), choose a fusion_depth of {lowest} or more, or leave LoRA's "
            "options out."
        ) from error


def _warn_of_above(config: LoraConfig, model: nn.Module, backbones: list[Backbone]) -> None:
    """Warns of blocks and modules that a config names by themselves for LoRA, and that do not run."""
    pattern = _pattern(_above(model, backbones))

    def lies_above(field: str, part: Any) -> bool:
        alone = copy(config)
        setattr(alone, field, [part])
        found = _targets(alone, model)
        return bool(found) and all(re.fullmatch(pattern, name) for name in found)

    for field in ("layers_to_transform", "target_modules"):
        parts = getattr(config, field)
        above = [part for part in sorted(parts) if lies_above(field, part)] if isinstance(parts, (list, set)) else []
        if above and len(above) < len(parts):  # all of them: an error
            warnings.warn(
                f"LoRA does not go into {above} of {field}: blocks above fusion_depth={next(b.depth for b in backbones if b.above)} do "
                "not run, and nothing trains there. Leave these out, or choose a greater fusion_depth.",
                stacklevel=2,
            )


def _targets(config: LoraConfig, model: nn.Module) -> list[str]:
    """The names of the modules that LoRA goes into by a config."""
    return [name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)]


def _listed(modules: Any) -> str:
    return repr(modules if isinstance(modules, str) else sorted(modules or ()))
