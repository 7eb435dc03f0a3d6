"""Finds the blocks, width and depth of a transformers model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .families import (
    DEPTH_NAMES,
    FEED_BLOCKS,
    HIDDEN_SIZE_NAMES,
    STACKS,
    blocks_in_order,
    is_causal,
    layer_drop,
    text_config,
)
from .shapes import check_blocks, check_whole, refuse_stages, widths_of_stages

LAYER_NAME = "layer_fusion"  # where a fusion hangs in the module tree: a child of the backbone


@dataclass
class Backbone:
    """The frozen part of a transformers model, as one fusion needs to see it: one stack of blocks.

    Attributes:
        base: The model without its task head (transformers' `base_model`), or the model itself if it has none.
        root: The innermost model around the blocks, whose call runs them: `base` for most models, one of its two stacks
            for an encoder-decoder.
        blocks: The transformer blocks, in the order in which they run; a block that runs several times (ALBERT) is
            listed as often.
        blocks_name: Name of the list of blocks inside `root`.
        hidden_size: Width `d` of the layer states.
        model_type: The `model_type` of the transformers configuration.
        causal: Whether positions see only earlier ones.
        stack: `"encoder"` or `"decoder"` for an encoder-decoder, else None.
        path: Name of the list of blocks inside `base`.
        depth: Where a fusion of the lower blocks stops, see `lower`; None for one of all blocks.
        above: The blocks above that, which do not run.
    """

    base: nn.Module
    root: nn.Module
    blocks: list[nn.Module]
    blocks_name: str
    hidden_size: int
    model_type: str
    causal: bool
    stack: str | None = None
    path: str = ""
    depth: int | None = None
    above: list[nn.Module] = field(default_factory=list)

    @property
    def num_layers(self) -> int:
        """The number of blocks that run, `L`."""
        return len(self.blocks)

    @property
    def whole(self) -> Backbone:
        """All blocks."""
        return replace(self, blocks=[*self.blocks, *self.above], depth=None, above=[])

    def lower(self, depth: int | None) -> Backbone:
        """The first `depth` blocks, with which a call ends; None for all. The same for a model that was cut to so many."""
        blocks = [*self.blocks, *self.above]
        return replace(self, blocks=blocks[:depth], depth=depth, above=[] if depth is None else blocks[depth:])

    @property
    def unreached(self) -> set[int]:
        """The `id` of every block that does not run; one that runs several times (ALBERT) may run below."""
        return set(map(id, self.above)) - set(map(id, self.blocks))

    @property
    def upstream(self) -> list[nn.Module]:
        """What runs before or in the blocks: if nothing in it trains, the layer states of an input never change.

        These are the modules registered before the blocks on every level of the module tree, and the blocks; looked up at
        each call, because peft puts wrappers in the place of modules.
        """
        before: list[nn.Module] = []
        module = self.base
        for part in self.path.split("."):
            for name, child in module.named_children():
                if name == part:
                    break
                before.append(child)
            module = getattr(module, part)
        unreached = self.unreached
        blocks = [m for m in module.children() if id(m) not in unreached] if unreached else [module]
        return [*before, *blocks, *self.beside]

    @property
    def beside(self) -> list[nn.Module]:
        """What stands after the list of blocks, in the encoder that holds it, and feeds every block (DeBERTa, MPNet)."""
        holder = self.base.get_submodule(self.path.rpartition(".")[0])
        found = (getattr(holder, name, None) for name in FEED_BLOCKS)
        return [] if isinstance(holder, PreTrainedModel) else [m for m in found if isinstance(m, nn.Module)]

    @property
    def device(self) -> torch.device:
        """Where the last block computes; the fusion belongs there.

        With a `device_map`, accelerate may keep the block's weights elsewhere (meta) and bring them for each call.
        """
        device = next((t.device for t in self.blocks[-1].parameters()), torch.device("cpu"))
        if device.type == "meta":
            hooks: list[Any] = [m._hf_hook for m in self.blocks[-1].modules() if hasattr(m, "_hf_hook")]
            single = [h for hook in hooks for h in getattr(hook, "hooks", (hook,))]
            where: Any = next(
                (h.execution_device for h in single if getattr(h, "execution_device", None) is not None), device
            )
            device = torch.device(where)
        return device

    @property
    def layer_drop(self) -> float:
        """The probability of skipping a whole block in training (OPT, BART, Whisper, wav2vec 2.0)."""
        return layer_drop(self.root)


def find_backbones(model: nn.Module, blocks_name: str | None = None, stack: str | None = None) -> list[Backbone]:
    """Finds the backbone and its blocks; for an encoder-decoder, one `Backbone` for each stack that is asked for.

    Without a name, the blocks are the one `ModuleList` that has as many members as the configuration says there are
    hidden layers.

    Args:
        model: A transformers model, with or without a task head.
        blocks_name: Name of the list of blocks, as in `model.named_modules()`, for models where the search fails.
        stack: `"encoder"`, `"decoder"` or `"both"`, for an encoder-decoder; None takes the stack that the head reads,
            the decoder where there is one.

    Raises:
        ValueError: If no list of blocks, or more than one, is found (the message lists the candidates), or if the model
            has no such stack.
    """
    base = getattr(model, "base_model", model)
    config = text_config(model)
    if blocks_name is not None:
        name, blocks = _named_blocks(model, base, blocks_name)
        return [_backbone(model, base, name, list(blocks))]
    stacks = _stacks(model, base, config)
    if not stacks:
        if stack is not None and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"fusion_stack={stack!r}: the stacks of {type(model).__name__}, whose encoder and decoder are models of their own, "
                f"cannot be told apart. {_describe(_outermost(_candidates(base)))} Name the blocks of one, fusion_blocks='...', and "
                "leave fusion_stack unset."
            )
        if stack is not None:
            raise ValueError(
                f"fusion_stack={stack!r}: {type(model).__name__} is not an encoder-decoder, its blocks are one stack. Leave "
                "fusion_stack unset."
            )
        return [_backbone(model, base, *_search_blocks(model, base, config))]
    wanted = STACKS if stack == "both" else (stack or ("decoder" if "decoder" in stacks else "encoder"),)
    lacking = [s for s in wanted if s not in stacks]
    if lacking:
        raise ValueError(
            f"fusion_stack={stack!r}: {type(model).__name__} has no {lacking[0]}, it has: {', '.join(stacks)}. Choose "
            f"fusion_stack={next(iter(stacks))!r}, or leave it unset."
        )
    return [_backbone(model, base, *stacks[s], stack=s) for s in wanted]


def _backbone(model: nn.Module, base: nn.Module, name: str, blocks: list[nn.Module], stack: str | None = None) -> Backbone:
    root_name, root = _innermost_model(base, name)
    inner = name.removeprefix(f"{root_name}.") if root_name else name
    config = text_config(root if getattr(root, "config", None) is not None else model)
    hidden_size = next((getattr(config, n) for n in HIDDEN_SIZE_NAMES if hasattr(config, n)), None)
    if hidden_size is None:
        if len(set(widths := widths_of_stages(config))) > 1:
            refuse_stages(model, widths)
        raise ValueError(
            f"The hidden size of {type(model).__name__} is unknown: its configuration has none of "
            f"{', '.join(HIDDEN_SIZE_NAMES)}. Add config.hidden_size, the width of the blocks' outputs."
        )
    check_blocks(model, blocks, hidden_size, (getattr(model, "config", None), config))
    return Backbone(
        base=base,
        root=root,
        blocks=blocks,
        blocks_name=inner,
        hidden_size=hidden_size,
        model_type=getattr(getattr(model, "config", None), "model_type", None) or type(root).__name__,
        causal=is_causal(root, blocks[-1], getattr(config, "model_type", None), stack),
        stack=stack,
        path=name,
    )


def _innermost_model(base: nn.Module, blocks_name: str) -> tuple[str, nn.Module]:
    """The innermost transformers model around the blocks: its call, and only its, runs them with their inputs."""
    found, module = ("", base), base
    parts = blocks_name.split(".")
    for i, part in enumerate(parts[:-1], start=1):
        module = getattr(module, part)
        if isinstance(module, PreTrainedModel):
            found = (".".join(parts[:i]), module)
    return found


def _candidates(base: nn.Module) -> dict[str, nn.ModuleList]:
    lists = {n: m for n, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0}
    return {n: m for n, m in lists.items() if LAYER_NAME not in n.split(".")}  # not those of fusions attached before


def _named_blocks(model: nn.Module, base: nn.Module, name: str) -> tuple[str, nn.ModuleList]:
    for module in (model, base):
        found = dict(module.named_modules()).get(name)
        if isinstance(found, nn.ModuleList) and len(found) > 0:
            inner = next((n for n, m in base.named_modules() if m is found), None)
            if inner is not None:
                check_whole(model, base, inner, _candidates(base))
                return inner, found
    raise ValueError(
        f"fusion_blocks={name!r} does not name a list of blocks of {type(model).__name__}. "
        f"{_describe(_candidates(base))} Set fusion_blocks to one of these."
    )


def _stacks(model: nn.Module, base: nn.Module, config: Any) -> dict[str, tuple[str, list[nn.Module]]]:
    """The stacks of an encoder-decoder that are there, with the name and the list of their blocks."""
    if not getattr(config, "is_encoder_decoder", False):
        return {}
    found = {}
    for stack in STACKS:
        depth = next((getattr(config, n) for n in DEPTH_NAMES[stack] if getattr(config, n, None) is not None), None)
        inside = {n: m for n, m in _outermost(_candidates(base)).items() if stack in n.split(".")[:-1]}
        fitting = [(n, list(m)) for n, m in inside.items() if len(m) == depth]
        if len(fitting) == 1:
            found[stack] = fitting[0]
    return found


def _outermost(candidates: dict[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    """Without lists inside of lists: one inside a block can have as many members as there are blocks."""
    return {n: m for n, m in candidates.items() if not any(n.startswith(f"{o}.") for o in candidates if o != n)}


def _search_blocks(model: nn.Module, base: nn.Module, config: Any) -> tuple[str, list[nn.Module]]:
    depth = getattr(config, "num_hidden_layers", None)
    candidates = _candidates(base)
    ordered = {n: blocks_in_order(config, list(m)) for n, m in _outermost(candidates).items()}
    fitting = {n: blocks for n, blocks in ordered.items() if blocks is not None}
    for name in fitting:
        check_whole(model, base, name, candidates)
    if len(fitting) == 1:
        return next(iter(fitting.items()))
    found = "None was found" if not fitting else f"{len(fitting)} were found"
    expected = "unknown to its configuration" if depth is None else f"{depth} by its configuration"
    raise ValueError(
        f"The blocks of {type(model).__name__} could not be determined: one list of blocks is wanted, with as many members as "
        f"there are hidden layers ({expected}). {found}. {_describe(candidates)} Name the right one in the config, "
        "fusion_blocks='...'."
    )


def _describe(candidates: dict[str, nn.ModuleList]) -> str:
    if not candidates:
        return "The model holds no list of modules at all; is it a transformers model?"
    return "Its lists of modules are: " + ", ".join(f"{n!r} ({len(m)} members)" for n, m in candidates.items()) + "."
