"""Least squares from moments: the matrix of a shortcut, whole or of low rank, with or without ridge and bias."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .maps import Shortcut
from .moments import Key, Moments

# A share of the variance below this is the rounding of float32 states alone, 2^-48 in each and some more in sums.
ROUNDING = 1e-12
STEPS = 4  # of inverse iteration: each shrinks what is no null direction by a hundred at least


class SingularError(ValueError):
    """Raised where least squares have no one solution."""


def solve(
    moments: Moments[int],
    sources: Sequence[int],
    target: int,
    *,
    bias: bool = True,
    ridge: float = 0.0,
    rank: int | None = None,
    kind: str | None = None,
) -> Shortcut:
    """The shortcut with the least squared error over the positions that the moments were summed over.

    A layer norm at the end of a block (BERT and its like) leaves the state in one dimension less, up to the rounding of float32.
    That direction, one a source, is left out (weight 0): a least-squares weight there is some ten thousand times as large as others
    (all-MiniLM-L6-v2: 14,000), fits rounding, and would blow up that of another dtype.

    Args:
        moments: Sums, of the pairs `pairs_of(sources, target)` at least.
        sources: The layers that are read, ascending.
        target: The layer that is stood in for.
        bias: Fit a constant too.
        ridge: Adds `ridge` times the mean square of a source's values, times the number of positions, to the diagonal of its part: the
            same for states of any size. scikit-learn's `Ridge(alpha=ridge * n)` on states of mean square 1.
        rank: Keep the `rank` directions of the fitted values that explain most of them (reduced-rank regression).
        kind: The name of the result, see `Shortcut`.

    Raises:
        SingularError: If the matrix of the equations is singular in more directions than these, and `ridge` is 0.
        ValueError: If there are no positions.
    """
    size, sources = moments.hidden_size, tuple(sources)
    what = f"The shortcut from {list(sources)} to {target}"
    matrix, gram = least_squares(moments, sources, target, what, bias=bias, ridge=ridge)
    shortcut = Shortcut(size, sources, target, rank=rank, bias=bias, kind=kind)
    if rank is None:
        shortcut.weight.data = matrix.float().contiguous()
    else:
        explained = matrix @ (gram @ matrix.T)  # (d, d), of the fitted values
        _, vectors = torch.linalg.eigh((explained + explained.T) / 2)
        top = vectors[:, -rank:]  # (d, r)
        shortcut.up.data = top.float().contiguous()
        shortcut.down.data = (top.T @ matrix).float().contiguous()
        matrix = top @ (top.T @ matrix)
    if shortcut.bias is not None:
        shortcut.bias.data = (moments.mean([target]) - matrix @ moments.mean(sources)).float()
    return shortcut


def least_squares(
    moments: Moments[Key], sources: Sequence[Key], target: Key, what: str, *, bias: bool, ridge: float
) -> tuple[Tensor, Tensor]:
    """The matrix of `solve`, of any vectors that have moments.

    Args:
        moments: Sums.
        sources: What is read.
        target: What is stood in for.
        what: The beginning of messages: what is fitted.
        bias: See `solve`; the constant is `mean of the target - matrix @ mean of the sources`.
        ridge: See there.

    Returns:
        The matrix, float64 `(d, k d)`, and that of the equations, `(k d, k d)`, with the ridge.

    Raises:
        SingularError: See `solve`.
        ValueError: See there.
    """
    size, width = moments.hidden_size, moments.hidden_size * len(sources)
    if moments.count == 0:
        raise ValueError(
            "There is no position to fit a shortcut to. Give rows that are longer than what is left out of them."
        )
    if moments.count < width + bias:
        warnings.warn(
            f"{what} has {width:,} inputs and is fitted to {moments.count:,} positions: it will repeat these and fail on others. Give at "
            f"least {4 * width:,} positions, or ridge (1e-3, say){', or fewer sources' if len(sources) > 1 else ''}.",
            stacklevel=3,
        )
    gram = moments.product(sources, sources, centred=bias)  # (k d, k d)
    cross = moments.product(sources, [target], centred=bias)  # (k d, d)
    if ridge:
        diagonal = gram.diagonal()
        mean_squares = diagonal.unflatten(0, (len(sources), size)).mean(dim=1)  # times the number of positions
        gram = gram + torch.diag((ridge * mean_squares).repeat_interleave(size))
    squares = moments.squares(sources)
    return _solved(gram, cross, squares, what, len(sources), ridge, moments.count).T, gram


def _solved(gram: Tensor, cross: Tensor, squares: Tensor, what: str, sources: int, ridge: float, count: int) -> Tensor:
    """`gram^-1 cross` by Cholesky of the matrix with a unit diagonal, refined once; the states' channels differ by orders of size."""
    diagonal = gram.diagonal()  # (k d,)
    # with a ridge what never varies has a solution, and the ridge keeps it from fitting rounding
    varies = diagonal > (0 if ridge else ROUNDING * squares)
    dead = int((~varies).sum())
    scale = diagonal.where(varies, torch.ones_like(diagonal)).sqrt()
    unit = gram / scale[:, None] / scale[None, :]
    right = cross / scale[:, None]
    factor, failed = torch.linalg.cholesky_ex(unit)
    null = unit[:, :0]
    if not dead and (int(failed) or float(factor.diagonal().min()) ** 2 < ROUNDING * len(unit)):
        null = _null_directions(unit, sources + 1)
        unit = unit + null @ null.T
        right = right - null @ (null.T @ right)
        factor, failed = torch.linalg.cholesky_ex(unit)
    if dead or int(failed) or null.shape[1] > sources:
        raise SingularError(
            f"{what} has no one solution by least squares: over {count:,} positions what it reads spans fewer than its {len(gram):,} "
            "dimensions"
            + (f" ({dead} of them never vary)" if dead else "")
            + f". Give ridge (1e-4, say; now {ridge:g}), more positions, or fewer sources."
        )
    found = torch.cholesky_solve(right, factor)
    found = found + torch.cholesky_solve(right - unit @ found, factor)
    return (found - null @ (null.T @ found)) / scale[:, None]


def _null_directions(unit: Tensor, most: int) -> Tensor:
    """The directions in which a matrix of unit diagonal is rounding alone, at most so many, orthonormal, `(k d, n)`."""
    most = min(most, len(unit))
    factor, failed = torch.linalg.cholesky_ex(unit + ROUNDING * torch.eye(len(unit), dtype=unit.dtype))
    if int(failed):
        return unit[:, :0]
    found = torch.randn(len(unit), most, dtype=unit.dtype, generator=torch.Generator().manual_seed(0))
    for _ in range(STEPS):  # inverse iteration
        found = torch.linalg.qr(torch.cholesky_solve(found, factor)).Q
    values, vectors = torch.linalg.eigh(found.T @ unit @ found)
    return found @ vectors[:, values < ROUNDING]
