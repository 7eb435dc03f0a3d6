"""What a run says of a text: its words, and entities from tags."""

from types import SimpleNamespace

import pytest
import torch
from support_text import tokenizer

from fusion_adapters.runs.predicting import TrainedRun, predict
from fusion_adapters.tasks.registry import TASKS
from fusion_adapters.tasks.tokens import word_spans


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Anna's dog_1, here.", ["Anna", "'", "s", "dog_1", ",", "here", "."]),
        (
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u0939\u0948",
            ["\u0939\u093f\u0928\u094d\u0926\u0940", "\u0939\u0948"],
        ),  # Hindi, in Hindi
        ("Mu\u0308nchen!", ["Mu\u0308nchen", "!"]),  # u and its dots apart
        ("\u2764\ufe0fOslo", ["\u2764\ufe0f", "Oslo"]),  # a heart with its variation selector
        (" \u0308 a", ["\u0308", "a"]),
    ],
)
def test_words_keep_their_marks(text, words):
    assert [text[start:end] for start, end in word_spans(text)] == words


class Says(torch.nn.Module):
    """Answers each word piece with the tag that a table gives it."""

    device = torch.device("cpu")

    def __init__(self, table, labels):
        super().__init__()
        self.table, self.labels = table, labels

    def forward(self, input_ids, attention_mask):
        numbers = torch.tensor([[self.labels.index(self.table.get(i, "O")) for i in row] for row in input_ids.tolist()])
        return SimpleNamespace(logits=torch.nn.functional.one_hot(numbers, len(self.labels)).float())


def test_entities_follow_their_tags():
    words, labels = tokenizer(), ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    said = {"anna": "B-PER", "bob": "I-PER", "man": "I-PER", "oslo": "B-LOC", "rome": "B-LOC", "corp": "I-LOC"}
    model = Says({words.convert_tokens_to_ids(word): tag for word, tag in said.items()}, labels)
    recipe = SimpleNamespace(task=TASKS["token_classification"], data=SimpleNamespace(max_length=32, label_at="first"))
    text = "Anna Bob, Man lives at Oslo Rome Corp Man."
    (found,) = predict(TrainedRun(model, words, recipe, labels), [text])
    told = [(e["type"], e["text"], text[e["start"] : e["end"]]) for e in found["entities"]]
    expected = [("PER", "Anna Bob"), ("PER", "Man"), ("LOC", "Oslo"), ("LOC", "Rome Corp"), ("PER", "Man")]
    assert told == [(kind, words, words) for kind, words in expected]
