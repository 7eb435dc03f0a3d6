"""What adapters judged of texts: the outputs of their heads, as numbers and by the names of the labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backbone.families import reads_last_token, text_config


class Labels:
    """The outputs of an adapter's head: their names, and what their logits mean.

    Args:
        many: The `ManyAdapters`.
        name: The adapter's name there.
    """

    def __init__(self, many: Any, name: str) -> None:
        self.adapter = name
        model = many.models[name]
        config = text_config(model.get_base_model())
        own = getattr(model.peft_config[name], "fusion_labels", None)
        self.names: list[str] = list(own) if own else [config.id2label[i] for i in sorted(config.id2label)]
        self.several = config.problem_type == "multi_label_classification"

    def number(self, label: str | int | None) -> int:
        """The number of a label; None stands for the second of two, and for the only number of a regression.

        Raises:
            ValueError: If there is no such label, or None does not say which.
        """
        if label is None and len(self.names) <= 2:
            return len(self.names) - 1
        if isinstance(label, int) and 0 <= label < len(self.names):
            return label
        if isinstance(label, str) and label in self.names:
            return self.names.index(label)
        wrong = "needs a label" if label is None else f"has no label {label!r}"
        raise ValueError(
            f"The adapter {self.adapter!r} {wrong}; its {len(self.names)} are {', '.join(map(repr, self.names))}. Give one of them, or its "
            f"number, 0 to {len(self.names) - 1}."
        )

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities, float32, from logits `(..., K)`; of a regression (`K = 1`) the number itself."""
        logits = logits.float()
        if logits.shape[-1] == 1:
            return logits
        return logits.sigmoid() if self.several else logits.softmax(-1)


@dataclass
class Judgement:
    """What one adapter says about texts.

    Attributes:
        output: What its model returns for them, as in `many(**batch)`.
        attention_mask: int64 `(B, T)`, 1 at the positions that it is about.
        labels: The names of its outputs.
    """

    output: Any
    attention_mask: Tensor
    labels: Labels

    @property
    def logits(self) -> Tensor:
        """`(B, T, K)` of a head over tokens, `(B, K)` of one over whole texts."""
        return self.output.logits

    @property
    def probabilities(self) -> Tensor:
        """As `logits`, float32: softmax, sigmoid where several labels may hold, the number itself of a regression; 0 outside the texts."""
        found = self.labels.probabilities(self.logits)
        # by the shape: a head over tokens, else padding could hold the greatest of a text
        return found * self.attention_mask.unsqueeze(-1).to(found.device) if found.dim() == 3 else found

    def probability(self, label: str | int | None = None) -> Tensor:
        """That of one label, by name or number, `(B, T)` or `(B,)`; None for the second of two.

        Raises:
            ValueError: If there is no such label.
        """
        return self.probabilities[..., self.labels.number(label)]


@dataclass
class Judged:
    """What was written, and how it was judged.

    Attributes:
        output: What the model's own `generate` returns: the token ids, or with `return_dict_in_generate=True` its output.
        judgements: By the adapters' names.
    """

    output: Any
    judgements: dict[str, Judgement]

    @property
    def sequences(self) -> Tensor:
        """The token ids, prompts included, int64 `(B, n)`."""
        return self.output if isinstance(self.output, Tensor) else self.output.sequences

    def __getitem__(self, name: str) -> Judgement:
        return self.judgements[name]


def answers_alone(model: Any) -> bool:
    """Whether a model's head answers at a position from its fused state alone, so that one position can stand for a text so far.

    Heads of transformers do, over tokens and over the last token of a decoder; of others nothing is known.
    """
    kind = type(model)
    tokens = kind.__module__.startswith("transformers.") and kind.__name__.endswith("ForTokenClassification")
    return tokens or reads_last_token(model)


def answer(many: Any, name: str, state: Tensor, ids: Tensor, mask: Tensor) -> Any:
    """What an adapter's model returns for texts, from its fused states; everything of it runs but the blocks.

    Args:
        many: The `ManyAdapters`.
        name: The adapter's name there.
        state: The fused states, `(B, T, d)`.
        ids: The token ids, `(B, T)`.
        mask: 1 at the positions of the texts, `(B, T)`; each has one at least.
    """
    model = many.models[name].get_base_model()
    ids, mask = ids.to(model.device), mask.to(model.device)  # generate takes ids on the CPU for a model on another device
    pad = getattr(text_config(model), "pad_token_id", None)
    if pad is None and len(ids) > 1 and reads_last_token(model):
        # without a token for padding these heads take one text alone
        return _joined([_answer_one(many, name, state[i], ids[i], mask[i] != 0) for i in range(len(ids))])
    if pad is not None:  # these heads look for the last other token
        ids = ids.masked_fill(mask == 0, pad)
    with torch.no_grad():
        return many._answer(name, state, {"input_ids": ids, "attention_mask": mask}, {})


def _answer_one(many: Any, name: str, state: Tensor, ids: Tensor, real: Tensor) -> Any:
    ids = ids[real].unsqueeze(0)
    with torch.no_grad():
        return many._answer(name, state[real].unsqueeze(0), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {})


def _joined(outputs: list[Any]) -> Any:
    kind: Any = type(outputs[0])
    first: Mapping[str, Any] = outputs[0]
    return kind(**{key: torch.cat([o[key] for o in outputs]) for key, value in first.items() if isinstance(value, Tensor)})
