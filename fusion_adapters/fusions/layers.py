"""Which layer states a fusion reads, as people write it: a list of them, `every:4`, `last:8`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_RULE = re.compile(r"(every|last):([1-9][0-9]*)")


def read_layers(layers: Any) -> list[int] | str:
    """Checks the form of a choice of layers, before a backbone is at hand.

    Args:
        layers: A list of indices; `"every:4"` for the last block and each fourth below it; or `"last:8"` for the last eight blocks.

    Returns:
        The list, of ints; or the rule.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(layers, str) and _RULE.fullmatch(layers.strip()):
        return layers.strip()
    if isinstance(layers, str) or not isinstance(layers, (list, tuple, range)):
        raise ValueError(
            f"fusion_layers={layers!r} is no choice of layers. Give a list of layers, for example [1, 2, 3] (negatives count from the "
            "end), 'every:4' (the last block and each fourth below it) or 'last:8' (the last eight blocks)."
        )
    return [int(i) for i in layers]


def resolve_layers(layers: Sequence[int] | str | None, num_layers: int) -> tuple[int, ...]:
    """Turns a choice of layers into ascending indices of the states `z_0 .. z_L`.

    Args:
        layers: Indices into the `L + 1` states, negatives count from the end (`-1` is `z_L`); or a rule, see `read_layers`; None
            means `1 .. L`.
        num_layers: The number of blocks `L`.

    Raises:
        ValueError: If the choice is empty, names a state twice, or names one that does not exist.
    """
    if layers is None:
        return tuple(range(1, num_layers + 1))
    if isinstance(layers, str):
        return _by_rule(layers, num_layers)
    count = num_layers + 1
    wrong = [i for i in layers if not -count <= i < count]
    if wrong:
        raise ValueError(
            f"fusion_layers={list(layers)}: {wrong} out of range. A backbone of {num_layers} blocks has the layer "
            f"states 0 (embeddings) to {num_layers} (last block), or {-count} to -1 from the end. Choose among these."
        )
    resolved = sorted(i % count for i in layers)
    if len(set(resolved)) != len(resolved) or not resolved:
        raise ValueError(
            f"fusion_layers={list(layers)} means the layer states {resolved}: name at least one state, and each "
            "only once (a negative index counts from the end, -1 is the last block)."
        )
    return tuple(resolved)


def _by_rule(rule: str, num_layers: int) -> tuple[int, ...]:
    match = _RULE.fullmatch(str(read_layers(rule)))
    assert match is not None
    number = int(match[2])
    if number > num_layers:
        raise ValueError(
            f"fusion_layers={rule!r}, and there are {num_layers} blocks. Choose a number from 1 to {num_layers}, or list the layers."
        )
    if match[1] == "last":
        return tuple(range(num_layers - number + 1, num_layers + 1))
    return tuple(range(num_layers, 0, -number))[::-1]
