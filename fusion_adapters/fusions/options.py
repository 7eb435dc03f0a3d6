"""A fusion's options, as its class tells them: names, types and defaults by its signature, meanings by its docstring."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .contract import Fusion

# What is handed to a fusion by who builds it, and so is no option.
GIVEN = ("last_block", "num_layers")
# What an option means in every method that has it; the docstring of a class tells what is special there.
SHARED = {
    "bottleneck": "Width of the method's inner layer; an int, or a float as fraction of the hidden size.",
    "heads": "Heads of the attention, over depth or (`deeper`) over positions.",
    "weights": '`"attention"`, or `"uniform"` for the same weight for every layer, a control.',
    "init": '`"identity"` (a fresh adapter leaves the model\'s answers as they were) or `"paper"` (the published start).',
}


@dataclass(frozen=True)
class Option:
    """One option of a method, or of several under one name.

    Attributes:
        kinds: The types of its values, None left out; empty if the signature does not tell.
        default: The default; None for an option of several methods.
        help: What it means.
    """

    kinds: tuple[Any, ...]
    default: Any
    help: str


def options_of(method: type[Fusion]) -> dict[str, Option]:
    """The options of a class by name: its keyword-only arguments."""
    told = _told_arguments(inspect.getdoc(method) or "")
    hints = typing.get_type_hints(method.__init__)
    return {
        p.name: Option(_kinds(hints.get(p.name)), p.default, told.get(p.name, ""))
        for p in inspect.signature(method).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in GIVEN
    }


def joint_options(methods: Mapping[str, type[Fusion]]) -> dict[str, Option]:
    """The options of all methods: each with the types of all, and the names of the methods before its meaning."""
    joint: dict[str, Option] = {}
    names: dict[str, list[str]] = {}
    for method, cls in methods.items():
        for name, option in options_of(cls).items():
            names.setdefault(name, []).append(f"`{method}`")
            before = joint.setdefault(name, replace(option, default=None, help=SHARED.get(name, option.help)))
            joint[name] = replace(before, kinds=tuple(dict.fromkeys([*before.kinds, *option.kinds])))
    return {name: replace(option, help=f"{', '.join(names[name])}: {option.help}") for name, option in joint.items()}


def _kinds(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return tuple(kind for kind in (typing.get_args(hint) if union else (hint,)) if kind not in (None, type(None)))


def _told_arguments(doc: str) -> dict[str, str]:
    """The section `Args:` of a docstring in Google's form."""
    section = re.search(r"^Args:\n((?: +.*\n?)+)", doc, re.MULTILINE)
    entries = re.split(r"^ {4}(\w+): ", section[1], flags=re.MULTILINE)[1:] if section else []
    return {name: " ".join(text.split()) for name, text in zip(entries[::2], entries[1::2], strict=True)}
