"""Linear stand-ins for parts of blocks: attention, feed-forward, norms (arXiv 2303.09435, section 7)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...backbone.blocks import Backbone
from ...backbone.families import NAMES_OF_PARTS, PARTS, cached_positions, parts_of, state_in, state_out, with_state_out
from ...states import Source, source_of
from ..moments import Moments
from ..saving import backbone_of
from ..solving import least_squares
from ..stream import Choice, Collator, Rows, batches_of, stream

# What is replaced at once, by its parts: the paper's mat_attn, mat_ffn and mat_ln1_ln2.
MODES = {"attention": ("attention",), "feed_forward": ("feed_forward",), "norms": ("attention_norm", "feed_forward_norm")}


@dataclass(frozen=True)
class PartOptions:
    """Which parts of blocks get a stand-in, and how it is fitted.

    Attributes:
        modes: Of `attention`, `feed_forward` and `norms`.
        above: Of the blocks above this layer; 0 for all.
        bias: Fit a constant too; the paper has none.
        ridge: See `solve`. Above 0, because what a LayerNorm answers never spans its space.
        names: What the norm before attention, attention, the norm before the feed-forward and the feed-forward are called inside of a
            block, for families that are not known.
        positions: See `Choice`.
        skip: How many positions at the beginning of each row are left out of the fit, and keep the real parts; None for 1 in a causal
            model, else 0.
        seed: Of the draw of positions.
        batch_size: Rows of one call.

    Raises:
        ValueError: If an option cannot be.
    """

    modes: Sequence[str] = tuple(MODES)
    above: int = 0
    bias: bool = True
    ridge: float = 1e-6
    names: Sequence[str] | None = None
    positions: str = "all"
    skip: int | None = None
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        wrong = [m for m in self.modes if m not in MODES]
        if isinstance(self.modes, str) or wrong or not self.modes:
            raise ValueError(f"modes={self.modes!r}: give a list of some of {', '.join(MODES)}.")
        if self.names is not None and (isinstance(self.names, str) or len(self.names) != len(PARTS)):
            raise ValueError(f"names={self.names!r}: give four names inside of a block, for {', '.join(PARTS)}.")
        if not self.ridge >= 0:
            raise ValueError(f"ridge={self.ridge}: it must be 0 or more.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: it must be at least 1.")
        Choice(self.positions, self.skip or 0, self.seed)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that are fitted, as in `PARTS`."""
        return tuple(part for part in PARTS if any(part in MODES[mode] for mode in self.modes))


