"""One call of `generate` with early exit: which blocks run in each step, and what becomes of the keys and values of the others."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...backbone.blocks import Backbone
from ...backbone.calls import WrappedForward
from ...backbone.families import state_in, with_state_in
from ..maps import Shortcut, ShortcutSet
from .checks import check_call
from .options import LATER, ExitOptions
from .segments import Own, Segments
from .sure import TokenCheck, threshold

_BY_TOKEN = ("input_ids", "position_ids", "token_type_ids")  # inputs that have a column for each token of a call
_CACHE = "past_key_values"
QUERY = "attn.q_proj"  # Llama and its like; others project queries, keys and values together


class _DecidedError(Exception):
    """Ends a pass at a layer that is sure."""

    def __init__(self, layer: int, logits: Tensor) -> None:
        super().__init__()
        self.layer, self.logits = layer, logits


class _DeeperError(Exception):
    """Ends a pass at a layer above which earlier tokens wait: all go on together, in a call of their own."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer


class _WrittenError(Exception):
    """Ends a block's forward once its keys and values are in the cache."""


class _Steps(WrappedForward):
    """Takes the place of the model's `forward` while it writes."""

    def __init__(self, writing: Writing) -> None:
        super().__init__(writing.host, cast(Any, writing))
        self.writing = writing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.opener is None:
            return self._own(args, kwargs)
        return self.writing.step(lambda **inputs: self._own(args, inputs), kwargs)


class _Query(WrappedForward):
    """Takes the place of a query projection's `forward`: where keys and values alone are wanted, queries are zeros."""

    def __init__(self, module: nn.Module, writing: Writing) -> None:
        super().__init__(module, cast(Any, writing))
        self.writing = writing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.opener is None or not self.writing.fills:
            return self._own(args, kwargs)
        given: Tensor = args[0]
        width: Any = self.module.out_features
        return given.new_zeros(*given.shape[:-1], width)


class _Followed(StoppingCriteriaList):
    """The stopping criteria of a call, which note what rows have ended."""

    ended: Tensor | None = None  # bool (B,)

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> Any:
        found = super().__call__(input_ids, scores, **kwargs)
        self.ended = found if self.ended is None else self.ended | found
        return found


