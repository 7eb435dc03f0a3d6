"""Reads YAML strictly: repeated keys, misspelt keys and wrong values are errors, not silent defaults."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

MOST_VALUES = 100_000  # of a recipe; ten lines of aliases of aliases make more than any memory holds
Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML as people write it: PyYAML alone reads 1e-3 as text, because YAML 1.1 wants 1.0e-3, and drops repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The content of a YAML file that holds a mapping.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no YAML mapping, or aliases make it hold itself or more than `MOST_VALUES` values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no recipe {str(path)!r}. Give the path of a YAML file, for example one of recipes/."
        )
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also bytes that are no text, dates that are none
        raise ValueError(f"The recipe {str(path)!r} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"The recipe {str(path)!r} must hold sections with keys (for example task, backbone, data); it is empty or a list."
        )
    try:
        return _unshared(values, itertools.count(1))
    except (_TooManyError, RecursionError):
        raise ValueError(
            f"The recipe {str(path)!r} has aliases (*name) that make it hold itself, or more than {MOST_VALUES:,} values. Write out "
            "what they repeat."
        ) from None


class _TooManyError(Exception):
    pass


def _unshared(value: Any, counter: Iterator[int]) -> Any:
    """A copy in which nothing is shared: what a YAML alias repeats is the same object, and a change would reach all of it."""
    if next(counter) > MOST_VALUES:
        raise _TooManyError
    if isinstance(value, dict):
        return {key: _unshared(inner, counter) for key, inner in value.items()}
    return [_unshared(inner, counter) for inner in value] if isinstance(value, list) else value


def apply_settings(values: dict[str, Any], settings: list[str] | None) -> None:
    """Applies changes, `section.key=value`, the value in YAML. Raises ValueError if one does not fit."""
    for setting in settings or []:
        _apply(values, setting)


def validated(model: type[Model], values: dict[str, Any], source: str) -> Model:
    """The content of a YAML file as a pydantic model. Raises ValueError with all that does not fit."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        explained = " ".join(_explain(e, model) for e in error.errors())
        raise ValueError(f"The recipe {source!r} does not fit. {explained}") from error


def _apply(values: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ValueError(
            f"--set {setting!r} must have the form section.key=value, for example --set training.learning_rate=1e-3."
        )
    section = values
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ValueError(f"--set {setting!r}: {part!r} is a value in the recipe, not a section with keys.")
    try:
        section[parts[-1]] = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"--set {setting!r}: the value is not valid YAML ({' '.join(str(error).split())}).") from error


def _explain(error: Any, model: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        inner: Any = model
        for part in error["loc"][:-1]:
            fields = getattr(inner, "model_fields", {})
            # a mapping of sections: its names are the user's
            inner = fields[str(part)].annotation if str(part) in fields else get_args(inner)[-1]
        return f"{where!r} is not a key of a recipe.{nearest(str(error['loc'][-1]), set(inner.model_fields))}"
    if error["type"] == "missing":
        return f"{where!r} is missing."
    return f"{where!r} is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}."


def nearest(key: str, known: set[str]) -> str:
    """The end of an error about an unknown key: the known one that is most like it, or all of a few."""
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" The keys are: {', '.join(sorted(known))}." if len(known) < 20 else ""
