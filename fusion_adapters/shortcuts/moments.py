"""Sums of products of layer states, from which shortcuts are solved: their size does not depend on the number of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", int, str)  # a layer by its number, or another vector of a position by its name


class Moments(Generic[Key]):
    """`n`, `sum z_i` and `sum z_i z_j^T` in float64, for pairs of layers, or of other vectors that have names.

    Args:
        hidden_size: The width `d`, of all of them.
        pairs: Pairs of layers `(i, j)`, in any order; each is kept once.
    """

    def __init__(self, hidden_size: int, pairs: Iterable[tuple[Key, Key]]) -> None:
        self.hidden_size = hidden_size
        self.count = 0
        self.products: dict[tuple[Key, Key], Tensor] = {
            pair: torch.zeros(hidden_size, hidden_size, dtype=torch.float64) for pair in sorted({_up(*p) for p in pairs})
        }
        self.layers: list[Key] = sorted({layer for pair in self.products for layer in pair})
        self.sums: dict[Key, Tensor] = {layer: torch.zeros(hidden_size, dtype=torch.float64) for layer in self.layers}

    @property
    def bytes(self) -> int:
        """Of memory."""
        return sum(8 * t.numel() for t in (*self.products.values(), *self.sums.values()))

    def add(self, states: Mapping[Key, Tensor]) -> None:
        """Takes in the states `(n, d)` of the same `n` positions, by layer.

        Raises:
            ValueError: If a value is not finite.
        """
        wide = {layer: states[layer].to(torch.float64) for layer in self.layers}  # (n, d)
        for layer, state in wide.items():
            if not bool(state.isfinite().all()):
                bad = int((~state.isfinite().all(dim=-1)).sum())
                what = f"layer {layer}" if isinstance(layer, int) else layer
                raise ValueError(
                    f"{bad} of {len(state)} states of {what} hold values that are not finite (NaN or infinite), so no shortcut can "
                    "be fitted to them. Load the backbone in float32 or bfloat16 (float16 overflows in some models), and check its weights."
                )
        self.count += len(wide[self.layers[0]])
        for layer, total in self.sums.items():
            self.sums[layer] = total.to(wide[layer].device) + wide[layer].sum(0)
        for (i, j), total in self.products.items():
            self.products[i, j] = torch.addmm(total.to(wide[i].device), wide[i].T, wide[j])

    def mean(self, layers: Sequence[Key]) -> Tensor:
        """The mean of states side by side, `(k d,)`."""
        return torch.cat([self.sums[layer] for layer in layers]).cpu() / max(self.count, 1)

    def squares(self, layers: Sequence[Key]) -> Tensor:
        """`sum z^2` of each value of states side by side, `(k d,)`."""
        return torch.cat([self._block(layer, layer).diagonal() for layer in layers])

    def product(self, rows: Sequence[Key], columns: Sequence[Key], centred: bool) -> Tensor:
        """`sum x y^T` of states side by side, `(k d, m d)`; about their means if `centred`."""
        found = torch.cat([torch.cat([self._block(i, j) for j in columns], dim=1) for i in rows])
        return found - self.count * torch.outer(self.mean(rows), self.mean(columns)) if centred else found

    def _block(self, i: Key, j: Key) -> Tensor:
        return (self.products[i, j] if i <= j else self.products[j, i].T).cpu()

    def tensors(self) -> dict[str, Tensor]:
        """All of it, for a file."""
        found = {f"sum {i}": t.cpu() for i, t in self.sums.items()}
        found |= {f"product {i} {j}": t.cpu().contiguous() for (i, j), t in self.products.items()}
        return {**found, "count": torch.tensor(self.count)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `tensors` gave."""
        self.count = int(tensors["count"])
        self.sums = {i: tensors[f"sum {i}"] for i in self.sums}
        self.products = {(i, j): tensors[f"product {i} {j}"] for i, j in self.products}


def pairs_of(sources: Sequence[int], target: int) -> list[tuple[int, int]]:
    """The pairs of layers whose products a shortcut is solved from."""
    return [(i, j) for i in sources for j in (*sources, target) if i <= j]


def _up(i: Key, j: Key) -> tuple[Key, Key]:
    return (i, j) if i <= j else (j, i)
