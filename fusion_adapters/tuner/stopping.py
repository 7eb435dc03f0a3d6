"""Stopping a generation by what an adapter says of the text so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from ..backbone.families import reads_last_token
from .collecting import Collector
from .judgement import Labels, answer, answers_alone


class StopWhen(StoppingCriteria):
    """Ends a text as soon as an adapter gives a label more than a probability, see `JudgesWriting.stop_when`.

    Args:
        many: The `ManyAdapters`.
        name: The adapter's name there.
        label: The label, by name or number; None for the second of two.
        above: The probability; of a regression the number.
        every: It looks each so many tokens, at the first too.

    Raises:
        ValueError: If the adapter has no such label, or a number is out of its range.
    """

    def __init__(self, many: Any, name: str, label: str | int | None, above: float, every: int) -> None:
        self.many, self.name, self.above, self.every = many, name, above, every
        self.labels = Labels(many, name)
        self.label = self.labels.number(label)
        if len(self.labels.names) > 1 and not 0 <= above < 1:
            raise ValueError(f"above={above} is no probability that could be exceeded. Give a number from 0 to below 1.")
        if every < 1:
            raise ValueError(
                f"every={every} is no number of tokens. Give 1 to look at each token, 4 to look at each fourth."
            )
        model = many.models[name].get_base_model()
        self._alone, self._texts = answers_alone(model), reads_last_token(model)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Which texts end here, bool, `(B,)`."""
        collector = self.many.begin()
        if not isinstance(collector, Collector) or self.name not in collector.judges:
            raise RuntimeError(
                f"stop_when({self.name!r}) was asked outside of a generation that {self.name!r} judges. Give it to many.generate of the "
                f"same ManyAdapters, in its stopping_criteria, with {self.name!r} among its adapters; model.generate has no judges."
            )
        assert collector.prompt is not None
        if (input_ids.shape[1] - collector.prompt - 1) % self.every:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return (self._probability(collector, input_ids) > self.above).to(input_ids.device)

    def _probability(self, collector: Collector, ids: Tensor) -> Tensor:
        """That of the label for what the backbone has read, `(B,)`: a text so far, or the likeliest of its newest tokens."""
        judge = collector.judges[self.name]
        collector.catch_up([judge])
        read, first = judge.read, judge.read == collector.prompt
        new = 1 if first or self._texts else self.every
        if self._alone:
            state, ids = judge.newest(new), ids[:, read - new : read]
            mask = torch.ones_like(ids)
        else:
            state, ids, mask = judge.state(), ids[:, :read], collector.mask(read)
        found = self.labels.probabilities(answer(self.many, self.name, state, ids, mask).logits)[..., self.label]
        return found[:, -new:].amax(1) if found.dim() == 2 else found
