"""Which adapter a call uses: what was active when it began, in its own thread, whatever other threads switch meanwhile."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..backbone.walk import modules_of
from .drafts import COUNT

State = tuple[tuple[str, ...], bool]  # the active adapters of a module, and whether they are disabled

# accelerate's init_empty_weights, which peft and the counting of parameters use, changes torch's Module class for all threads
ATTACHING = threading.RLock()


class _Here(threading.local):
    """What holds in one thread.

    Attributes:
        depth: How many calls of the model are under way, one within the other.
        states: What the outermost of them began with, by the `id` of each module that follows; None outside of calls.
        switches: The model's count of switches when it began.
        chosen: The adapter of `use_adapter`, `()` for none; None outside of it.
        unfused: Whether calls leave the fusion out.
        rows: The adapter of each row of a batch (`adapter_names`); None where all rows have the active one.
        named: The configurations of the backbones, and how many blocks each named when the outermost call began.
        recording: The fusion layer whose weights over depth are wanted, and those found.
    """

    def __init__(self) -> None:
        # not on the class: what torch compiles watches attributes of the instance alone
        self.depth = 0
        self.states: dict[int, State] | None = None
        self.switches = 0
        self.chosen: tuple[str, ...] | None = None
        self.unfused = False
        self.rows: tuple[str, ...] | None = None
        self.named: list[tuple[Any, int]] = []
        self.recording: tuple[nn.Module, list[Tensor]] | None = None


class Calls:
    """The calls of one attached model, of all threads.

    Its fusion layers and the wrappers around its heads ask here who is active. peft's LoRA layers do not: where a model
    has some, a call that another thread's switch has crossed is refused.

    Attributes:
        followers: The modules that ask here.
        layerwise: Whether other modules switch by themselves, in the middle of a call too.
        switches: How often the active adapter has changed.
        here: What holds in the calling thread.
    """

    def __init__(self) -> None:
        self.followers: list[Follower] = []
        self.layerwise = False
        self.switches = 0
        self._fresh()

    def _fresh(self) -> None:
        self.here = _Here()
        self._lock = threading.RLock()  # held while adapters are switched, and while a call reads who is active

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("here", "_lock")}  # neither copied nor pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fresh()

    def follow(self, model: nn.Module, switched: tuple[type, ...]) -> None:
        """Makes the wrappers around a model's heads ask here. `switched` are the classes that peft switches."""
        self.followers, self.layerwise = [], False
        for module in modules_of(model):
            if type(module) is ModulesToSaveWrapper:
                module.__class__ = HeadWrapper
            if isinstance(module, Follower):
                module.calls = self
                self.followers.append(module)
            elif isinstance(module, switched):
                self.layerwise = True

    # calls

    def open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call of the model begins."""
        # compiled code has its adapters built in: torch chooses it by who is active when it begins
        if not torch.compiler.is_compiling():
            here = self.here
            if not here.depth:
                with self._lock:
                    here.states = {id(module): module.state() for module in self.followers}
                    here.switches = self.switches
                    configs = [module.config() for module in self.followers]
                    here.named = [(config, getattr(config, COUNT)) for config in configs if config is not None]
            here.depth += 1
        return args, kwargs

    def close(self, answered: bool) -> None:
        """The innermost call of the model ends.

        Raises:
            RuntimeError: If another thread has switched adapters meanwhile, and LoRA layers may have followed half-way.
        """
        here = self.here
        if torch.compiler.is_compiling() or not here.depth:
            return
        here.depth -= 1
        if here.depth:
            return
        here.states = None
        named, here.named = here.named, []
        for config, count in named:  # a draft that failed: transformers does not set it back
            if not answered and getattr(config, COUNT) != count:
                setattr(config, COUNT, count)
        if not (answered and self.layerwise):
            return
        with self._lock:
            crossed = self.switches != here.switches
        if crossed:
            raise RuntimeError(
                "Another thread switched, disabled or deleted an adapter while this call was under way. The model has LoRA layers, "
                "each of which looks by itself who is active, so the answer would be a mixture of adapters. Switch and call "
                "under one lock, or give each thread a model of its own; adapters with a fusion alone need neither."
            )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """All calls of this thread in the body use what is active at its beginning, unless this thread switches."""
        self.open((), {})
        answered = False
        try:
            yield
            answered = True
        finally:
            self.close(answered)

    # switching

    @contextlib.contextmanager
    def switching(self) -> Iterator[None]:
        """Around what may change the active adapter of the model: calls that begin meanwhile wait for its end."""
        here = self.here
        if here.chosen is not None:
            raise ValueError(
                "set_adapter, disable_adapter and the like change the model for all threads, and do not work within 'with "
                "use_adapter(...)', which chooses for its own thread. Leave it first, or nest use_adapter(model, name)."
            )
        with self._lock:
            before = [module.state() for module in self.followers]
            try:
                yield
            finally:
                if before != [module.state() for module in self.followers]:
                    own = here.switches == self.switches
                    self.switches += 1
                    if own:
                        here.switches = self.switches

    @contextlib.contextmanager
    def using(self, chosen: tuple[str, ...]) -> Iterator[None]:
        """Calls of this thread in the body use these adapters, `()` for none."""
        here = self.here
        before = here.chosen, here.states
        here.chosen = chosen
        if here.states is not None:
            here.states = {id(module): module.state() for module in self.followers}
        try:
            yield
        finally:
            here.chosen, here.states = before

    @contextlib.contextmanager
    def of_rows(self, names: tuple[str, ...]) -> Iterator[None]:
        """Calls of this thread in the body have an adapter for each row of their batches."""
        here = self.here
        before, here.rows = here.rows, names
        self._cross()
        try:
            yield
        finally:
            here.rows = before
            self._cross()

    def _cross(self) -> None:
        """Tells calls of other threads that LoRA layers answer for other adapters now."""
        with self._lock:
            own = self.here.switches == self.switches
            self.switches += self.layerwise
            if own:
                self.here.switches = self.switches


class Follower(nn.Module):
    """A module of peft whose active adapter is that of the call which is under way in its thread."""

    calls: Calls | None = None  # until the adapter is attached
    _active_adapter: Any
    _disable_adapters: bool

    def state(self) -> State:
        """Who is active for a call of this thread that begins now."""
        chosen = None if self.calls is None else self.calls.here.chosen
        if chosen is not None:
            return tuple(name for name in chosen if name in self._get_available_adapters()), not chosen
        active = self._active_adapter
        return ((active,) if isinstance(active, str) else tuple(active)), self._disable_adapters

    def state_in_call(self) -> State:
        """Who is active in the call that is under way in this thread, or else now."""
        if self.calls is not None and not torch.compiler.is_compiling():
            states = self.calls.here.states
            if states is not None and id(self) in states:
                return states[id(self)]
        return self.state()

    @property
    def disable_adapters(self) -> bool:
        return self.state_in_call()[1]

    @property
    def active_adapters(self) -> list[str]:
        return list(self.state_in_call()[0])

    def config(self) -> Any:
        """The configuration whose number of blocks is kept over calls that fail; None if there is none."""
        return None

    def switched(self) -> None:
        """This thread has switched the module: a call that is under way in it goes on with that."""
        states = None if self.calls is None else self.calls.here.states
        if states is not None:
            states[id(self)] = self.state()

    def _get_available_adapters(self) -> set[str]:
        raise NotImplementedError


class HeadWrapper(Follower, ModulesToSaveWrapper):
    """peft's wrapper around a head, which in a call stays with the adapter that the call began with."""

    def _get_name(self) -> str:
        return ModulesToSaveWrapper.__name__

    def _get_available_adapters(self) -> set[str]:
        return set(self.modules_to_save)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        active, disabled = now = self.state_in_call()
        rows = None if self.calls is None else self.calls.here.rows
        if rows is not None and not disabled:
            return self._by_rows(rows, *args, **kwargs)
        if now != self.state() and not disabled and active and active[0] not in self.modules_to_save:
            raise deleted(active[0])
        return super().forward(*args, **kwargs)

    def _by_rows(self, names: tuple[str, ...], hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The answers of the heads of several adapters, each for its own rows of what comes first, `(B, ...)`."""
        answers: list[Tensor] = [hidden] * len(names)
        heads = dict(self.modules_to_save.items())
        for name, rows in groups_of(names, len(hidden)).items():
            head = heads.get(name, self.original_module)
            for row, answer in zip(rows, head(hidden[rows], *args, **kwargs), strict=True):
                answers[row] = answer
        if len(shapes := {tuple(answer.shape) for answer in answers}) > 1:
            raise ValueError(
                f"The adapters of this batch have heads of different sizes ({', '.join(map(str, sorted(shapes)))} for a row), and one "
                "answer cannot hold both. Call the model once for each of them, or use ManyAdapters."
            )
        dtype = functools.reduce(torch.promote_types, (answer.dtype for answer in answers))
        return torch.stack([answer.to(dtype) for answer in answers])

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.switched()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self.switched()

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        super().delete_adapter(adapter_name, new_active_adapters)
        self.switched()


def groups_of(names: Sequence[str], rows: int) -> dict[str, list[int]]:
    """The rows of each adapter.

    Raises:
        ValueError: If there are not as many names as rows.
    """
    if len(names) != rows:
        raise ValueError(
            f"adapter_names has {len(names)} names, and the batch has {rows} rows. Give one name for each row, '__base__' for none."
        )
    return {name: [i for i, own in enumerate(names) if own == name] for name in dict.fromkeys(names)}


def deleted(name: str) -> RuntimeError:
    """For a call that lost its adapter on the way."""
    return RuntimeError(
        f"The adapter {name!r} was deleted in another thread while a call with it was under way. Delete it when its calls have ended."
    )