class Writing:
    """See the module.

    With `kv="later"` the blocks above an exit have shorter caches than those below, by the tokens that left there; their states at the
    exit wait. When a token goes on above it, the model is called once more, with the ids of all that wait and the token, blocks below
    the exit handing on what they are given, and with a view of the cache whose lower layers are as short as the upper ones: so
    positions and masks are the model's own.

    Args:
        host: The model that writes.
        backbone: Its backbone.
        maps: The shortcut to the last layer from each exit, ascending.
        shortcuts: Those that cast to the inputs of the blocks between, with `kv="cast"`, where there are such.
        check: Whether tokens are sure.
        options: The options.
        streamer: Is handed the tokens as they are written.
    """

    def __init__(
        self,
        host: Any,
        backbone: Backbone,
        maps: Mapping[int, Shortcut],
        shortcuts: ShortcutSet,
        check: TokenCheck,
        options: ExitOptions,
        streamer: Any = None,
    ) -> None:
        self.streamer = streamer
        self.host, self.maps, self.check, self.options = host, maps, check, options
        self.exact = options.kv == LATER
        self.last = backbone.num_layers
        self.segments = Segments(backbone)
        self.layers: list[int] = []  # of each step, where it was decided
        self.passes: list[int] = []  # of each step, how many blocks ran
        self.prompt = 0  # positions
        self._between: dict[int, dict[int, Shortcut]] = {layer: {} for layer in maps}
        if not self.exact:
            for shortcut in shortcuts:
                if shortcut.kind == options.kind and shortcut.source in maps and shortcut.target < self.last:
                    self._between[shortcut.source][shortcut.target] = shortcut
        casts = [*maps.values(), *(s for found in self._between.values() for s in found.values())]
        parts = [] if self.exact else [named for block in backbone.blocks for named in block.named_modules()]
        self._queries = [m for name, m in parts if name.endswith(QUERY) and hasattr(m, "out_features")]
        self._reads = {source for shortcut in casts for source in shortcut.sources}
        self._states: dict[int, Tensor] = {}  # (B, 1, d) of the newest token, by layer
        self._waiting: dict[int, list[Tensor]] = {layer: [] for layer in maps}  # (B, n, d) by exit
        self._recent: list[dict[str, Tensor]] = []  # inputs of the newest tokens, those that wait among them
        self._criteria = _Followed()
        # the model's own forward, and its inputs in this step
        self._call: tuple[Callable[..., Any], dict[str, Any]] | None = None
        self._writer: Any = None  # a view of the cache that ends a block once it has written
        self._least = torch.zeros(())
        self._start = 0  # the first block that runs in this call
        self._asks = True  # whether exits are asked
        self._inside = False  # whether a readout calls the model
        # where this pass was decided, and its logits, while keys and values are cast
        self._left: tuple[int, Tensor] | None = None

    @property
    def fills(self) -> bool:
        """Whether keys and values of blocks are written that do not run."""
        return self._left is not None

    def write(
        self,
        model: Any,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        **given: Any,
    ) -> Any:
        """The loop, as `generate` calls it (`custom_generate`): transformers' own for greedy search and sampling."""
        check_call(generation_config, given)
        self.prompt, self._criteria = input_ids.shape[1], _Followed(stopping_criteria)
        cache = given[_CACHE]
        kept = generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
        with self._attached():
            given = {"streamer": self.streamer, **given}
            output = model._sample(input_ids, logits_processor, self._criteria, generation_config, **given)
            if kept:
                self._settle()
        return output

    @contextlib.contextmanager
    def _attached(self) -> Iterator[None]:
        with self.segments.attached():
            wrapped: list[WrappedForward] = [_Steps(self), *(_Query(query, self) for query in self._queries)]
            try:
                yield
            finally:
                for one in wrapped:
                    one.remove()

    def step(self, own: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """What the model answers for one token more: its logits `(B, 1, V)`, by as many blocks as are needed."""
        if self._inside:
            return own(**kwargs)
        cache = kwargs[_CACHE]
        if self._call is None or cache.get_seq_length() < self.prompt:  # the prompt, in one call or in parts
            self._call = own, kwargs
            return own(**kwargs)
        self._call = own, kwargs
        if not any(self._waiting.values()):
            self._recent.clear()
        self._recent.append({name: kwargs[name] for name in _BY_TOKEN if kwargs.get(name) is not None})
        mask = kwargs.get("attention_mask")
        places = torch.tensor(cache.get_seq_length()) if mask is None else mask.sum(-1) - 1  # () or (B,)
        self._least = threshold(self.options.threshold, places, self.options.mean_length)
        before = self.segments.passes
        try:
            output = self._go()
            self.layers.append(self.last)
        except _DecidedError as decided:
            output = CausalLMOutputWithPast(logits=decided.logits.unsqueeze(1), past_key_values=cache)
            self.layers.append(decided.layer)
            self._left = None
        self.passes.append(self.segments.passes - before)
        return output

    def _go(self, exit_: int | None = None) -> Any:
        """Calls the model until the newest token is through; from an exit on, with all that wait there."""
        assert self._call is not None
        own, kwargs = self._call
        self._left, cache = None, kwargs[_CACHE]
        while True:
            try:
                if exit_ is None:
                    self._start = 0
                    return self.segments.call(own, kwargs, self._visit)
                self._start = exit_
                state = torch.cat(self._waiting[exit_], dim=1)  # (B, n, d)
                self._waiting[exit_].clear()
                output = self.segments.call(own, self._inputs(state.shape[1], exit_), self._visit, exit_, state)
                output[_CACHE], output.logits = cache, output.logits[:, -1:]
                return output
            except _DeeperError as deeper:
                exit_ = deeper.layer

    def _inputs(self, count: int, exit_: int) -> dict[str, Any]:
        """The inputs of a call of the newest `count` tokens, whose first block that runs is the one above an exit."""
        assert self._call is not None
        _, kwargs = self._call
        newest = self._recent[-count:]
        together = {name: torch.cat([inputs[name] for inputs in newest], dim=-1) for name in newest[-1]}
        cache = kwargs[_CACHE]
        above = cache.layers[exit_:]
        view = copy.copy(cache)
        # masks and positions are made by the lengths of the first layer of each kind
        view.layers = [next((a for a in above if type(a) is type(c)), above[0]) for c in cache.layers[:exit_]] + above
        return {**kwargs, **together, _CACHE: view}

    def _settle(self) -> None:
        """Makes up for what still waits, so that the cache holds every token in every block."""
        while waiting := [layer for layer, states in self._waiting.items() if states]:
            self._asks = False
            self._go(waiting[0])

    def _visit(self, layer: int, own: Own, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Before the block that reads a layer, see `Segments.call`."""
        state = state_in(args, kwargs)  # (B, n, d)
        if self._left is not None:
            return self._fill(layer, own, args, kwargs)
        if layer in self._reads:
            self._states[layer] = self.segments.state(args, kwargs)[:, -1:]
        if layer not in self.maps or (layer == self._start and layer > 0):
            return None
        waiting = self._waiting[layer]
        if self.exact:
            waiting.append(state)
        if self._asks and (logits := self._logits(layer)) is not None:
            if self.exact:
                raise _DecidedError(layer, logits)
            self._left = layer, logits
            return self._fill(layer, own, args, kwargs)
        if self.exact and sum(s.shape[1] for s in waiting) > state.shape[1]:
            raise _DeeperError(layer)
        waiting.clear()
        return None

    def _logits(self, layer: int) -> Tensor | None:
        """Those of the newest token, `(B, V)`, cast from a layer, if all rows that still write are sure."""
        stands = self.maps[layer](self._states)[:, 0]  # (B, d)
        ended = self._criteria.ended
        self._inside = True
        try:
            return self.check(stands, self._least, None if ended is None else ~ended)
        finally:
            self._inside = False

    def _fill(self, layer: int, own: Own, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Writes a block's keys and values of the newest token from a cast state; returns what the next block is given."""
        left, state = self._left, state_in(args, kwargs)
        assert left is not None and self._call is not None
        between = self._between[left[0]].get(layer)
        # (B, 1, d); at the exit itself the state is what the block would read
        filled = state if between is None else between(self._states)
        cache = self._call[1][_CACHE]
        if self._writer is None or self._writer.layers is not cache.layers:
            self._writer = _writer_of(cache)
        args, kwargs = with_state_in(args, kwargs, filled)
        args = tuple(self._writer if a is cache else a for a in args)
        kwargs = {name: self._writer if value is cache else value for name, value in kwargs.items()}
        with contextlib.suppress(_WrittenError):
            own(args, kwargs)
            raise ValueError(
                f"The blocks of {type(self.host).__name__} do not hand keys and values to the cache by themselves, so they cannot be had "
                "without running the block. Choose kv='later'."
            )
        if layer == self.last - 1:
            raise _DecidedError(*left)
        return state


def _writer_of(cache: Any) -> Any:
    """A view of a cache that writes, and then ends the block."""
    writer = copy.copy(cache)

    def update(keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        cache.update(keys, values, layer_idx, *args, **kwargs)
        raise _WrittenError

    writer.update = update
    return writer
