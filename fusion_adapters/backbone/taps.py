"""The taps on a live backbone: they read layer states, call the fusion, and hand the fused state on."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..fusions import Context
from .calls import Frame, Opener, SkippedForward, WrappedForward
from .families import ENCODED, beside_state, cached_positions, state_in, state_out, with_state_in, with_state_out
from .fuse import Fuses
from .kvcache import check_written, note_skipped
from .replay import FusedState, GivenStates, StandIns, fuse_given
from .shapes import check_state


class _Frames(threading.local):
    """The frames of the calls that are under way in this thread, the innermost last, and what the next one must know."""

    def __init__(self) -> None:
        self.stack: list[Frame] = []
        self.given: GivenStates | FusedState | None = None
        self.differentiates = False  # whether the caller of the whole model wants a gradient of an input


class Taps:
    """Permanent hooks on a backbone that collect its layer states and replace the output of its last block.

    Of a fusion of the lower blocks (`Fuse.depth`), they replace the output of the last of these. The blocks above then answer
    with the state that they are given, and do not run (`skip_above`), so that what comes after all blocks gets it.

    States are kept by layer number, only those that the fusion asks for, and only until the last block has answered.
    Each call has a frame of its own, on a stack of its thread: calls from several threads, or a call within a call, do
    not see each other's states. All hooks are bound methods, so that a hooked model can be copied and pickled.

    Args:
        root: The backbone; its call opens and closes a frame.
        blocks: The backbone's blocks in the order in which they run; a block may run several times.
        fuses: Knows what fuses in a call.
        causal: Passed on in the context.
        width: The width of the layer states.
        model: The model with the backbone in it, whose calls may bring `layer_states` along; None if they may not.
        check: For these: takes the model and what it was given, and returns the states, or raises.
        whole: Is told when calls of this model begin and end.
    """

    def __init__(
        self,
        root: nn.Module,
        blocks: Sequence[nn.Module],
        fuses: Fuses,
        causal: bool,
        width: int,
        model: nn.Module | None = None,
        check: Callable[[nn.Module, Any], GivenStates | FusedState] | None = None,
        whole: Opener | None = None,
    ) -> None:
        self.fuses = fuses
        self.causal = causal
        self.width = width
        self.depth = len(blocks)
        self._blocks = blocks
        self._skipped: list[SkippedForward] = []
        self._check = check
        self._frames = _Frames()
        self._stand_ins = StandIns(blocks, self._replays)
        self._parameters = tuple(inspect.signature(root.forward).parameters)
        self._wrapped = [WrappedForward(root, self)]
        if whole is not None and model is not None and model is not root:
            self._wrapped.append(WrappedForward(model, whole))
        self._handles: list[RemovableHandle] = [
            root.register_forward_pre_hook(_refuse_replicas),
            blocks[0].register_forward_pre_hook(self._keep_input, with_kwargs=True),
            *(b.register_forward_hook(self._keep_output, with_kwargs=True) for b in dict.fromkeys(blocks)),
        ]
        if model is not None:
            self._handles.append(model.register_forward_pre_hook(self._take_states, with_kwargs=True, prepend=True))

    def remove(self) -> None:
        """Takes all hooks off the backbone."""
        for wrapped in (*self._wrapped, *self._skipped):
            wrapped.remove()
        self._skipped.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def skip_above(self, depth: int) -> None:
        """From now on, blocks above that one do not run in calls whose fusion stops there or below."""
        there = {id(skipped.module) for skipped in self._skipped}
        above = dict.fromkeys(self._blocks[depth:])
        self._skipped += [SkippedForward(block, self) for block in above if id(block) not in there]

    @property
    def held(self) -> int:
        """The number of layer states that this thread holds now; zero outside of a forward pass."""
        return sum(state is not None for frame in self._frames.stack for state in (*frame.states, frame.kept))

    @property
    def open_calls(self) -> int:
        """The number of calls of the backbone that this thread has not ended yet."""
        return len(self._frames.stack)

    @property
    def fused_before(self) -> Tensor | None:
        """The fused state `(B, T, d)` that stands for all before it in the call of this thread; None in other calls."""
        frame = self._frame
        return frame.given.state if frame is not None and isinstance(frame.given, FusedState) else None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_frames"}  # thread-local: neither copied nor pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._frames = _Frames()

    # one call

    def _take_states(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a call of the whole model: the backbone in it takes the layer states that came along, its blocks do not run.

        Everything else runs as always: embeddings and masks before the blocks, fusion, final norm, pooler and head after
        them. Other calls, in this thread and in others, run the blocks.
        """
        frames = self._frames
        if frames.differentiates != (wanted := _want_gradient(*args, *kwargs.values())):
            frames.differentiates = wanted
        if kwargs.get("layer_states") is None:
            if frames.given is not None:  # of a call that was interrupted before it reached the backbone
                frames.given = None
            return None
        assert self._check is not None
        frames.given = self._check(model, kwargs["layer_states"])
        return args, {k: v for k, v in kwargs.items() if k != "layer_states"}

    def open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Begins a call of the backbone."""
        frame, frames = Frame(self.fuses.begin(), [None] * (self.depth + 1), Context()), self._frames
        # no zip: torch 2.8 cannot trace one over unequal lengths
        named = {self._parameters[i]: value for i, value in enumerate(args)}
        named.update(kwargs)
        check_written(named, self.depth if frame.fuse is None else frame.fuse.depth, self.depth)
        if frame.fuse is not None:
            frame.depth = frame.fuse.depth
            if frames.given is not None:
                frame.given, frames.given = frames.given, None
            kwargs = self._prepare(frame, named, kwargs)
        frames.stack.append(frame)
        if frame.given is not None:
            self._stand_ins.put()
        return args, kwargs

    def _prepare(self, frame: Frame, named: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        fuse = frame.fuse
        assert fuse is not None
        cuts = fuse.cuts_graph()
        # where the backbone runs, computing a small part of the fusion twice is cheap, and its memory is what counts
        frame.context = Context(named.get("attention_mask"), self.causal, recompute=cuts)
        if fuse.mixes_positions:
            frame.context.cached_positions = cached_positions(named)
        frame.absorbs = not torch.is_grad_enabled() and frame.given is None and fuse.absorbs()
        if not cuts:
            return kwargs
        encoded = named.pop(ENCODED, None)
        # not what the caller wants a gradient of, such as a soft prompt's embeddings
        frame.cuts = not (self._frames.differentiates or _want_gradient(*named.values()))
        if frame.cuts and ENCODED in kwargs and _want_gradient(encoded):
            return {**kwargs, ENCODED: encoded.detach()}
        return kwargs

    def close(self, answered: bool) -> None:
        """Ends a call of the backbone."""
        frame = self._frames.stack.pop()
        if frame.given is not None:
            self._stand_ins.remove()
        if answered and frame.fuse is not None and frame.reached < self.depth:
            raise RuntimeError(
                f"The backbone answered, but only {frame.reached} of its {self.depth} blocks ran, so nothing was fused. If "
                "its configuration skips blocks in training (layerdrop), load it with layerdrop=0.0; if num_hidden_layers was "
                "changed in it, set that back."
            )
        if answered and frame.fuse is not None and frame.reached > self.depth:
            raise RuntimeError(
                f"The backbone ran blocks {frame.reached} times in one call, and has {self.depth}: the fusion took the state after the "
                f"first {self.depth} for the last one. No fusion attaches to a backbone that runs its stack again and again."
            )

    @property
    def _frame(self) -> Frame | None:
        stack = self._frames.stack
        return stack[-1] if stack else None

    def _replays(self) -> bool:
        frame = self._frame
        return frame is not None and frame.given is not None

    def _keep_input(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame = self._frame
        if frame is None or frame.fuse is None or frame.reached:
            return None
        state, changed = state_in(args, kwargs), None
        if frame.cuts and state.requires_grad:
            state = state.detach()
            changed = with_state_in(args, kwargs, state)
        self._keep(frame, 0, state)
        return changed

    def _keep_output(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        frame = self._frame
        if frame is None:
            return self._run_alone()
        if frame.fuse is None:
            return None
        frame.reached += 1
        if frame.answer is not None:
            note_skipped(args, kwargs, frame.depth)
            return self._pass(frame, state_in(args, kwargs))
        state = state_out(output)
        check_state(state, self.width)
        if frame.given is None:
            if (
                frame.absorbs and frame.fuse.mixes_positions
            ):  # a fusion of this block's states may want what this block knows
                frame.context.block_args, frame.context.block_kwargs = beside_state(args, kwargs)
            self._keep(frame, frame.reached, state)
        if frame.reached != frame.depth:
            return None
        answer = with_state_out(output, self._finish(frame, state, args, kwargs))
        if frame.depth < self.depth:
            frame.answer = answer
        return answer

    def answer_above(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a block answers that does not run in this call: the state that it is given, in the form of the block below."""
        frame = self._frame
        if frame is None or frame.answer is None:
            return None
        return with_state_out(frame.answer, state_in(args, kwargs))

    def _pass(self, frame: Frame, state: Tensor) -> Any:
        """The same, whether the block ran (accelerate may have taken our wrapper off it) or not."""
        # the first may be given something else: what a model does after block e, it does with e blocks alone too
        if not torch.compiler.is_compiling() and frame.passed is not None and state is not frame.passed:
            raise RuntimeError(
                f"The fusion stops at block {frame.depth} of {self.depth} (fusion_depth), but the backbone changes the state between "
                f"blocks {frame.reached - 1} and {frame.reached}, which a backbone of {frame.depth} blocks would not. Leave fusion_depth "
                f"unset, or choose at least {frame.reached}."
            )
        frame.passed = state
        return with_state_out(frame.answer, state)

    def _keep(self, frame: Frame, layer: int, state: Tensor) -> None:
        if frame.fuse is None or layer not in frame.fuse.wanted:
            return
        if frame.absorbs:
            frame.kept = frame.fuse.absorb(frame.kept, layer, state, frame.context)
        else:
            frame.states[layer] = state

    def _finish(self, frame: Frame, last: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The fused state; the frame holds no state from here on."""
        fuse = frame.fuse
        assert fuse is not None
        if frame.absorbs:
            kept, frame.kept = frame.kept, None
            return fuse.finish(kept, last, frame.context)
        frame.context.block_args, frame.context.block_kwargs = beside_state(args, kwargs)
        if frame.given is not None:
            return fuse_given(fuse, frame.depth, frame.given, last, frame.context)
        states, frame.states = frame.states, []
        # a backbone spread over devices: the fusion sits where the last block computes
        states = [s if s is None or s.device == last.device else s.to(last.device) for s in states]
        return fuse(states, last, frame.context)

    def _run_alone(self) -> None:
        """A block outside of a call of the backbone: harmless without a fusion, else a recomputation gone wrong."""
        if self.fuses.begin() is not None:
            raise RuntimeError(
                "A block of the backbone ran outside of a call of the backbone, where the other layers' states are not at "
                "hand. Activation checkpointing around blocks does that (FSDP's activation_checkpointing, "
                "torch.utils.checkpoint): use model.gradient_checkpointing_enable() instead. To run blocks by hand, "
                "do it within 'with model.disable_adapter():'."
            )


def _want_gradient(*inputs: Any) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in inputs)


def _refuse_replicas(root: nn.Module, args: tuple[Any, ...]) -> None:
    if getattr(root, "_is_replica", False):
        raise RuntimeError(
            "torch.nn.DataParallel copies the backbone to other devices, but not the fusion. Hide all GPUs but one "
            "(CUDA_VISIBLE_DEVICES=0), or start one process per GPU with 'accelerate launch' or 'torchrun'."
        )
