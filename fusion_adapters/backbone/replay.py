"""Layer states that were computed earlier: what stands for the blocks of a call, and the fusion from there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Required, TypedDict

import torch
from torch import Tensor, nn

from ..fusions import Context
from .families import state_in, with_state_out
from .fuse import Fuse

_LOCK = threading.Lock()  # held while blocks get a stand-in or lose it


class LayerStates(TypedDict, total=False):
    """What a batch brings as `layer_states`, in the place of a run of the blocks; a dict, which `Trainer` can move.

    Attributes:
        states: `(N, tokens, d)`, without padding: the layers that the fusion reads, ascending, and `z_L` last.
        positions: int64 `(tokens,)`, the place of each token in the padded batch `(B, T)`, counted along rows.
        layers: The numbers of these layers.
        kept: `"all"` positions, or which alone are there, see `CachedDataset`; or `"means"`, a mean over the positions of each text, in
            the place of its last token.
        adapters: Those that were active inside the backbone when the states were computed, see `adapters_in_use`.
    """

    states: Required[Tensor]
    positions: Required[Tensor]
    layers: tuple[int, ...]
    kept: str
    adapters: str


@dataclass
class GivenStates:
    """Of `LayerStates`, what the computation needs, checked.

    Attributes:
        states: `(N, tokens, d)`, see `LayerStates`.
        positions: `(tokens,)`, likewise.
        layers: The numbers of these layers; None if unknown.
        means: Whether there is one state for each text, a mean over its positions.
    """

    states: Tensor
    positions: Tensor
    layers: tuple[int, ...] | None = None
    means: bool = False


@dataclass
class FusedState:
    """What stands for the blocks and the fusion of a call: the fused state `(B, T, d)` itself, from another call on the same texts."""

    state: Tensor


class StandIns:
    """Takes the place of the blocks' own `forward` as long as some thread has a call with given states under way.

    Args:
        blocks: The blocks.
        wanted: Whether the call that is under way in this thread has given states; else the blocks run.
    """

    def __init__(self, blocks: Sequence[nn.Module], wanted: Callable[[], bool]) -> None:
        self.wanted = wanted
        self.answers: dict[type, Any] = {}  # how each class of block answers, without the tensors
        self._blocks = list(dict.fromkeys(blocks))
        self._replaced: list[Any] = []
        self._calls = 0  # of all threads

    def put(self) -> None:
        """Puts the stand-ins in place, for one call more."""
        with _LOCK:
            self._calls += 1
            if self._calls == 1:
                self._replaced = [block.__dict__.get("forward") for block in self._blocks]
                for block in self._blocks:
                    block.forward = _StandIn(self, type(block), block.forward)  # type: ignore[method-assign]

    def remove(self) -> None:
        """Ends what one `put` began; the last takes the stand-ins away."""
        with _LOCK:
            self._calls -= 1
            if self._calls:
                return
            for block, forward in zip(self._blocks, self._replaced, strict=True):
                if forward is None:
                    del block.forward
                else:  # accelerate's, for a backbone spread over devices
                    block.forward = forward
            self._replaced = []


class _StandIn:
    """Answers for a block: with its input, in the form of the block's answers."""

    def __init__(self, all_of_them: StandIns, kind: type, forward: Callable[..., Any]) -> None:
        self.all_of_them = all_of_them
        self.kind = kind
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.all_of_them.wanted():
            return self.forward(*args, **kwargs)  # another thread's call, or a call within this one
        answers = self.all_of_them.answers
        if self.kind not in answers:  # once, to see
            with torch.no_grad():
                answer = self.forward(*args, **kwargs)
            answers[self.kind] = type(answer)([None] * len(answer)) if isinstance(answer, (tuple, list)) else None
        return with_state_out(answers[self.kind], state_in(args, kwargs))


def fuse_given(fuse: Fuse, depth: int, given: GivenStates | FusedState, shown: Tensor, context: Context) -> Tensor:
    """The fused state `(B, T, d)` from given states.

    Args:
        fuse: What fuses.
        depth: The number of blocks `L`.
        given: The states, without padding.
        shown: `(B, T, d)`, what stood in for the last block's output.
        context: That of the call, with the last block's arguments.

    Raises:
        ValueError: If there are not as many states, or not as wide ones, as the fusion wants, or they are of other layers.
    """
    if isinstance(given, FusedState):
        return given.state
    layers = sorted({*fuse.wanted, depth})
    count, size = len(layers), shown.shape[-1]
    if given.layers is not None and list(given.layers) != layers:
        raise ValueError(
            f"layer_states holds the layers {list(given.layers)}, but the fusion wants {layers}: the active adapter was switched in "
            "another thread while this call began. Call it again, with states for the adapter that is active now."
        )
    if given.states.dim() != 3 or (given.states.shape[0], given.states.shape[2]) != (count, size):
        raise ValueError(
            f"layer_states has the shape {tuple(given.states.shape)}, but the fusion wants ({count}, tokens, {size}): the "
            f"states of the layers {layers}. Take dataset and collator from a cache made for this model."
        )
    if given.means and given.states.shape[1] != shown.shape[0]:
        raise ValueError(
            f"layer_states holds the means of {given.states.shape[1]} texts, and the batch has {shown.shape[0]}. Take both from the "
            "cache's own collator."
        )
    packed = given.states.to(device=shown.device, dtype=shown.dtype)
    place = given.positions.to(shown.device)
    mixes = fuse.mixes_positions and not given.means
    if mixes:
        padded = packed.new_zeros(count, shown.shape[0] * shown.shape[1], size).index_copy(1, place, packed)
        packed = padded.unflatten(1, shown.shape[:2])  # (N, B, T, d)
    else:  # no arithmetic for padding
        packed = packed.unsqueeze(1)  # (N, 1, tokens, d)
        context = Context(causal=context.causal, means=given.means)
    states: list[Tensor | None] = [None] * (depth + 1)
    for layer, state in zip(layers, packed.unbind(0), strict=True):
        states[layer] = state
    fused = fuse(states, packed[-1], context)
    if mixes:
        return fused
    if given.means:  # at every position: whichever one of a text the head picks, it picks the mean
        return fused[0].unsqueeze(1).expand(shown.shape)
    # (1, tokens, d) -> (B, T, d)
    return fused.new_zeros(shown.shape[0] * shown.shape[1], size).index_copy(0, place, fused[0]).view(shown.shape)
