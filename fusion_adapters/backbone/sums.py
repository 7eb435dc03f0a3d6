"""Two sums over a sample of each tensor of a checkpoint, which tell one checkpoint from another and survive casts."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

SMALL = 2048  # values of a tensor (a norm, a bias) that is read whole
SAMPLE = 256  # values that stand for a larger one; every row of the word embeddings gives one of its own
ROWS = 1024  # of the word embeddings in one sum: rows that come with new tokens leave the other sums as they were
PRIME = 2**31 - 1
# Of a sample's norm. A cast to bf16 moves a weight by up to 2^-9 of its size; the order of a sum moves it by some 2^-20.
CAST, EXACT = 2.0**-8, 2.0**-14
SMALLEST_STEP = 2.0**-24  # between numbers of float16 near zero
NARROW = (("b", torch.bfloat16), ("h", torch.float16))


class Sum(NamedTuple):  # hundreds of them at each attaching, for which a dataclass takes several times as long
    """What is kept of a tensor.

    Attributes:
        before: Whether the tensor runs before or in the blocks.
        precision: That of the values, whatever they are stored in: `b` if bfloat16 holds them, else `h` if float16 does, else `f`.
        size: How many values the tensor has.
        weighted: The sum over the sample, each value times a number of its own.
        norm: The sample's norm.
    """

    before: bool
    precision: str
    size: int
    weighted: float
    norm: float

    def differs(self, other: Sum) -> bool:
        """Whether two sums are of different values, by more than the rounding to 16 bits explains."""
        if self.size != other.size:
            return True
        allowed = EXACT * max(self.norm, other.norm)
        if self.precision != other.precision:
            allowed = CAST * max(self.norm, other.norm) + SMALLEST_STEP * min(self.size, SMALL) ** 0.5
        far = max(abs(self.weighted - other.weighted), abs(self.norm - other.norm))
        return not far <= allowed

    def text(self) -> str:
        """The sum in a few characters."""
        return f"{'ud'[not self.before]}{self.precision}{self.size:x}:{struct.pack('<2f', self.weighted, self.norm).hex()}"

    @classmethod
    def parsed(cls, text: str) -> Sum:
        """The sum that `text` gave; ValueError or struct.error for another text."""
        head, _, data = text.partition(":")
        weighted, norm = struct.unpack("<2f", bytes.fromhex(data))
        if head[0] not in "ud" or head[1] not in "bhf":
            raise ValueError(text)
        return cls(head[0] == "u", head[1], int(head[2:], 16), weighted, norm)


class Sums:
    """Collects samples of many tensors, and sums them all at once: a hundred small operations would take longer than the reading."""

    def __init__(self) -> None:
        self._parts: list[tuple[str, int, bool]] = []  # name, values, before
        self._samples: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}

    def add(self, name: str, value: Tensor, before: bool, is_words: bool) -> None:
        """Samples a tensor of any shape; of word embeddings `(V, d)`, one value of each row."""
        for part, count, sample in (
            _parts(name, value) if is_words and value.dim() == 2 else ((name, value.numel(), _sample(value)),)
        ):
            self._samples.setdefault((sample.device, sample.dtype), []).append((len(self._parts), sample))
            self._parts.append((part, count, before))

    def all(self) -> dict[str, Sum]:
        """The sums of all tensors, by name."""
        found: dict[int, Sum] = {}
        for samples in self._samples.values():
            values = torch.cat([sample for _, sample in samples]).float().cpu()
            if not bool(values.sum().isfinite()):
                values = values.nan_to_num(0, 0, 0)
            lengths = [len(sample) for _, sample in samples]
            starts = np.cumsum([0, *lengths[:-1]])
            precisions = np.full(len(samples), "f")
            for letter, dtype in reversed(NARROW):
                precisions[np.logical_and.reduceat((values.to(dtype).float() == values).numpy(), starts)] = letter
            wide = values.double().numpy()
            weights = np.concatenate([_weights()[:length] for length in lengths])
            weighted = np.add.reduceat(wide * weights, starts)
            norms = np.sqrt(np.add.reduceat(wide * wide, starts))
            columns = (precisions.tolist(), weighted.tolist(), norms.tolist())
            for (part, _), precision, total, norm in zip(samples, *columns, strict=True):
                _, count, before = self._parts[part]
                found[part] = Sum(before, precision, count, total, norm)
        return {name: found[i] for i, (name, _, _) in enumerate(self._parts)}


def _sample(value: Tensor) -> Tensor:
    """All values of a small tensor; at most `SAMPLE` of a larger one, at equal distances."""
    if value.numel() <= SMALL:
        return value.reshape(-1)
    # A step that shares no factor with the row's length walks through all columns; next to a multiple of it, along a diagonal,
    # which is the same in the transposed matrix.
    step, length = -(-value.numel() // SAMPLE), value.numel() // len(value)
    while length > 6 and (
        math.gcd(step, length) > 1 or step % length in (1, length - 1)
    ):  # every such length has other steps
        step += 1
    if type(value) not in (Tensor, nn.Parameter) or not value.is_contiguous():
        return value.reshape(-1)[::step]
    return value.as_strided((-(-value.numel() // step),), (step,), value.storage_offset())


def _parts(name: str, words: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """Parts of word embeddings `(V, d)`, each with the number of its values and one value of each row `(rows,)`."""
    for i, first in enumerate(range(0, len(words), ROWS)):
        rows = words[first : first + ROWS]
        yield f"{name}[{first}:{first + len(rows)}]", rows.numel(), rows[:, (37 * i) % rows.shape[1]]


@lru_cache(maxsize=1)
def _weights() -> Any:
    """Numbers between -1 and 1 without a pattern, the same everywhere: squares modulo a prime, `(SMALL,)` float64."""
    i = np.arange(1, SMALL + 1, dtype=np.int64)
    residues = (i * i % PRIME) * 48271 % PRIME
    return (residues * residues % PRIME) / PRIME * 2 - 1
