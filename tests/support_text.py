"""A tiny tokenizer and model on disk, and small data files, for runs from recipes."""

from __future__ import annotations

import torch
import yaml
from support import tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ("anna", "bob", "lives", "works", "in", "at", "oslo", "rome", "acme", "corp", "the", "old", "man", ".")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"

SENTENCES = [
    [("Anna", "B-PER"), ("lives", "O"), ("in", "O"), ("Oslo", "B-LOC"), (".", "O")],
    [("Bob", "B-PER"), ("Man", "I-PER"), ("works", "O"), ("at", "O"), ("Acme", "B-ORG"), ("Corp", "I-ORG")],
    [("the", "O"), ("old", "O"), ("man", "O"), ("in", "O"), ("Rome", "B-LOC")],
]


def tokenizer(mask=False):
    """WordPiece over a few words and all letters; special tokens as BERT's, `[MASK]` last if asked for."""
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *WORDS,
        *LETTERS,
        *(f"##{c}" for c in LETTERS),
        *(["[MASK]"] if mask else []),
    ]
    inner = Tokenizer(models.WordPiece({p: i for i, p in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", inner.token_to_id("[CLS]")), ("[SEP]", inner.token_to_id("[SEP]"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        **({"mask_token": "[MASK]"} if mask else {}),
    )


def save_model(folder, head="token", mask=False, **options):
    """Saves a tiny BERT backbone with its tokenizer."""
    tiny("bert", head, **options).save_pretrained(folder)
    tokenizer(mask).save_pretrained(folder)
    return folder


def byte_tokenizer():
    """Byte-level BPE as GPT-2's: all 256 bytes, and the words with and without a space before them; no BOS."""
    inner = Tokenizer(models.BPE(unk_token=None))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), vocab_size=330, show_progress=False
    )
    inner.train_from_iterator([" ".join((*WORDS, *WORDS, "a \u2019 b"))] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", model_max_length=64)


def save_decoder(folder):
    """Saves a tiny Llama, without a head over texts, with a byte-level tokenizer."""
    words = byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, intermediate_size=64, vocab_size=len(words), pad_token_id=words.pad_token_id)
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def conll(sentences):
    """Sentences of (word, tag) as the text of a CoNLL file."""
    return "\n\n".join("\n".join(f"{word}\t{tag}" for word, tag in sentence) for sentence in sentences) + "\n"


def write_changed(folder, recipe, changes):
    """Writes a recipe with some keys changed, those of a section one by one; returns its path."""
    for key, value in changes.items():
        recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def write_recipe(folder, head="token", **changes):
    """Writes model, data and a recipe of one epoch; returns the recipe's path."""
    save_model(folder / "model", head)
    if head == "token":
        (folder / "train.conll").write_text(conll(SENTENCES * 4), encoding="utf-8")
        (folder / "test.conll").write_text(conll(SENTENCES), encoding="utf-8")
        data = {"path": str(folder), "train": "train.conll", "test": "test.conll"}
    else:
        rows = [("anna lives in oslo", "place"), ('bob, "the old man"', "person"), ("NA", "none")] * 4
        lines = ["text,label", *('"{}",{}'.format(t.replace('"', '""'), y) for t, y in rows)]
        (folder / "train.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        data = {"path": str(folder), "train": "train.csv", "test": "train.csv"}
    recipe = {
        "task": "token_classification" if head == "token" else "sequence_classification",
        "backbone": {"model": str(folder / "model")},
        "adapter": {"fusion": "dwatt"},
        "data": data,
        "training": {"num_train_epochs": 1, "per_device_train_batch_size": 4, "disable_tqdm": True},
    }
    return write_changed(folder, recipe, changes)
