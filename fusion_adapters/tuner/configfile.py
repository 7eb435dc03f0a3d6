"""A saved adapter's `adapter_config.json`: whether it can be read, and holds values of the right types."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from peft import PeftType

from .config import FusionConfig, FusionPeftType

FIELDS = "fusion"  # what the names of our own fields begin with
_OURS = b"fusion"  # in our config's names, our card and the names of our tensors
_PARTS = ("adapter_config.json", "README.md", "adapter_model.safetensors")
_READ = 1 << 20  # the header of the weights lies at the start
_ALSO_FRACTIONS = ("lora_alpha",)  # peft says int, and people write 0.5
_WORDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def is_ours(file: str | Path) -> bool:
    """Whether an adapter's config that cannot be read lies in the folder of a fusion adapter."""
    for part in _PARTS:
        try:
            with (Path(file).parent / part).open("rb") as stream:
                if _OURS in stream.read(_READ):
                    return True
        except OSError:
            continue
    return False


def unreadable(file: str | Path, error: Exception) -> ValueError:
    """The error for a config that cannot be read."""
    reason = {UnicodeDecodeError: "it is not UTF-8 text", TypeError: "it holds no JSON object"}.get(type(error), f"{error}")
    return ValueError(
        f"The config of the adapter cannot be read: {str(file)!r} is damaged, cut short or another file ({reason}). Copy or download "
        "the folder again, or save the adapter anew."
    )


def check_values(values: Any, file: str | Path) -> None:
    """Looks at what an adapter_config.json holds; that of another method is passed over.

    Args:
        values: The content of the file, parsed.
        file: The file's path, for the message.

    Raises:
        ValueError: If it is no object, does not name the method, or a value has a type that its field does not take.
    """
    if not isinstance(values, dict):
        if is_ours(file):
            raise unreadable(file, TypeError())
        return
    if values.get("peft_type") != FusionPeftType.FUSION.value:
        of_another = values.get("peft_type") in [kind.value for kind in PeftType]
        if not any(name.startswith(FIELDS) for name in values) and (of_another or not is_ours(file)):
            return
        raise ValueError(
            f"peft_type={values.get('peft_type')!r} in {str(file)!r} stands in the config of a fusion adapter, whose type is "
            f"{FusionPeftType.FUSION.value!r}. The file is damaged or was edited: restore it, or save the adapter anew."
        )
    for problem in wrong_types(values, file):
        raise ValueError(problem)


def wrong_types(values: dict[str, Any], file: str | Path) -> Iterator[str]:
    """The fields of a fusion adapter's adapter_config.json that hold a value of a type that they do not take, a paragraph each."""
    for name, kinds in _kinds().items():
        if name not in values or (values[name] is None and dict in kinds):
            continue
        if not any(_fits(values[name], kind) for kind in kinds):
            words = ", ".join(dict.fromkeys(_WORDS.get(typing.get_origin(k) or k, "null") for k in kinds))
            yield (
                f"{name}={values[name]!r} in {str(file)!r} has a type that this field does not take ({words}). The file is damaged or "
                "was edited: restore it, or save the adapter anew."
            )


@cache
def _kinds() -> dict[str, tuple[Any, ...]]:
    """The types of a config's fields as JSON has them."""
    hints = typing.get_type_hints(FusionConfig)
    found = {}
    for field in dataclasses.fields(FusionConfig):
        kinds = tuple(_in_json(hints.get(field.name, Any)))
        if Any not in kinds:
            found[field.name] = (*kinds, float) if field.name in _ALSO_FRACTIONS else kinds
    return found


def _in_json(hint: Any) -> list[Any]:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return [kind for each in typing.get_args(hint) for kind in _in_json(each)]
    if origin is typing.Literal:
        return [type(value) for value in typing.get_args(hint)]
    if origin is list:
        elements = [kind for each in typing.get_args(hint) for kind in _in_json(each)]
        return [list[tuple(elements)]] if elements and Any not in elements else [list]  # type: ignore[misc]
    if origin in (dict, tuple):
        return [dict if origin is dict else list]
    if dataclasses.is_dataclass(hint):
        return [dict]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return [str]
    return [hint if isinstance(hint, type) else Any]


def _fits(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is list:
        elements = typing.get_args(kind)
        return isinstance(value, list) and all(any(_fits(v, each) for each in elements) for v in value)
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float))
    return isinstance(value, kind)
