"""The forward hooks: read layer states, call the fusion, hand the fused state on. Knows only torch."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..fusions import Context
from .calls import CACHE_NAMES, cached_positions, left_over, running_forwards, wants_gradient, with_block_inputs

_STAND_INS = threading.Lock()  # held while blocks get a stand-in or lose it


@dataclass
class GivenStates:
    """Layer states that were computed earlier and stand for a run of the blocks.

    Attributes:
        states: `(N, tokens, d)`, without padding: the layers that the fusion reads, ascending, and `z_L` last.
        positions: `(tokens,)`, the place of each token in the padded batch `(B, T)`, counted along rows.
    """

    states: Tensor
    positions: Tensor


@dataclass
class Frame:
    """What one call of the backbone has left in the taps so far.

    Attributes:
        wanted: The layers whose states are kept; None if no fusion is active.
        states: The states by layer number, `z_0 .. z_L`.
        context: What a fusion may know besides the states.
        reached: The number of the block that ran last.
        absorbs: Whether the fusion takes each state in as it comes, so that `kept` stands for the states so far.
        kept: See `Fusion.absorb`.
        given: States that stand for the blocks in this call.
        cuts: Whether the states are kept without the graph behind them.
        caller: Python's frame of a `root.forward(...)` that somebody called past the hooks of the root.
    """

    wanted: frozenset[int] | None
    states: list[Tensor | None]
    context: Context
    reached: int = 0
    absorbs: bool = False
    kept: Any = None
    given: GivenStates | None = None
    cuts: bool = False
    caller: FrameType | None = None


class _Frames(threading.local):
    """The frames of the calls that are under way in this thread, the innermost last, and what the next one must know."""

    def __init__(self) -> None:
        self.stack: list[Frame] = []
        self.given: GivenStates | None = None
        self.differentiates = False  # whether the caller of the whole model wants a gradient of an input
        self.replays: list[contextlib.AbstractContextManager[None] | None] = []


class Taps:
    """Permanent hooks on a backbone that collect its layer states and replace the output of its last block.

    States are kept by layer number, only those that the fusion asks for, and only until the last block has answered.
    Each call has a frame of its own, on a stack of its thread: calls from several threads, or a call within a call, do
    not see each other's states. All hooks are bound methods, so that a hooked model can be copied and pickled.

    Args:
        root: The backbone; its call opens and closes a frame.
        blocks: The backbone's blocks in the order in which they run; a block may run several times.
        fuse: Called with the states by layer number, `z_L` and the context; returns the fused state. A module whose
            `wanted_layers()` says which layers it will read, or None to leave the backbone alone, and whose
            `mixes_positions` says whether it must know about a KV cache. Where its `absorbs()` is true, its `absorb` and
            `finish` take the place of a call, see `Fusion`.
        causal: Passed on in the context.
    """

    def __init__(self, root: nn.Module, blocks: Sequence[nn.Module], fuse: Any, causal: bool) -> None:
        self.fuse = fuse
        self.causal = causal
        self.depth = len(blocks)
        self._root = root
        self.cut_graph: Callable[[], bool] | None = None
        self._blocks = list(dict.fromkeys(blocks))
        self._replaced: list[Any] = []  # the blocks' own `forward`, while stand-ins are in place
        self._replays = 0  # how many contexts, of all threads, want them there
        self._answers: dict[type, int | None] = {}  # how each class of block answers: items of a tuple, None for a tensor
        self._parameters = tuple(inspect.signature(root.forward).parameters)
        self._frames = _Frames()
        self._handles: list[RemovableHandle] = [
            root.register_forward_pre_hook(self._open, with_kwargs=True),
            # always: also after an exception
            root.register_forward_hook(self._close, always_call=True),
            blocks[0].register_forward_pre_hook(self._keep_input, with_kwargs=True),
        ]
        for block in dict.fromkeys(blocks):
            self._handles.append(block.register_forward_hook(self._keep_output, with_kwargs=True))

    def accept_states(self, model: nn.Module, replay: Callable[[nn.Module, Any], Any]) -> None:
        """Lets calls of the whole model take `layer_states`, as `replaying` does for calls in a body.

        Args:
            model: The model with the backbone in it.
            replay: Checks what was given, and returns the context in which the model runs.
        """
        self._replay = replay
        self._handles += [
            model.register_forward_pre_hook(self._begin_replay, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._end_replay, always_call=True),
        ]

    def _begin_replay(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frames, replays = self._frames, self._frames.replays
        for _ in range(left_over(model, replays)):
            self._end_replay(model, (), None)
        if frames.differentiates != (wanted := wants_gradient(*args, *kwargs.values())):
            frames.differentiates = wanted
        replays.append(None)
        if kwargs.get("layer_states") is None:
            return None
        context = self._replay(model, kwargs["layer_states"])
        context.__enter__()
        replays[-1] = context
        return args, {k: v for k, v in kwargs.items() if k != "layer_states"}

    def _end_replay(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        context = self._frames.replays.pop() if self._frames.replays else None
        if context is not None:
            context.__exit__(None, None, None)

    def remove(self) -> None:
        """Takes all hooks off the backbone."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextlib.contextmanager
    def replaying(self, given: GivenStates) -> Iterator[None]:
        """In the body, the next call of the backbone in this thread takes these layer states; its blocks do not run.

        Everything else runs as always: embeddings and masks before the blocks, fusion, final norm, pooler and head after
        them. Other calls, in this thread and in others, run the blocks.
        """
        self._put_stand_ins()
        try:
            self._frames.given = given
            yield
        finally:
            self._frames.given = None
            self._remove_stand_ins()

    def _put_stand_ins(self) -> None:
        with _STAND_INS:
            self._replays += 1
            if self._replays == 1:
                self._replaced = [block.__dict__.get("forward") for block in self._blocks]
                for block in self._blocks:
                    block.forward = _StandIn(self, type(block), block.forward)  # type: ignore[method-assign]

    def _remove_stand_ins(self) -> None:
        with _STAND_INS:
            self._replays -= 1
            if self._replays:
                return
            for block, forward in zip(self._blocks, self._replaced, strict=True):
                if forward is None:
                    del block.forward
                else:  # accelerate's, for a backbone spread over devices
                    block.forward = forward
            self._replaced = []

    @property
    def held(self) -> int:
        """The number of layer states that this thread holds now; zero outside of a forward pass."""
        return sum(state is not None for frame in self._frames.stack for state in (*frame.states, frame.kept))

    @property
    def open_calls(self) -> int:
        """The number of calls of the backbone, or of the whole model, that this thread has not ended yet."""
        return max(len(self._frames.stack), len(self._frames.replays))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_frames"}  # thread-local: neither copied nor pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._frames = _Frames()

    @property
    def _frame(self) -> Frame | None:
        stack = self._frames.stack
        return stack[-1] if stack else None

    def _open(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(root, "_is_replica", False):
            raise RuntimeError(
                "torch.nn.DataParallel copies the backbone to other devices, but not the fusion. Hide all GPUs but one "
                "(CUDA_VISIBLE_DEVICES=0), or start one process per GPU with 'accelerate launch' or 'torchrun'."
            )
        frame, frames = Frame(self.fuse.wanted_layers(), [None] * (self.depth + 1), Context()), self._frames
        if over := left_over(root, frames.stack):
            del frames.stack[-over:]
        frames.stack.append(frame)
        if frame.wanted is None:
            return None
        if frames.given is not None:
            frame.given, frames.given = frames.given, None
        # no zip: torch 2.8 cannot trace one over unequal lengths
        named = {self._parameters[i]: value for i, value in enumerate(args)}
        named.update(kwargs)
        cuts = self.cut_graph is not None and self.cut_graph()
        # where the backbone runs, computing a small part of the fusion twice is cheap, and its memory is what counts
        frame.context = Context(named.get("attention_mask"), self.causal, recompute=cuts)
        if self.fuse.mixes_positions:
            frame.context.cached_positions = max(cached_positions(named.get(name)) for name in CACHE_NAMES)
        frame.absorbs = not torch.is_grad_enabled() and frame.given is None and self.fuse.absorbs()
        if not cuts:
            return None
        encoded = named.pop("encoder_hidden_states", None)
        # not what the caller wants a gradient of, such as a soft prompt's embeddings
        frame.cuts = not (frames.differentiates or wants_gradient(*named.values()))
        if frame.cuts and "encoder_hidden_states" in kwargs and wants_gradient(encoded):
            return args, {**kwargs, "encoder_hidden_states": encoded.detach()}
        return None

    def _close(self, root: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._frames.stack:
            return
        frame = self._frames.stack.pop()
        if output is not None and frame.wanted is not None and frame.reached < self.depth:
            raise RuntimeError(
                f"The backbone answered, but only {frame.reached} of its {self.depth} blocks ran, so nothing was fused. If "
                "its configuration skips blocks in training (layerdrop), load it with layerdrop=0.0."
            )

    def _open_past_hooks(self) -> None:
        """Opens a frame at the first block of a `root.forward(...)`, which sentence-transformers calls instead of the root.

        The last block closes it. One whose call failed before is left, until the next call, and replaced.
        """
        if torch.compiler.is_compiling() or self.fuse.wanted_layers() is None:
            return
        running = running_forwards(self._root)
        stack = self._frames.stack
        while stack and stack[-1].caller is not None and not any(stack[-1].caller is f for f in running):
            stack.pop()
        # within a call that the hooks have seen, the innermost frame is its own
        if not running or (stack and (stack[-1].caller is None or stack[-1].caller is running[0])):
            return
        inputs = {name: running[0].f_locals[name] for name in self._parameters if name in running[0].f_locals}
        self._open(self._root, (), inputs)
        stack[-1].caller = running[0]

    def _keep_input(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._frame is None or self._frame.caller is not None:
            self._open_past_hooks()
        frame = self._frame
        if frame is None or frame.wanted is None or frame.reached:
            return None
        state = args[0] if args else kwargs["hidden_states"]
        changed = None
        if frame.cuts and state.requires_grad:
            state = state.detach()
            changed = ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})
        self._keep(frame, 0, state)
        return changed

    def _keep_output(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        frame = self._frame
        if frame is None:
            return self._run_alone(output)
        if frame.wanted is None:
            return None
        frame.reached += 1
        if frame.caller is not None and frame.reached == self.depth:
            self._frames.stack.pop()
        if isinstance(output, list):  # the first GPT's blocks
            output = tuple(output)
        state = output[0] if isinstance(output, tuple) else output
        if frame.given is not None:
            return (
                self._finish_given(frame, frame.given, state, args, kwargs, output) if frame.reached == self.depth else None
            )
        self._keep(frame, frame.reached, state)
        return self._finish(frame, state, args, kwargs, output) if frame.reached == self.depth else None

    def _keep(self, frame: Frame, layer: int, state: Tensor) -> None:
        if layer not in (frame.wanted or ()):
            return
        if frame.absorbs:
            frame.kept = self.fuse.absorb(frame.kept, layer, state)
        else:
            frame.states[layer] = state

    def _finish(
        self, frame: Frame, last: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor | tuple[Any, ...]
    ) -> Any:
        if frame.absorbs:
            kept, frame.kept = frame.kept, None
            fused = self.fuse.finish(kept, last)
            return (fused, *output[1:]) if isinstance(output, tuple) else fused
        states, frame.states = frame.states, []
        context = with_block_inputs(frame.context, args, kwargs)
        # a backbone spread over devices: the fusion sits where the last block computes
        states = [s if s is None or s.device == last.device else s.to(last.device) for s in states]
        fused = self.fuse(states, last, context)
        return (fused, *output[1:]) if isinstance(output, tuple) else fused

    def _finish_given(
        self, frame: Frame, given: GivenStates, shown: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """As `_finish`, from states without padding; `shown` `(B, T, d)` is what stood in for the last block's output."""
        wanted = sorted(frame.wanted or ())
        count, size = len({*wanted, self.depth}), shown.shape[-1]
        if given.states.dim() != 3 or (given.states.shape[0], given.states.shape[2]) != (count, size):
            raise ValueError(
                f"layer_states has the shape {tuple(given.states.shape)}, but the fusion wants ({count}, tokens, {size}): the "
                f"states of the layers {sorted({*wanted, self.depth})}. Take dataset and collator from a cache made for this "
                "model."
            )
        packed = given.states.to(device=shown.device, dtype=shown.dtype)
        place = given.positions.to(shown.device)
        if self.fuse.mixes_positions:
            padded = packed.new_zeros(count, shown.shape[0] * shown.shape[1], size).index_copy(1, place, packed)
            packed = padded.unflatten(1, shown.shape[:2])  # (N, B, T, d)
            context = with_block_inputs(frame.context, args, kwargs)
        else:  # no arithmetic for padding
            packed = packed.unsqueeze(1)  # (N, 1, tokens, d)
            context = Context(causal=self.causal)
        states: list[Tensor | None] = [None] * (self.depth + 1)
        for layer, state in zip(sorted({*wanted, self.depth}), packed.unbind(0), strict=True):
            states[layer] = state
        fused = self.fuse(states, packed[-1], context)
        if not self.fuse.mixes_positions:
            # (1, tokens, d) -> (B, T, d)
            fused = fused.new_zeros(shown.shape[0] * shown.shape[1], size).index_copy(0, place, fused[0]).view(shown.shape)
        return (fused, *output[1:]) if isinstance(output, tuple) else fused

    def _run_alone(self, output: Any) -> None:
        """A block outside of a call of the backbone: harmless without a fusion, else a recomputation gone wrong."""
        if self.fuse.wanted_layers() is not None:
            raise RuntimeError(
                "A block of the backbone ran outside of a call of the backbone, where the other layers' states are not at "
                "hand. Activation checkpointing around blocks does that (FSDP's activation_checkpointing, "
                "torch.utils.checkpoint): use model.gradient_checkpointing_enable() instead. To run blocks by hand, "
                "do it within 'with model.disable_adapter():'."
            )


class _StandIn:
    """Takes the place of a block's `forward`, see `Taps.replaying`."""

    def __init__(self, taps: Taps, kind: type, forward: Callable[..., Any]) -> None:
        self.taps = taps
        self.kind = kind
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frame, answers = self.taps._frame, self.taps._answers
        if frame is None or frame.given is None:
            return self.forward(*args, **kwargs)  # another thread's call, or a call within this one
        if self.kind not in answers:  # once, to see
            with torch.no_grad():
                answer = self.forward(*args, **kwargs)
            answers[self.kind] = len(answer) if isinstance(answer, tuple) else None
        state = args[0] if args else kwargs["hidden_states"]
        length = answers[self.kind]
        return state if length is None else (state, *([None] * (length - 1)))
