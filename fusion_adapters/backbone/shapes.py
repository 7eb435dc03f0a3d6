"""Whether the blocks of a backbone are what a fusion needs: whole blocks, of one width, whose states are `(B, T, d)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .families import STREAMS, UNLIKE, WIDTHS_OF_STAGES, is_norm


def check_blocks(model: nn.Module, blocks: Sequence[nn.Module], hidden_size: int, configs: Sequence[Any]) -> None:
    """Raises ValueError if a fusion over these blocks would fail or be wrong, as far as that shows without a call.

    Args:
        model: The model, for its name.
        blocks: The blocks that were found or named.
        hidden_size: The width by the configuration.
        configs: The configurations of the model and of the stack.
    """
    for config in configs:
        reason = UNLIKE.get(getattr(config, "model_type", None) or "")
        streams = next((n for name in STREAMS if isinstance(n := getattr(config, name, None), int) and n > 1), None)
        if streams:
            reason = f"between its blocks run {streams} streams, (B, T, {streams}, d), which its head mixes into one"
        if reason:
            raise ValueError(_refusal(model, reason))
    for number, block in enumerate(blocks, start=1):
        widths = _widths(block)
        if widths and hidden_size not in widths:
            raise ValueError(
                _refusal(
                    model,
                    f"its blocks, or stages of blocks, differ in width: no norm of block {number} of {len(blocks)} "
                    f"({type(block).__name__}) has the width {hidden_size} (they have {', '.join(map(str, widths))})",
                )
            )


def check_whole(model: nn.Module, base: nn.Module, name: str, lists: Mapping[str, nn.ModuleList]) -> None:
    """Raises ValueError if a list holds parts of blocks: beside it lies one of as many norms, and its own have none.

    Args:
        model: The model, for its name.
        base: The model without its head.
        name: The name of the list inside `base`.
        lists: The lists of modules inside `base`.
    """
    holder, own = name.rpartition(".")[0], lists[name]
    beside = [n for n, m in lists.items() if n.rpartition(".")[0] == holder and len(m) == len(own)]
    whole = any(_is_leaf_norm(m) for m in own[0].modules()) and not _is_leaf_norm(own[0])
    if not whole and any(all(_is_leaf_norm(m) for m in lists[n]) for n in beside):
        raise ValueError(
            _refusal(model, f"its blocks lie in parts in several lists ({', '.join(beside)}), and no module is a whole one")
        )


def widths_of_stages(config: Any) -> list[int]:
    """The widths of a model whose stages differ; empty if the configuration names none."""
    found = next((v for n in WIDTHS_OF_STAGES if isinstance(v := getattr(config, n, None), (list, tuple))), ())
    return list(found)


def refuse_stages(model: nn.Module, widths: Sequence[int]) -> None:
    """Raises ValueError for a model whose stages differ in width."""
    raise ValueError(_refusal(model, f"its stages differ in width ({', '.join(map(str, widths))})"))


def check_state(state: Tensor, hidden_size: int) -> None:
    """Raises ValueError if a layer state is not `(B, T, d)`."""
    if state.dim() != 3 or state.shape[-1] != hidden_size:
        raise ValueError(
            f"A block of the backbone answered with a state of shape {list(state.shape)}, and a fusion needs (batch, positions, "
            f"{hidden_size}), the hidden size last. No fusion attaches to such a backbone; if the blocks were named (fusion_blocks), "
            "name those whose outputs are so."
        )


def _refusal(model: nn.Module, reason: str) -> str:
    return (
        f"No fusion attaches to {type(model).__name__}: {reason}, and a fusion needs one state of the same width after each block, "
        "(batch, positions, hidden size). Choose a backbone of another family (docs/backbones.md), or use LoRA."
    )


def _is_leaf_norm(module: nn.Module) -> bool:
    return is_norm(module) and not any(module.children())  # a block's class may have the word in its name


def _widths(block: nn.Module) -> list[int]:
    """The sizes of a block's norms, one of which every transformer block has at its own width; empty where they have no weights."""
    return sorted({p.shape[0] for m in block.modules() if is_norm(m) for p in m.parameters(recurse=False) if p.dim() == 1})
