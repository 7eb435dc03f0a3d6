"""The forward hooks: read layer states, call the fusion, hand the fused state on. Knows only torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .fusions import Context


class Taps:
    """Permanent hooks on a backbone that collect its layer states and replace the output of its last block.

    States are kept by layer number, never appended, only those that the fusion asks for, and only until the last block
    has answered. All hooks are bound methods, so that a hooked model can be copied and pickled.

    Args:
        root: The backbone; its call empties the taps.
        blocks: The backbone's blocks, in order.
        fuse: Called with the states by layer number, `z_L` and the context; returns the fused state. A module whose
            `wanted_layers()` says which layers it will read, or None to leave the backbone alone.
        causal: Passed on in the context.
    """

    def __init__(self, root: nn.Module, blocks: Sequence[nn.Module], fuse: Any, causal: bool) -> None:
        self.fuse = fuse
        self.causal = causal
        self.depth = len(blocks)
        self.cut_graph: Callable[[], bool] | None = None
        self._parameters = tuple(inspect.signature(root.forward).parameters)
        self._wanted: frozenset[int] | None = None
        self._states: list[Tensor | None] = []
        self._context = Context()
        self._handles: list[RemovableHandle] = [
            root.register_forward_pre_hook(self._start, with_kwargs=True),
            blocks[0].register_forward_pre_hook(self._keep_input, with_kwargs=True),
        ]
        for index, block in enumerate(blocks[:-1], start=1):
            self._handles.append(block.register_forward_hook(partial(self._keep_output, index)))
        self._handles.append(blocks[-1].register_forward_hook(self._finish, with_kwargs=True))

    def remove(self) -> None:
        """Takes all hooks off the backbone."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._clear()

    @property
    def held(self) -> int:
        """The number of layer states held now; zero outside of a forward pass."""
        return sum(state is not None for state in self._states)

    def _clear(self) -> None:
        self._states = [None] * (self.depth + 1)
        self._context = Context()

    def _start(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._clear()  # also after a forward pass that ended in an exception
        self._wanted = self.fuse.wanted_layers()
        if self._wanted is None:
            return
        named = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        cache: Any = named.get("past_key_values")
        cached = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
        self._context = Context(named.get("attention_mask"), self.causal, cached)

    def _keep_input(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._wanted is None:
            return None
        state = args[0] if args else kwargs["hidden_states"]
        changed = None
        if state.requires_grad and self.cut_graph is not None and self.cut_graph():
            state = state.detach()
            changed = ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})
        if 0 in self._wanted:
            self._states[0] = state
        return changed

    def _keep_output(self, index: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._wanted is not None and index in self._wanted:
            self._states[index] = _state_of(output)

    def _finish(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._wanted is None:
            return None
        last = _state_of(output)
        states, context = self._states, self._context
        if self.depth in self._wanted:
            states[self.depth] = last
        context.block_args = tuple(args[1:])
        # without the KV cache, which belongs to the backbone's own blocks
        context.block_kwargs = {k: v for k, v in kwargs.items() if k not in ("hidden_states", "past_key_values")}
        self._clear()
        # a backbone spread over devices: the fusion sits where the last block computes
        states = [s if s is None or s.device == last.device else s.to(last.device) for s in states]
        fused = self.fuse(states, last, context)
        return (fused, *output[1:]) if isinstance(output, tuple) else fused


def _state_of(output: Any) -> Tensor:
    """The hidden states in a block's answer, which is a tensor or a tuple that starts with one."""
    return output[0] if isinstance(output, tuple) else output
