"""The tasks by name: what `task` in a recipe may say."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator
from pydantic_core import PydanticCustomError

from .base import Task

# The tasks: the file and the class in it.
_TASKS = (
    "tokens.TokenClassification",
    "sequences.SequenceClassification",
    "pairs.SentencePairs",
    "regression.Regression",
    "masked.MaskedLM",
    "causal.CausalLM",
)


def _load(path: str) -> Task:
    file, name = path.split(".")
    return getattr(import_module(f".{file}", __package__), name)()


TASKS: dict[str, Task] = {task.name: task for task in map(_load, _TASKS)}


def _task_of(value: Any) -> Task:
    if isinstance(value, Task):
        return value
    if not isinstance(value, str) or value not in TASKS:
        raise PydanticCustomError("task", "Input should be one of {tasks}", {"tasks": ", ".join(TASKS)})
    return TASKS[value]


# A field of a recipe: written as the task's name, read as the task.
NamedTask = Annotated[Task, PlainValidator(_task_of), PlainSerializer(lambda task: task.name, return_type=str)]
