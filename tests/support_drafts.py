"""Tiny causal models whose next tokens follow a rule, rows of them, and drafters trained on these."""

from __future__ import annotations

import functools

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from fusion_adapters.shortcuts import DrafterOptions, RowStates, train_drafter

VOCABULARY, EOS, PAD = 61, 2, 0


def model(seed=0, scale=0.3, **options):
    """A random Llama of three blocks of width 32, whose two best logits are often close."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 64, "vocab_size": VOCABULARY, "initializer_range": scale}
    config = LlamaConfig(**{**sizes, "eos_token_id": EOS, "pad_token_id": PAD, "tie_word_embeddings": True, **options})
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def collator(rows):
    return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}


def prompts(count, seed=1, shortest=3, longest=9):
    """Token rows of random length."""
    drawn = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=drawn).tolist()
    return [torch.randint(3, VOCABULARY, (1, n), generator=drawn) for n in lengths]


@torch.no_grad()
def written(llm, count=64, length=24, seed=3):
    """Rows that a model writes itself, greedily, after three random tokens: what drafts are to foresee."""
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, 3), generator=drawn)
    rows = llm.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=length - 3, do_sample=False, eos_token_id=None
    )
    return [{"input_ids": row} for row in rows.tolist()]


def drafter(llm, rows=None, **options):
    """A drafter of layers 1, 2 and 3, trained within seconds."""
    rows = written(llm) if rows is None else rows
    options = {"layers": [1, 2, 3], "tokens": 48, "epochs": 6, "learning_rate": 3e-3, **options}
    states = RowStates(llm, rows, collator, range(llm.config.num_hidden_layers + 1), progress=False)
    return train_drafter(llm, rows, states, DrafterOptions(**options), progress=False)


@functools.cache
def shared():
    """A model and its drafter, for tests that change neither."""
    llm = model()
    return llm, drafter(llm).drafter


def family(name):
    """A tiny model of another kind: learned positions, a window that texts outgrow, a head with a bias of its own."""
    torch.manual_seed(4)
    if name == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=VOCABULARY, initializer_range=0.3, eos_token_id=EOS)
        config.pad_token_id = PAD
        return GPT2LMHeadModel(config).eval().requires_grad_(False)
    if name == "sliding":
        sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = MistralConfig(
            **sizes, intermediate_size=64, vocab_size=VOCABULARY, initializer_range=0.3, sliding_window=7, eos_token_id=EOS
        )
        config.pad_token_id = PAD
        return MistralForCausalLM(config).eval().requires_grad_(False)
    config = PhiConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, vocab_size=VOCABULARY
    )
    config.initializer_range, config.eos_token_id, config.pad_token_id = 0.3, EOS, PAD
    llm = PhiForCausalLM(config).eval().requires_grad_(False)
    llm.lm_head.bias.copy_(torch.randn(VOCABULARY))
    return llm
