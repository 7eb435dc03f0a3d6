"""What the terminal shows of a run."""

import re

import pytest

from fusion_adapters.runs.tables import zero_notes
from fusion_adapters.tasks.registry import TASKS


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("token_classification", "No entity that was predicted is right.*none was predicted.*Train longer"),
        ("sequence_classification", "No class is right"),
        ("sentence_pairs", "No class is right"),
        ("regression", "All predictions are the same"),
    ],
)
def test_a_score_of_zero_is_told_with_its_reasons(name, reason):
    task = TASKS[name]
    metrics = {
        "scores": {"dev": {task.main.name: 0.0}, "test": {task.main.name: 0.01}},
        "examples": {"train": 1200},
        "dev_by_epoch": [{}, {}],
    }
    (note,) = zero_notes(metrics, task)
    assert re.match(rf"dev {task.main.name} is 0 \(trained on 1,200 examples, scored 2 times.*{reason}", note)
