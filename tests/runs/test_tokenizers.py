"""Tokenizers as models bring them: words given one by one have the pieces of running text, and padding is where the model looks."""

import pytest
import torch
from peft import get_peft_model
from support import tiny
from support_text import byte_tokenizer, tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fusion_adapters import FusionConfig
from fusion_adapters.runs.recipe import BackboneRecipe
from fusion_adapters.runs.tokenizers import REST, load_tokenizer, match_padding, pieces_as_text
from fusion_adapters.tasks.base import IGNORED, Example
from fusion_adapters.tasks.registry import TASKS

TEXT = "anna lives in oslo and it's bob who works at acme corp"
SPLIT = pre_tokenizers.Split(Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\s+"), "isolated")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
KINDS = {
    "llama3": (pre_tokenizers.Sequence([SPLIT, BYTES]), None),
    "qwen2": (pre_tokenizers.Sequence([SPLIT, BYTES]), normalizers.NFC()),
    "gpt2": (pre_tokenizers.ByteLevel(add_prefix_space=False), None),
    "first": (pre_tokenizers.Metaspace(prepend_scheme="first"), None),
    "always": (pre_tokenizers.Metaspace(prepend_scheme="always"), None),
    "whitespace": (pre_tokenizers.Whitespace(), None),
}


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    before, normalizer = KINDS[request.param]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = before
    if normalizer is not None:
        inner.normalizer = normalizer
    letters = pre_tokenizers.ByteLevel.alphabet() if request.param in ("llama3", "qwen2", "gpt2") else []
    inner.train_from_iterator([TEXT, f"so {TEXT}"] * 20, trainers.BpeTrainer(vocab_size=500, initial_alphabet=letters))
    inner.add_special_tokens(["</s>"])
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(tmp_path)
    return tmp_path


def test_words_have_the_pieces_of_running_text(folder):
    tokenizer = load_tokenizer(BackboneRecipe(model=str(folder)), TASKS["token_classification"])
    words = TEXT.split()
    (row,) = TASKS["token_classification"].encode([Example(words, ["B-X"] * len(words))], tokenizer, ["B-X"], 64).rows
    text = tokenizer(f"so {TEXT}")["input_ids"]
    first = tokenizer("so")["input_ids"]
    assert row["input_ids"] == text[len(first) :]
    assert sum(label != IGNORED for label in row["labels"]) == len(words)


def test_texts_stay_as_they_are(folder):
    as_saved = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = load_tokenizer(BackboneRecipe(model=str(folder)), TASKS["sequence_classification"])
    assert tokenizer(TEXT)["input_ids"] == as_saved(TEXT)["input_ids"]


def test_a_padding_token_that_model_and_tokenizer_disagree_on(folder):
    tokenizer = load_tokenizer(BackboneRecipe(model=str(folder)), TASKS["sequence_classification"])
    tokenizer.pad_token_id = 7
    model = tiny("llama", "sequence")
    assert model.config.pad_token_id == 0
    match_padding(model, tokenizer)
    model = get_peft_model(model, FusionConfig(task_type="SEQ_CLS")).eval()
    short = torch.tensor([[11, 12, 13]])
    padded = {"input_ids": torch.tensor([[11, 12, 13, 7, 7]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    with torch.no_grad():
        torch.testing.assert_close(model(**padded).logits, model(input_ids=short).logits)


def texts_of(words, text):
    return pieces_as_text(words, words.convert_ids_to_tokens(words(text)["input_ids"]))


def test_byte_level_pieces_are_shown_as_text():
    words = byte_tokenizer()
    text = "anna\u2019s man lives\n in \u00fc \U0001f642<pad>"
    shown = texts_of(words, text)
    assert "".join(piece for piece in shown if piece != REST) == text
    assert {"anna", " man", " lives", "\u2019", "\U0001f642", "\n", "<pad>"} <= set(shown)
    assert len(shown) == len(words(text)["input_ids"])
    half = words.convert_ids_to_tokens(words("a \U0001f642")["input_ids"])[:-1]  # a text that was cut off
    assert pieces_as_text(words, half)[-1] == "\ufffd" and len(pieces_as_text(words, half)) == len(half)


def test_pieces_of_others_are_shown_as_text():
    assert texts_of(tokenizer(), "annas lives") == ["[CLS]", "anna", "##s", "lives", "[SEP]"]
    inner = Tokenizer(models.BPE({"\u2581": 0, "\u2581a": 1, "b": 2, "a": 3}, [("\u2581", "a")]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert texts_of(PreTrainedTokenizerFast(tokenizer_object=inner), "ab a b") == ["a", "b", "a", " ", "b"]
