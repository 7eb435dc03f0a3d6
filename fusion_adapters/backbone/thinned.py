"""Models without some of their blocks, from anywhere in the stack: ordinary smaller models, which save and load as such."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import logging as transformers_logging

from .blocks import find_backbones
from .families import ACROSS_BLOCKS, SCALED_BY_DEPTH, text_config
from .quantization import quantised_parameters
from .truncate import configs_of, keep_in_config

_PLAIN = (bool, int, float, str, type(None))


class Thinning:
    """Blocks to be taken out of a model; whether that can be is found out here, and nothing is changed yet.

    Args:
        model: A transformers model, without adapters.
        gone: The numbers of the blocks, from 0.

    Raises:
        ValueError: If the model carries adapters, or its weights are packed, or its blocks depend on their numbers; the message says
            what to do.
    """

    def __init__(self, model: nn.Module, gone: Sequence[int]) -> None:
        check_whole_weights(model)
        backbones = find_backbones(model)
        backbone, kind = backbones[0], type(model).__name__
        blocks = backbone.num_layers
        if backbone.stack is not None:
            raise ValueError(
                f"{kind} is an encoder-decoder, of which no blocks are removed. Choose a decoder or an encoder alone."
            )
        if not gone or min(gone) < 0 or max(gone) >= blocks or len(gone) >= blocks:
            raise ValueError(f"{kind} has {blocks} blocks: remove from 1 to {blocks - 1} of them.")
        text = text_config(model)
        across = [name for name in ACROSS_BLOCKS if getattr(text, name, None)]
        if across or backbone.model_type in SCALED_BY_DEPTH or len(set(map(id, backbone.blocks))) < blocks:
            reason = (
                f"{across[0]}={getattr(text, across[0])}"
                if across
                else "they share weights, or their formula has their number"
            )
            raise ValueError(
                f"The blocks of a {backbone.model_type!r} depend on one another ({reason}), so none can be removed. Choose a model whose "
                "blocks have weights of their own."
            )
        self.model, self.blocks, self.path = model, blocks, backbone.path
        self.gone = sorted(set(gone))
        self.kept = [i for i in range(blocks) if i not in self.gone]
        whole = backbone.base.get_submodule(backbone.path)
        self.name = next(name for name, module in model.named_modules() if module is whole)
        self.numbers = self._numbers()

    def _numbers(self) -> list[tuple[nn.Module, str, int]]:
        """What modules know of the number of a block, or of how many there are: attributes to be set, and their new values.

        The model as its class builds it from the old configuration is compared with one from the new. Both are without weights.
        """
        whole = _built(self.model, copy.deepcopy(self.model.config))
        before, now = dict(whole.named_modules()), dict(self.model.named_modules())
        for each in configs_of(whole, self.blocks):
            keep_in_config(each, self.kept, self.blocks)
        thin = _built(self.model, whole.config)
        found, prefix = [], f"{self.name}."
        for name, module in thin.named_modules():
            old_name, number, old_number = name, len(self.kept), self.blocks
            if name.startswith(prefix):
                index, dot, rest = name.removeprefix(prefix).partition(".")
                number, old_number = int(index), self.kept[int(index)]
                old_name = f"{prefix}{old_number}{dot}{rest}"
            if old_name not in before or type(before[old_name]) is not type(module):
                self._refuse(name, "what is in it")
            new, old = _plain(module), _plain(before[old_name])
            for key in sorted(new.keys() | old.keys()):
                if new.get(key) == old.get(key):
                    continue
                if (old.get(key), new.get(key)) != (old_number, number) or isinstance(new[key], bool):
                    self._refuse(name, key)
                found.append((now[old_name], key, number))
        return found

    def _refuse(self, name: str, what: str) -> None:
        raise ValueError(
            f"{type(self.model).__name__} would have another {name!r} ({what}) if it was built with {len(self.kept)} blocks: what its "
            f"blocks compute depends on their number, so blocks {[i + 1 for i in self.gone]} cannot be removed. Remove others, or choose "
            "another model."
        )

    def apply(self) -> None:
        """Takes the blocks out, in place, and changes the configuration: lists of one value a block too."""
        for module, key, number in self.numbers:
            setattr(module, key, number)
        blocks: Any = self.model.get_submodule(self.name)
        for each in configs_of(self.model, self.blocks):
            keep_in_config(each, self.kept, self.blocks)
        for i in reversed(self.gone):
            del blocks[i]


def check_whole_weights(model: nn.Module) -> None:
    """Raises ValueError if a model carries adapters, or packed weights, which can neither be changed nor saved as others."""
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"{type(model).__name__} carries adapters, which have parts in its blocks. Remove blocks first, and train adapters then; or "
            "merge LoRA into the weights (merge_and_unload)."
        )
    packed = next(quantised_parameters(model), None)
    if packed is not None:
        raise ValueError(
            f"The weights of {type(model).__name__} are quantised ({packed[0]!r}), and a map cannot be folded into these. Load the model "
            "in float32 or bfloat16, remove the blocks, save it, and quantise the smaller model as it is loaded."
        )


def _built(model: nn.Module, config: Any) -> Any:
    """A model of the same class without weights."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what it says of configurations was said when the model was loaded
    try:
        with torch.device("meta"):
            return type(model)(config)
    finally:
        transformers_logging.set_verbosity(verbosity)


def _plain(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are numbers or words."""
    own = vars(module).items()
    return {k: v for k, v in own if isinstance(v, _PLAIN) and not k.startswith("_") and k != "training"}
