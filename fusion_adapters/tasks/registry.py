"""The tasks by name: what `task` in a recipe may say."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator
from pydantic_core import PydanticCustomError

from .base import Task
from .masked import MaskedLM
from .pairs import SentencePairs
from .regression import Regression
from .sequences import SequenceClassification
from .tokens import TokenClassification

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        TokenClassification(),
        SequenceClassification(),
        SentencePairs(),
        Regression(),
        MaskedLM(),
    )
}


def _task_of(value: Any) -> Task:
    if isinstance(value, Task):
        return value
    if not isinstance(value, str) or value not in TASKS:
        raise PydanticCustomError("task", "Input should be one of {tasks}", {"tasks": ", ".join(TASKS)})
    return TASKS[value]


# A field of a recipe: written as the task's name, read as the task.
NamedTask = Annotated[Task, PlainValidator(_task_of), PlainSerializer(lambda task: task.name, return_type=str)]
