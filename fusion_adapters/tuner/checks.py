"""Checks of the fields of a config, before a model is at hand."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from ..fusions import all_options, fusion_options, read_layers
from .sizes import check_budget, check_depth

# The options of all methods; each is a field of the config under the prefix fusion_.
METHOD_OPTIONS = all_options()
# How the values of an option are checked by its types, and the words for what fits. A text is left to the fusion.
CHECKS: dict[frozenset[Any], tuple[Any, str]] = {
    frozenset({int, float}): (Real, "a width (a whole number) or a fraction of the hidden size"),
    frozenset({float}): (Real, "a number"),
    frozenset({int}): (Integral, "a whole number"),
    frozenset({bool}): (bool, "true or false"),
}


def check_fields(config: Any) -> None:
    """Checks all fields; numbers get one form.

    Args:
        config: A `FusionConfig`.

    Raises:
        ValueError: If a field does not fit; the message says what would.
    """
    _check_types(config)
    _check_method(config)
    _check_budget(config)
    _check_lora(config)


def _check_types(config: Any) -> None:
    for option, value in config.options.items():
        name, allowed = f"fusion_{option}", frozenset(METHOD_OPTIONS[option].kinds)
        if allowed not in CHECKS:
            continue
        kind, words = CHECKS[allowed]
        if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
            raise ValueError(f"{name}={value!r} must be {words}.")
    if config.fusion_depth is not None:
        config.fusion_depth = check_depth(config.fusion_depth)
    if isinstance(config.modules_to_save, str):
        raise ValueError(
            f"modules_to_save={config.modules_to_save!r} is a text, of which peft would take each letter for a name. Give a list, "
            f"[{config.modules_to_save!r}]."
        )


def _check_method(config: Any) -> None:
    known = fusion_options(config.fusion)
    for name, value in config.options.items():
        if name not in known:
            offered = ", ".join(f"fusion_{option}" for option in known) or "none"
            raise ValueError(
                f"fusion={config.fusion!r} has no option fusion_{name} (given: {value!r}). Its options are: {offered}. "
                "Remove the field, or choose another method."
            )
    dropout = config.options.get("dropout", 0)
    if not 0 <= dropout < 1:
        raise ValueError(f"fusion_dropout={dropout} must be at least 0 and below 1.")
    if config.fusion_stack not in (None, "encoder", "decoder", "both"):
        raise ValueError(
            f"fusion_stack={config.fusion_stack!r} is unknown. Use 'encoder', 'decoder', 'both', or leave it unset."
        )
    if config.fusion_pool not in (None, "last", "mean"):
        raise ValueError(
            f"fusion_pool={config.fusion_pool!r} is unknown. Use 'mean' (a mean over the text's positions), 'last', or leave it unset."
        )
    if config.fusion_pool == "last":  # one way to say it, in files and in comparisons of them
        config.fusion_pool = None
    if config.fusion_norm not in (None, "rms", "none"):
        raise ValueError(f"fusion_norm={config.fusion_norm!r} is unknown. Use 'rms' or 'none', or leave it unset.")
    alpha = config.fusion_alpha
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, Real) or not 0 < float(alpha) < math.inf):
        raise ValueError(f"fusion_alpha={alpha!r} must be a number above 0. Left out, it suits the learning rates of LoRA.")
    if config.options.get("init") == "paper" and (config.fusion_norm == "rms" or alpha not in (None, 1)):
        raise ValueError(
            f"fusion_init='paper' is the published form of {config.fusion!r}, without fusion_norm={config.fusion_norm!r} or "
            f"fusion_alpha={alpha!r}. Leave these out, or fusion_init."
        )
    if config.fusion_shortcuts is not None and config.fusion != "shortcut":
        raise ValueError(
            f"fusion_shortcuts={str(config.fusion_shortcuts)!r} names maps for fusion='shortcut', and this is {config.fusion!r}. Leave "
            "one of them out."
        )
    if config.fusion_shortcuts is not None:
        config.fusion_shortcuts = str(config.fusion_shortcuts)  # a Path, which no file of a config holds
    if config.fusion_layers is not None:
        config.fusion_layers = read_layers(config.fusion_layers)


def _check_budget(config: Any) -> None:
    if config.fusion_budget is None:
        return
    config.fusion_budget = check_budget(config.fusion_budget)
    given = [f"fusion_{name}" for name, value in config.widths.items() if value is not None]
    if given:
        raise ValueError(
            f"fusion_budget={config.fusion_budget!r} chooses the width of {config.fusion!r}, but {' and '.join(given)} "
            "set it too. Give one of them."
        )


def _check_lora(config: Any) -> None:
    if config.fusion_lora is False and config.has_lora:
        raise ValueError(
            "fusion_lora=False asks for a fusion alone, but target_modules or target_parameters name modules for LoRA. Leave "
            "out one of them."
        )
    if config.fusion_stop_gradient and not config.has_lora:
        raise ValueError(
            "fusion_stop_gradient=True keeps the fusion's gradients from LoRA, but the config has no option of LoRA and asks "
            "for a fusion alone. Set target_modules, or leave fusion_stop_gradient unset."
        )
    if config.layer_replication:
        raise ValueError(
            "layer_replication changes the number of blocks under the fusion, and the adapter would not fit the "
            "backbone it was made for. Leave it unset; a deeper backbone has to be built before attaching."
        )
    if config.bias != "none" and not config.has_lora:
        raise ValueError(
            f"bias={config.bias!r} trains biases of the backbone, but fusion_lora=False asks for a fusion alone, which "
            "trains nothing inside it. Leave one of them out."
        )
