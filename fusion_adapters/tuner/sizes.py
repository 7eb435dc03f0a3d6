"""Numbers as people write them: of parameters (`1M`, `50k`, `dwatt-paper`, `lora:r=16`), of blocks."""

from __future__ import annotations

import re
from typing import Any

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
DWATT_PAPER = "dwatt-paper"
UNFITTED = "none"
_LORA = re.compile(r"lora:r=([1-9][0-9]*)")


def read_count(text: str) -> int:
    """Reads a number of parameters: `1000000`, `1M`, `2.5M`, `50k`, `1_000`.

    Raises:
        ValueError: If it is none.
    """
    match = re.fullmatch(r"((?:[0-9][0-9_]*|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]+)?)([kmb]?)", text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is not a number of parameters. Write it as 1000000, 1M, 2.5M or 50k.")
    return round(float(re.sub("[_,]", "", match[1])) * UNITS[match[2]])


def lora_rank(budget: int | str) -> int | None:
    """The rank in `lora:r=16`; None for every other budget."""
    match = _LORA.fullmatch(budget.strip()) if isinstance(budget, str) else None
    return int(match[1]) if match else None


def check_budget(budget: Any) -> int | str:
    """Checks the form of a budget, before a model is at hand.

    Returns:
        The budget; a whole float (YAML's 1e6) as an int.

    Raises:
        ValueError: If it is none of the forms; the message lists them.
    """
    if isinstance(budget, str):
        if budget not in (DWATT_PAPER, UNFITTED) and lora_rank(budget) is None:
            try:
                read_count(budget)
            except ValueError as error:
                raise _no_budget(budget) from error
        return budget
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or budget != budget // 1:
        raise _no_budget(budget)
    if budget < 1:
        raise ValueError(f"fusion_budget={budget} must be at least 1.")
    return int(budget)


def check_depth(depth: Any) -> int | float:
    """Checks the form of a number of blocks, before a model is at hand.

    Returns:
        The number; a whole float from 2 on as an int.

    Raises:
        ValueError: If it is neither a whole number from 1 nor a fraction between 0 and 1.
    """
    number = not isinstance(depth, bool) and isinstance(depth, (int, float))
    if number and (0 < depth < 1 or (depth >= 1 and depth == depth // 1 and not (isinstance(depth, float) and depth == 1))):
        return float(depth) if depth < 1 else int(depth)
    if depth == "auto":
        raise ValueError(
            "fusion_depth='auto' is for recipes: `fusion-adapters train` compares depths on development data, and the adapter gets the "
            "number. In a script train several depths, score each on development data, and give FusionConfig the number of blocks; the "
            "layer states of all blocks need to be computed only once (docs/depth.md)."
        )
    raise ValueError(
        f"fusion_depth={depth!r} is no depth. Give a number of blocks from 1 on (6), or a fraction of them between 0 and 1 (0.5); leave "
        "it unset for all blocks."
    )


def read_depth(text: str) -> int | float:
    """Reads a number of blocks or a fraction of them. Raises ValueError if it is none."""
    if text.strip() == "auto":
        raise ValueError(
            "'auto' is chosen on development data, when a recipe is trained, and parameters are counted without any. Give a number of "
            "blocks from 1 on (6), or a fraction between 0 and 1 (0.5)."
        )
    try:
        return check_depth(float(text) if "." in text else int(text))
    except ValueError as error:
        raise ValueError(
            f"{text!r} is no depth. Give a number of blocks from 1 on (6), or a fraction between 0 and 1 (0.5)."
        ) from error


def _no_budget(budget: Any) -> ValueError:
    return ValueError(
        f"fusion_budget={budget!r} is not a budget. Give a whole number of trainable parameters (1000000, '1M', '50k'), "
        f"{DWATT_PAPER!r} (what the paper's DWAtt would train), 'lora:r=16' (what that LoRA would train), or {UNFITTED!r} (the "
        "method's own width, whatever the backbone)."
    )
