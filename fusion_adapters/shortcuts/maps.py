"""Linear shortcuts: one matrix casts the layer states of a position to that of a later layer (arXiv 2303.09435)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone.shortcut_files import map_name

IDENTITY, MAT, FUSED = "identity", "mat", "fused"


class Shortcut(nn.Module):
    """`z_j ~ A [z_i1; ..; z_ik] + b`: with one source the paper's `mat`, with several a fused shortcut, without a matrix the identity.

    With `rank` r the matrix is kept as two factors, `A = U D`, `(d, r)` and `(r, k d)`.

    Args:
        hidden_size: The width `d`.
        sources: The layers whose states are read, ascending; the last is the one to cast from.
        target: The layer that is stood in for, above all sources.
        rank: The rank of the matrix; None for a whole one.
        bias: Whether a constant is added.
        kind: A name to tell apart shortcuts of the same layers: `mat`, `fused`, `identity`, or another.

    Raises:
        ValueError: If the layers are not ascending, or the target is not above them, or the rank is not below the width.
    """

    def __init__(
        self,
        hidden_size: int,
        sources: Sequence[int],
        target: int,
        *,
        rank: int | None = None,
        bias: bool = False,
        kind: str | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.sources, self.target = hidden_size, tuple(int(s) for s in sources), int(target)
        self.rank, self.kind = rank, kind or (FUSED if len(self.sources) > 1 else MAT)
        if "." in self.kind or not self.kind.strip():
            raise ValueError(
                f"kind={self.kind!r}: the name of a kind of shortcuts is a word or more, without a dot. Choose another."
            )
        if not self.sources or list(self.sources) != sorted(set(self.sources)) or self.sources[0] < 0:
            raise ValueError(f"The sources {list(self.sources)} of a shortcut must be layers in ascending order, each once.")
        if self.sources[-1] >= self.target:
            raise ValueError(
                f"A shortcut casts to a later layer, and layer {self.target} is not above its sources {list(self.sources)}. Choose a "
                f"target above {self.sources[-1]}."
            )
        if rank is not None and not 0 < rank < hidden_size:
            raise ValueError(
                f"rank={rank}: a shortcut of {hidden_size} dimensions has a whole matrix, or factors of a rank from 1 to "
                f"{hidden_size - 1}. Leave rank unset for the whole one."
            )
        width = hidden_size * len(self.sources)
        self.register_parameter("weight", None)
        self.register_parameter("up", None)
        self.register_parameter("down", None)
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(hidden_size)) if bias else None
        if self.kind != IDENTITY and rank is None:
            self.weight = nn.Parameter(torch.zeros(hidden_size, width))
        elif self.kind != IDENTITY:
            self.up, self.down = (
                nn.Parameter(torch.zeros(hidden_size, rank or 0)),
                nn.Parameter(torch.zeros(rank or 0, width)),
            )
        self.requires_grad_(False)

    @property
    def source(self) -> int:
        """The layer that is cast from, the highest of the sources."""
        return self.sources[-1]

    def forward(self, states: Mapping[int, Tensor]) -> Tensor:
        """Casts layer states.

        Args:
            states: `(..., d)` by layer number, those of the sources among them.

        Returns:
            What stands for the state of the target, `(..., d)`, in the dtype of the last source.
        """
        if self.kind == IDENTITY:
            return states[self.source]
        given = [states[layer] for layer in self.sources]
        x = given[0] if len(given) == 1 else torch.cat(given, dim=-1)  # (..., k d)
        first = self.weight if self.weight is not None else self.down
        x = x.to(first.dtype)
        x = (
            F.linear(x, self.weight, self.bias)
            if self.rank is None
            else F.linear(F.linear(x, self.down), self.up, self.bias)
        )
        return x.to(given[-1].dtype)

    def extra_repr(self) -> str:
        """Shown in the model's print-out."""
        rank = "" if self.rank is None else f", rank {self.rank}"
        return f"{self.kind}: {list(self.sources)} -> {self.target}, d={self.hidden_size}{rank}"


def identity(hidden_size: int, source: int, target: int) -> Shortcut:
    """The state as it is, the baseline of the paper (`id`): what the logit lens shows."""
    return Shortcut(hidden_size, [source], target, kind=IDENTITY)


class ShortcutSet(nn.Module):
    """Shortcuts of one backbone, by kind, source and target.

    Args:
        shortcuts: Any number of them, of one width; no two of the same kind, source and target.
        hidden_size: The width `d`.
        num_layers: The number of blocks `L` of the backbone.
    """

    def __init__(self, shortcuts: Sequence[Shortcut], hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.maps = nn.ModuleDict()
        for shortcut in shortcuts:
            self.add(shortcut)

    def add(self, shortcut: Shortcut) -> None:
        """Adds a shortcut; one of its kind, source and target that is there gives way."""
        if shortcut.hidden_size != self.hidden_size or shortcut.target > self.num_layers:
            raise ValueError(
                f"A shortcut from {list(shortcut.sources)} to {shortcut.target} of width {shortcut.hidden_size} is none of a backbone of "
                f"{self.num_layers} blocks of width {self.hidden_size}."
            )
        self.maps[map_name(shortcut.kind, shortcut.source, shortcut.target)] = shortcut

    def __iter__(self) -> Iterator[Shortcut]:
        yield from self.maps.values()  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.maps)

    def get(self, source: int, target: int | None = None, kind: str = MAT) -> Shortcut:
        """The shortcut from a layer, to the last one where no target is named.

        Raises:
            ValueError: If there is none; the message says which there are.
        """
        target = self.num_layers if target is None else target
        if kind == IDENTITY:
            return identity(self.hidden_size, source, target)
        name = map_name(kind, source, target)
        if name not in self.maps:
            there = sorted(s.source for s in self if (s.kind, s.target) == (kind, target))
            kinds = sorted({s.kind for s in self})
            raise ValueError(
                f"There is no {kind!r} shortcut from layer {source} to layer {target}. "
                + (f"To that layer there are some from: {', '.join(map(str, there))}. " if there else "")
                + f"The kinds here are: {', '.join(kinds) or 'none'}. Choose among these, or fit it."
            )
        return self.maps[name]  # type: ignore[return-value]

    def kinds(self, target: int | None = None) -> list[str]:
        """The kinds of shortcuts to a layer, by default the last, in the order in which they were added."""
        target = self.num_layers if target is None else target
        return list(dict.fromkeys(s.kind for s in self if s.target == target))

    def sources(self, target: int | None = None, kind: str = MAT) -> list[int]:
        """The layers from which shortcuts of a kind go to a layer, by default the last, ascending."""
        target = self.num_layers if target is None else target
        return sorted(s.source for s in self if (s.kind, s.target) == (kind, target))
