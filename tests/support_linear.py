"""Tiny decoders and rows for shortcuts, stand-ins and removed blocks."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY, WIDTH, DEPTH = 40, 16, 4


def decoder(family="llama", depth=DEPTH, seed=0, **settings):
    """A random language model of blocks that differ, with untied and lively weights."""
    torch.manual_seed(seed)
    if family == "gpt2":
        config = GPT2Config(
            **{"n_embd": WIDTH, "n_layer": depth, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 64},
            **{"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2, **settings},
        )
        model = GPT2LMHeadModel(config)
    else:
        shape = {"hidden_size": WIDTH, "num_hidden_layers": depth, "num_attention_heads": 2, "num_key_value_heads": 1}
        shape |= {"intermediate_size": 24, "vocab_size": VOCABULARY, "initializer_range": 0.2, "pad_token_id": 0}
        model = LlamaForCausalLM(LlamaConfig(**{**shape, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases: off their 1 and 0
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" in name or "wte" in name:
                parameter.mul_(5)
    return model.requires_grad_(False).eval()


def some_rows(count=12, seed=0, lengths=(9, 20)):
    """Rows of random tokens of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(*lengths, (), generator=generator))
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * length})
    return rows


def padded(rows):
    """A collator: pads on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    return {
        name: torch.tensor([row[name] + [0] * (longest - len(row[name])) for row in rows])
        for name in ("input_ids", "attention_mask")
    }
