"""The fusion methods: pure torch, layer states in, one state out. Knows neither transformers nor peft."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from torch import nn

from .contract import Context, Fusion
from .layers import read_layers, resolve_layers
from .options import Option, joint_options, options_of
from .widths import Budget, BudgetTooSmallError

__all__ = [
    "FUSIONS",
    "Budget",
    "BudgetTooSmallError",
    "Context",
    "Fusion",
    "Option",
    "all_options",
    "build_fusion",
    "fusion_class",
    "fusion_options",
    "read_layers",
    "resolve_layers",
]

# The methods: the name, and the file and class behind it.
_METHODS = {
    "dwatt": "dwatt.DWAtt",
    "dwconcat": "dwconcat.DWConcat",
    "concat": "concat.Concat",
    "scalar_mix": "scalar_mix.ScalarMix",
    "attnres": "attnres.AttnRes",
    "laya": "laya.LAYA",
    "attnpool": "attnpool.AttnPool",
    "shortcut": "shortcut.ShortcutFusion",
    "deeper": "deeper.Deeper",
    "mlp": "controls.MLP",
    "last": "controls.Last",
}


def _load(path: str) -> type[Fusion]:
    file, name = path.split(".")
    return getattr(import_module(f".{file}", __name__), name)


FUSIONS: dict[str, type[Fusion]] = {name: _load(path) for name, path in _METHODS.items()}


def fusion_class(name: str) -> type[Fusion]:
    """The class of a method.

    Raises:
        ValueError: If no method has that name; the message lists those that exist.
    """
    if name in FUSIONS:
        return FUSIONS[name]
    near = difflib.get_close_matches(str(name), FUSIONS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"There is no fusion {name!r}.{hint} The methods are: {', '.join(FUSIONS)}.")


def fusion_options(name: str) -> dict[str, Any]:
    """The options of a method with their defaults; `FusionConfig` offers each as `fusion_<option>`."""
    return {option: told.default for option, told in options_of(fusion_class(name)).items()}


def all_options() -> dict[str, Option]:
    """The options of all methods."""
    return joint_options(FUSIONS)


def build_fusion(
    name: str,
    hidden_size: int,
    num_layers: int,
    layers: Sequence[int] | str | None = None,
    last_block: nn.Module | None = None,
    **options: Any,
) -> Fusion:
    """Builds a fusion with fresh float32 parameters.

    Args:
        name: A name in `FUSIONS`.
        hidden_size: Hidden size `d` of the backbone.
        num_layers: Number of blocks `L` of the backbone.
        layers: Indices of the states to fuse, negatives allowed, or a rule, see `read_layers`; None means `1 .. L`.
        last_block: The backbone's last block, for methods that copy it.
        **options: The method's own options, see `fusion_options`.

    Raises:
        ValueError: If the name, a layer index or an option does not fit; the message says what would.
    """
    cls = fusion_class(name)
    takes = inspect.signature(cls).parameters
    given = {"last_block": last_block, "num_layers": num_layers}
    options.update({known: value for known, value in given.items() if known in takes})
    return cls(hidden_size, resolve_layers(layers, num_layers), **options)