class StandIn(nn.Module):
    """`y ~ A x + b`, from what goes into a part to what comes out of it at the same position.

    Args:
        matrix: `(d, d)`.
        bias: `(d,)`; None for no constant.
    """

    def __init__(self, matrix: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(matrix, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d)`, in the dtype of what is given."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


class PartSet(nn.Module):
    """Stand-ins for parts of the blocks of one backbone.

    Args:
        maps: By the number of the block, from 1, and the name of the part, see `PARTS`.
        num_layers: The number of blocks `L`.
        skip: How many positions at the beginning keep the real parts.
        names: See `PartOptions`.
    """

    def __init__(
        self, maps: Mapping[tuple[int, str], StandIn], num_layers: int, skip: int, names: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self.num_layers, self.skip, self.names = num_layers, skip, names
        self.maps = nn.ModuleDict({f"{block} {part}": each for (block, part), each in maps.items()})

    def get(self, block: int, part: str) -> StandIn:
        """The stand-in for a part of block 1 to `L`.

        Raises:
            ValueError: If it was not fitted.
        """
        if f"{block} {part}" not in self.maps:
            raise ValueError(
                f"There is no stand-in for {part} of block {block}; there are: {', '.join(self.maps)}. Fit it (PartOptions)."
            )
        return self.maps[f"{block} {part}"]  # type: ignore[return-value]

    @property
    def modes(self) -> list[str]:
        """What can be replaced."""
        there = {name.partition(" ")[2] for name in self.maps}
        return [mode for mode, parts in MODES.items() if there.issuperset(parts)]

    @contextlib.contextmanager
    def replacing(self, model: nn.Module | Backbone, mode: str, above: int) -> Iterator[None]:
        """In the body, stand-ins answer for a part of every block above a layer; norms and residuals around them stay real.

        The first positions, which the fit left out, keep the real part: it runs all the same, so this shows what a stand-in would do
        and saves no time. Works with a KV cache too.

        Args:
            model: The model that they were fitted on.
            mode: One of `modes`.
            above: The last layer that is real; 0 for none.

        Raises:
            ValueError: If there is no such mode, or the model is another.
        """
        backbone = model if isinstance(model, Backbone) else backbone_of(model).whole
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: choose one of {', '.join(self.modes)}.")
        if backbone.num_layers != self.num_layers:
            raise ValueError(
                f"The stand-ins are for a backbone of {self.num_layers} blocks, and this one has {backbone.num_layers}. Give the model "
                "that they were fitted on."
            )
        seen = 0  # positions in the cache

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal seen
            seen = cached_positions(kwargs)

        def answer(stand_in: StandIn, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            kept = max(self.skip - seen, 0)
            real, cast = state_out(output), stand_in(state_in(args, kwargs))  # (B, T, d)
            return with_state_out(output, torch.cat([real[:, :kept], cast[:, kept:].to(real.dtype)], dim=1))

        parts = [(n, part) for n in range(above + 1, self.num_layers + 1) for part in MODES[mode]]
        hooks = [(find_parts(backbone, n, self.names)[p], functools.partial(answer, self.get(n, p))) for n, p in parts]
        handles = [backbone.base.register_forward_pre_hook(begin, with_kwargs=True)]
        handles += [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def find_parts(backbone: Backbone, block: int, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The parts of block 1 to `L` by their names in `PARTS`.

    Raises:
        ValueError: If they are not known, or are not called so.
    """
    module = backbone.blocks[block - 1]
    inside = dict(module.named_modules())
    found = parts_of(module)
    if names is not None:
        found = {part: inside[name] for part, name in zip(PARTS, names, strict=True) if name in inside}
    if found is None or len(found) < len(PARTS):
        children = ", ".join(name for name, _ in module.named_children())
        raise ValueError(
            f"The parts of block {block} of a {backbone.model_type!r} are not known: it holds {children}"
            + (f", and not all of {', '.join(names)}" if names is not None else "")
            + f". Blocks are known that hold {'; or '.join(', '.join(known) for known in NAMES_OF_PARTS)}. Name four modules inside of a "
            f"block, names=[...], for {', '.join(PARTS)}: each must answer with as many values as it is given."
        )
    return found


def fit_parts(
    model: nn.Module | Source,
    rows: Rows,
    collator: Collator,
    options: PartOptions | None = None,
    *,
    progress: bool = True,
) -> PartSet:
    """Fits stand-ins for parts of blocks in one pass over rows, from each part's true input to its true output.

    The sums take `2 x 8 d^2` bytes of memory for each part of each block (SmolLM2-135M, all: 640 MB); fit fewer `modes` at a time, or
    the blocks `above` a layer, where that is too much.

    Args:
        model: A transformers model.
        rows: Tokenised rows.
        collator: Pads them on the right.
        options: Which and how.
        progress: Show a bar.

    Raises:
        SingularError: If the equations are singular, see `solve`.
        ValueError: If the parts of the blocks are not known, or a part answers in another width, or a value is not finite.
    """
    options = options or PartOptions()
    source = source_of(model).whole
    backbone = source.backbone
    if not 0 <= options.above < backbone.num_layers:
        raise ValueError(
            f"above={options.above}: stand-ins are for blocks above a layer from 0 (all of them) to {backbone.num_layers - 1}."
        )
    skip = int(backbone.causal) if options.skip is None else options.skip
    keys = [(n, part) for n in range(options.above + 1, backbone.num_layers + 1) for part in options.parts]
    found = {f"{n} {part}": find_parts(backbone, n, options.names)[part] for n, part in keys}
    moments = {name: Moments(backbone.hidden_size, [("in", "in"), ("in", "out")]) for name in found}

    def take(name: str, given: Tensor, answered: Tensor) -> None:
        if answered.shape[-1] != backbone.hidden_size or given.shape[-1] != backbone.hidden_size:
            raise ValueError(
                f"Part {name.partition(' ')[2]} of block {name.partition(' ')[0]} is given {given.shape[-1]} values and answers with "
                f"{answered.shape[-1]}, where the hidden size is {backbone.hidden_size}. Name other modules, names=[...]."
            )
        moments[name].add({"in": given, "out": answered})

    choice = Choice(options.positions, skip, options.seed)
    chunks = stream(source, rows, [], collator, choice, options.batch_size, parts=found, take_part=take)
    total = len(batches_of(rows, options.batch_size))
    for _ in tqdm(chunks, total=total, desc="parts of blocks", unit="batch", disable=not progress):
        pass
    maps = {}
    for n, part in tqdm(keys, desc="solving", unit="map", disable=not progress):
        sums, what = moments.pop(f"{n} {part}"), f"The stand-in for {part} of block {n}"
        matrix, _ = least_squares(sums, ["in"], "out", what, bias=options.bias, ridge=options.ridge)
        bias = sums.mean(["out"]) - matrix @ sums.mean(["in"]) if options.bias else None
        maps[n, part] = StandIn(matrix.float().contiguous(), None if bias is None else bias.float())
    return PartSet(maps, backbone.num_layers, skip, options.names).to(backbone.device)
