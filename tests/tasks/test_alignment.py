"""Labels on first or last pieces, sentences in parts, and back; scores against values worked out by hand."""

import random

import pytest
import torch
from support import tiny
from support_text import SENTENCES, WORDS, tokenizer
from transformers import AutoModel, BertConfig, GPT2Config, LlamaConfig, OPTConfig, RobertaConfig

from fusion_adapters import FusionConfig
from fusion_adapters.runs.loading import check_lengths, settle_label_at
from fusion_adapters.tasks.base import IGNORED, Example
from fusion_adapters.tasks.data import DataRecipe
from fusion_adapters.tasks.registry import TASKS
from fusion_adapters.tasks.tokens import decode_tags

LABELS = ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"]
TOKENS, TEXTS = TASKS["token_classification"], TASKS["sequence_classification"]


def examples():
    return [Example([w for w, _ in s], [t for _, t in s]) for s in SENTENCES]


def test_a_label_sits_on_the_first_piece_of_its_word():
    (row,) = TOKENS.encode([Example(["Anna", "zoo"], ["B-PER", "O"])], tokenizer(), LABELS, 32).rows
    pieces = tokenizer().convert_ids_to_tokens(row["input_ids"])
    assert pieces == ["[CLS]", "anna", "z", "##o", "##o", "[SEP]"]
    assert row["labels"] == [IGNORED, 5, 0, IGNORED, IGNORED, IGNORED]


def test_a_label_sits_on_the_last_piece_of_its_word_where_that_is_asked_for():
    example = Example(["zoo", "Anna", "zoo", "zoo"], ["B-PER", "O", "B-LOC", "I-LOC"])
    (row,) = TOKENS.encode([example], tokenizer(), LABELS, 32, "last").rows
    pieces = tokenizer().convert_ids_to_tokens(row["input_ids"])
    assert pieces == ["[CLS]", "z", "##o", "##o", "anna", *["z", "##o", "##o"] * 2, "[SEP]"]
    no = IGNORED
    assert row["labels"] == [no, no, no, 5, 0, no, no, 1, no, no, 2, no]


def test_a_run_must_have_settled_where_labels_sit():
    with pytest.raises(
        ValueError, match="label_at='auto': the piece of a word that has its label is its 'first' or its 'last'"
    ):
        TOKENS.encode(examples(), tokenizer(), LABELS, 32, "auto")


@pytest.mark.parametrize(("family", "settled"), [("bert", "first"), ("llama", "last")])
def test_causal_backbones_have_labels_at_last_pieces(family, settled):
    data = DataRecipe(path="somewhere")
    settle_label_at(data, TOKENS, tiny(family), FusionConfig())
    assert data.label_at == settled
    for given in ("first", "last"):
        data = DataRecipe(path="somewhere", label_at=given)
        settle_label_at(data, TOKENS, tiny(family), FusionConfig())
        assert data.label_at == given
    data = DataRecipe(path="somewhere")
    settle_label_at(data, TEXTS, tiny(family, "sequence"), FusionConfig())
    assert data.label_at == "auto", "whole texts have no pieces with labels"


@pytest.mark.parametrize("label_at", ["first", "last"])
@pytest.mark.parametrize("max_length", [4, 5, 7, 12, 64])
def test_every_word_keeps_its_label_wherever_the_sentence_is_cut(max_length, label_at):
    order = random.Random(max_length)
    long = [
        Example(
            [order.choice([*WORDS, "zebra", "q", "unusual"]) for _ in range(n)], [order.choice(LABELS) for _ in range(n)]
        )
        for n in (1, 2, 9, 40)
    ]
    encoded = TOKENS.encode(long, tokenizer(), LABELS, max_length, label_at)
    assert all(len(row["input_ids"]) <= max_length for row in encoded.rows)
    given = [[max(label, 0) for label in row["labels"]] for row in encoded.rows]
    assert decode_tags(encoded, given, long, LABELS) == [e.labels for e in long]
    assert encoded.notes["words_without_pieces"] == 0
    assert encoded.notes["split_sentences"] == sum(len([r for r, _ in encoded.words if r == i]) > 1 for i in range(4))


def test_a_word_without_pieces_is_counted_and_tagged_o():
    example = Example(["Anna", "\ufe0f", "Oslo"], ["B-PER", "B-LOC", "B-LOC"])
    encoded = TOKENS.encode([example], tokenizer(), LABELS, 32)
    assert encoded.notes["words_without_pieces"] == 1
    given = [[max(label, 0) for label in row["labels"]] for row in encoded.rows]
    assert decode_tags(encoded, given, [example], LABELS) == [["B-PER", "O", "B-LOC"]]


def test_a_text_that_is_cut_off_is_counted():
    texts = [Example(["anna lives in oslo"], ["a"]), Example(["the old man " * 9], ["b"])]
    encoded = TEXTS.encode(texts, tokenizer(), ["a", "b"], 8)
    assert encoded.notes == {"truncated_texts": 1}
    assert [row["labels"] for row in encoded.rows] == [0, 1]


def test_scores_against_values_worked_out_by_hand():
    gold = [e.labels for e in examples()]  # 5 entities
    predicted = [
        ["B-PER", "O", "O", "O", "O"],
        ["B-PER", "O", "O", "O", "B-ORG", "I-ORG"],
        ["O", "O", "O", "B-LOC", "B-LOC"],
    ]
    scores = TOKENS.score(gold, predicted)  # right: Anna, Acme Corp, Rome; wrong: Bob (too short), in
    assert scores["precision"] == pytest.approx(3 / 5)
    assert scores["recall"] == pytest.approx(3 / 5)
    assert scores["f1"] == pytest.approx(3 / 5)
    assert scores["f1_by_type"] == pytest.approx({"PER": 0.5, "ORG": 1.0, "LOC": 0.5})
    scores = TEXTS.score(["a", "a", "a", "b"], ["a", "a", "b", "b"])
    assert scores["accuracy"] == pytest.approx(0.75)
    assert scores["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_predictions_in_another_order_are_noticed():
    from fusion_adapters.runs.evaluation import Evaluation

    encoded = TOKENS.encode(examples(), tokenizer(), LABELS, 32)
    evaluation = Evaluation(TOKENS, LABELS, examples(), encoded)
    rows = evaluation.dataset["labels"]
    width = max(map(len, rows))
    labels = torch.tensor([row + [IGNORED] * (width - len(row)) for row in rows])
    assert evaluation.scores(labels.clamp(min=0), labels)["f1"] == 1.0
    with pytest.raises(RuntimeError, match="another order"):
        evaluation.scores(labels.flip(0).clamp(min=0), labels.flip(0))


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 40,
}


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**SIZES, intermediate_size=32),
        RobertaConfig(**SIZES, intermediate_size=32, pad_token_id=1),
        GPT2Config(**SIZES),
        OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=32),
        LlamaConfig(**SIZES, intermediate_size=32),
    ],
    ids=lambda config: config.model_type,
)
def test_the_longest_row_that_is_let_through_is_the_longest_that_runs(config):
    model = AutoModel.from_config(config).eval()

    def runs(length):
        try:
            model(input_ids=torch.full((1, length), 7))
        except (RuntimeError, IndexError):
            return False
        return True

    def passes(length):
        try:
            check_lengths(model, [{"input_ids": [7] * 3}, {"input_ids": [7] * length}])
        except ValueError as error:
            assert f"has {length} pieces, but the backbone has " in str(error)
            return False
        return True

    for length in range(35, 45):
        assert passes(length) == runs(length), length
