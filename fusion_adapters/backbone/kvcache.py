"""KV caches that not all blocks have written: under `fusion_depth` the blocks above leave nothing in them, nor can they later."""

from __future__ import annotations

from typing import Any

from transformers import Cache

from .families import CACHES, positions_in

_MARK = "_fusion_adapters_written"  # on a cache: how many of the blocks have written all of it


def note_skipped(args: tuple[Any, ...], kwargs: dict[str, Any], depth: int) -> None:
    """Notes on the cache among a block's arguments that the first `depth` blocks alone write this call's positions.

    On the cache itself, which knows no lengths of linear attention and state spaces; a copy of it has the note, too.
    """
    for cache in (*(a for a in args if hasattr(a, "get_seq_length")), *(kwargs.get(name) for name in CACHES)):
        if hasattr(cache, "__dict__") and (getattr(cache, _MARK, None) or depth) >= depth:
            setattr(cache, _MARK, depth)


def check_written(named: dict[str, Any], runs: int, blocks: int) -> None:
    """Raises ValueError if a cache among a backbone's arguments lacks positions that blocks of this call are to read.

    Args:
        named: The arguments by name.
        runs: How many blocks run in this call.
        blocks: How many there are.
    """
    for name in CACHES:
        cache = named.get(name)
        written = getattr(cache, _MARK, None)
        if written is None or written >= runs:
            continue
        count = positions_in(cache)
        if not count and isinstance(cache, Cache):  # emptied, for another text
            setattr(cache, _MARK, None)
            continue
        raise ValueError(
            f"{name} was written in a call of an adapter with fusion_depth={written}, under which the blocks above do not run, and this "
            f"call runs {runs} of the {blocks} blocks: those above {written} would not see "
            f"{f'all of the {count} positions' if count > 1 else 'the positions'} in it. Give the whole text without {name}, or go on "
            f"with an adapter whose fusion_depth is at most {written}."
        )
