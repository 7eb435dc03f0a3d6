"""A linear map folded into the feed-forward of the block below those that are removed (ReplaceMe, arXiv 2505.02819)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ...backbone.families import parts_of, state_out, with_state_out
from ...backbone.record import recorded, run
from ...states import Source, source_of
from ..moments import Moments
from ..solving import least_squares
from ..stream import Choice, Collator, Rows, batches_of, model_inputs, stream
from .submodules import find_parts

Run = tuple[int, int]  # the number of the first block that is removed, from 1, and how many


@dataclass(frozen=True)
class Fold:
    """What stands for removed blocks: `z_out ~ z_in + D m + c`, with `m` what the feed-forward of the last block below adds to `z_in`.

    Its last matrix takes this in: `W <- W + D W`. That is ReplaceMe's `T = I + D` (equations 4 and 5), of the same least squares.

    Attributes:
        name: That of the layer with the matrix, in the model.
        matrix: `D`, float64 `(d, d)`.
        constant: `c`, float64 `(d,)`; None where the layer has no bias that could take it in.
    """

    name: str
    matrix: Tensor
    constant: Tensor | None

    @torch.no_grad()
    def into(self, model: nn.Module) -> None:
        """Changes the layer; its tensors are new ones, and other holders of the old are left alone."""
        linear: Any = model.get_submodule(self.name)
        weight: Tensor = linear.weight
        wide, matrix = weight.double(), self.matrix.to(weight.device)
        # a Conv1D holds its matrix the other way round
        changed = wide + (wide @ matrix.T if isinstance(linear, Conv1D) else matrix @ wide)
        linear.weight = nn.Parameter(changed.to(weight.dtype), requires_grad=weight.requires_grad)
        if self.constant is not None:
            bias: Tensor = linear.bias
            moved = bias.double() + matrix @ bias.double() + self.constant.to(bias.device)
            linear.bias = nn.Parameter(moved.to(bias.dtype), requires_grad=bias.requires_grad)


def feed_forward_of(source: Source, block: int, name: str | None) -> nn.Module:
    """The feed-forward of block 1 to `L`.

    Args:
        source: The model.
        block: Its number.
        name: What it is called inside of a block; None for families that are known.

    Raises:
        ValueError: If it is not known, or not called so.
    """
    module = source.backbone.blocks[block - 1]
    found = dict(module.named_modules()).get(name or "") if name else (parts_of(module) or {}).get("feed_forward")
    if found is None and name is None:
        return find_parts(source.backbone, block)["feed_forward"]  # says what is known
    if found is None:
        children = ", ".join(n for n, _ in module.named_children())
        raise ValueError(
            f"feed_forward={name!r}: there is no such module in block {block}, which holds {children}. Name one."
        )
    return found


def last_matrix(source: Source, block: int, rows: Rows, collator: Collator, name: str | None) -> tuple[nn.Module, nn.Module]:
    """The feed-forward of a block, and the linear layer in it whose output it answers with.

    A map can be folded there if the block adds that output to its state and does nothing else to it; this is tried out, on one row.

    Raises:
        ValueError: If it is not so.
    """
    feed_forward = feed_forward_of(source, block, name)
    lower = source.backbone.whole.lower(block)
    inputs = model_inputs(source.backbone, [rows[0]], collator)
    outputs: dict[nn.Module, Tensor] = {}
    states: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs[module] = state_out(output)

    def silence(module: nn.Module, args: Any, output: Any) -> Any:
        return with_state_out(output, torch.zeros_like(state_out(output)))

    matrices = [m for m in feed_forward.modules() if type(m) in (nn.Linear, Conv1D)]
    for hooks in ([(m, keep) for m in (*matrices, feed_forward)], [(feed_forward, silence)]):
        handles = [m.register_forward_hook(hook) for m, hook in hooks]
        try:
            with source.quiet(), recorded(lower, [block], lambda _, state: states.append(state.double())):
                run(lower, inputs)
        finally:
            for handle in handles:
                handle.remove()
    added, (state, without) = outputs[feed_forward], states
    rounding = 4 * torch.finfo(added.dtype).eps * state.abs().amax(-1, keepdim=True)
    if not bool(((state - without - added.double()).abs() <= rounding).all()):
        raise ValueError(
            f"A block of a {source.backbone.model_type!r} does not simply add what its feed-forward answers to its state (a norm or a "
            "factor comes between), so no map can be folded into it. Remove the blocks without one, fold=False."
        )
    same = [m for m in matrices if m in outputs and outputs[m].shape == added.shape and torch.equal(outputs[m], added)]
    if not same:
        raise ValueError(
            f"The feed-forward of block {block} ({type(feed_forward).__name__}) does not end with one linear layer (a mixture of "
            "experts?), so no map can be folded into it. Remove the blocks without one, fold=False."
        )
    return feed_forward, same[-1]


def fit_folds(
    model: nn.Module,
    runs: Sequence[Run],
    rows: Rows,
    collator: Collator,
    choice: Choice,
    *,
    ridge: float,
    name: str | None,
    batch_size: int,
    progress: bool,
) -> list[Fold]:
    """Fits the maps that stand for runs of blocks, by least squares, in one pass over rows.

    Raises:
        SingularError: If the equations are singular, see `solve`.
        ValueError: If no map can be folded into the block below a run.
    """
    source = source_of(model)
    names = {module: n for n, module in model.named_modules()}
    below = sorted({first - 1 for first, _ in runs})
    found = {block: last_matrix(source, block, rows, collator, name) for block in below}
    size = source.backbone.hidden_size
    sums = {(first, count): Moments(size, [("added", "added"), ("added", "removed")]) for first, count in runs}
    added: dict[str, Tensor] = {}

    def take(block: str, given: Tensor, answered: Tensor) -> None:
        added[block] = answered

    layers = sorted({layer for first, count in runs for layer in (first - 1, first - 1 + count)})
    parts = {str(block): feed_forward for block, (feed_forward, _) in found.items()}
    chunks: Iterable[Any] = stream(source, rows, layers, collator, choice, batch_size, parts=parts, take_part=take)
    total = len(batches_of(rows, batch_size))
    for chunk in tqdm(chunks, total=total, desc="maps for removed blocks", unit="batch", disable=not progress):
        for (first, count), moments in sums.items():
            removed = chunk.states[first - 1 + count].double() - chunk.states[first - 1].double()
            moments.add({"added": added[str(first - 1)], "removed": removed})
    folds = []
    for (first, count), moments in sums.items():
        bias = found[first - 1][1].bias is not None
        what = f"The map for blocks {first} to {first - 1 + count}"
        matrix, _ = least_squares(moments, ["added"], "removed", what, bias=bias, ridge=ridge)
        constant = moments.mean(["removed"]) - matrix @ moments.mean(["added"]) if bias else None
        folds.append(Fold(names[found[first - 1][1]], matrix, constant))
    return folds
