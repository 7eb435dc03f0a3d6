"""The ways in: what peft and transformers load goes through the same checks, and a load that is refused changes nothing.

peft's own path hands the config to the tuner, but neither peft nor transformers say which folder they load, nor what they load into an
adapter that is there. Four of their methods are therefore accompanied: each runs as it is, with a note of what it was called with.
Adapters of other methods pass through untouched.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
from collections.abc import Callable
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME
from transformers.integrations.peft import PeftAdapterMixin

from .config import FusionConfig
from .configfile import check_values, is_ours, unreadable
from .load import Load, current_load, download_options, under_way
from .offloaded import is_offloaded, placed
from .refill import check_refill
from .weights import missing_after


def accompany() -> None:
    """Puts the checks around the ways in. Called when the method is registered."""
    _around(PeftConfig, "from_json_file", _from_json_file)
    _around(PeftModel, "from_pretrained", _from_pretrained)
    _around(PeftModel, "load_adapter", _load_adapter)
    _around(PeftAdapterMixin, "load_adapter", _load_into_plain)


def _around(owner: type, name: str, step: Callable[..., Any]) -> None:
    found = inspect.getattr_static(owner, name)
    original = found.__func__ if isinstance(found, classmethod) else found
    if getattr(original, "accompanied", False):
        return

    @functools.wraps(original)
    def accompanied(*args: Any, **kwargs: Any) -> Any:
        return step(original, *args, **kwargs)

    accompanied.accompanied = True  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(accompanied) if isinstance(found, classmethod) else accompanied)


def _arguments(function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """A call's arguments by name, those of `**kwargs` among them; none if the call does not fit and will fail by itself."""
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    named = dict(bound.arguments)
    return {**named.pop("kwargs", {}), **named}


def _from_json_file(original: Callable[..., Any], cls: type, path: Any, **kwargs: Any) -> Any:
    try:
        values = original(cls, path, **kwargs)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        if is_ours(path):
            raise unreadable(path, error) from error
        raise
    check_values(values, path)
    return values


def _from_pretrained(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    given = _arguments(original, *args, **kwargs)
    model = given.get("model")
    _refuse_another_method(given)
    with under_way(_load_of(given.get("model_id"), given, given.get("key_mapping"), model)):
        if model is None or not is_offloaded(model) or not isinstance(_config_of(given), FusionConfig):
            return original(*args, **kwargs)
        with placed(model):
            return original(*args, **{**kwargs, "low_cpu_mem_usage": False})


def _refuse_another_method(given: dict[str, Any]) -> None:
    """Raises ValueError if a config of another method is given for the folder of a fusion adapter: peft would leave the fusion out."""
    config, folder = given.get("config"), given.get("model_id")
    if not isinstance(config, PeftConfig) or isinstance(config, FusionConfig) or folder is None:
        return
    path = os.path.join(os.fspath(folder), given.get("subfolder") or "", CONFIG_NAME)
    if os.path.isfile(path) and is_ours(path):
        raise ValueError(
            f"The adapter in {os.fspath(folder)!r} is a fusion adapter, and the config that was given is a {type(config).__name__}, with "
            "which its fusion would be left out. Leave config out: the one in the folder is read."
        )


def _load_adapter(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    given, outer = _arguments(original, *args, **kwargs), current_load()
    if outer is not None and outer.before is not None:  # within from_pretrained, which has added and checked the adapter
        return original(*args, **kwargs)
    load = _load_of(given.get("model_id"), given, given.get("key_mapping"))
    with under_way(load):
        model: Any = given.get("self")
        name = str(given.get("adapter_name"))
        ours = isinstance(model, PeftModel) and any(isinstance(c, FusionConfig) for c in model.peft_config.values())
        if ours and name in model.peft_config:
            check_refill(model, name, load)
        if not ours or not is_offloaded(model):
            return original(*args, **kwargs)
        with placed(model):
            return original(*args, **{**kwargs, "low_cpu_mem_usage": False})


def _load_into_plain(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    given = _arguments(original, *args, **kwargs)
    settings = given.get("load_config")
    folder: Any = given.get("peft_model_id") or given.get("pretrained_model_name_or_path")
    folder = folder or getattr(settings, "pretrained_model_name_or_path", None)
    where = {**given, **(getattr(settings, "download_kwargs", None) or {}), **(given.get("adapter_kwargs") or {})}
    load = _load_of(folder, where)
    load.plain, load.tensors = True, given.get("adapter_state_dict")
    if load.tensors is not None:
        load.folder = None
    far = given and is_offloaded(given["self"])
    config = (given["peft_config"] or PeftConfig.from_pretrained(folder, **download_options(where))) if far else None
    with (
        under_way(load),
        placed(given["self"], plain=True) if isinstance(config, FusionConfig) else contextlib.nullcontext(),
    ):
        told = original(*args, **kwargs)
        if load.before is not None:
            missing_after(given["self"], given.get("adapter_name") or "default", told)
        return told


def _config_of(given: dict[str, Any]) -> Any:
    return given.get("config") or PeftConfig.from_pretrained(given["model_id"], **download_options(given))


def _load_of(folder: Any, given: dict[str, Any], key_mapping: Any = None, model: Any = None) -> Load:
    if key_mapping is None:  # as peft
        key_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
    return Load(None if folder is None else os.fspath(folder), download_options(given), key_mapping)
