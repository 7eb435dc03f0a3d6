"""Tiny random backbones, batches, and the handling that many tests share."""

from __future__ import annotations

import torch
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

import fusion_adapters
from fusion_adapters import FUSIONS, FusionConfig

BACKBONES = ("bert", "llama")
WIDTH, DEPTH, LABELS, VOCABULARY = 32, 4, 5, 120
LORA = {"bert": {"r": 4, "target_modules": ["query", "value"]}, "llama": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}
HEADS = {
    ("bert", "token"): BertForTokenClassification,
    ("bert", "sequence"): BertForSequenceClassification,
    ("bert", "mlm"): BertForMaskedLM,
    ("llama", "token"): LlamaForTokenClassification,
    ("llama", "sequence"): LlamaForSequenceClassification,
    ("llama", "lm"): LlamaForCausalLM,
}
TASKS = {"token": "TOKEN_CLS", "sequence": "SEQ_CLS", "lm": "CAUSAL_LM"}
# every method with its defaults, its paper form, and its further options
METHODS = {name: {"fusion": name} for name in FUSIONS} | {
    "dwatt-1-head": {"fusion": "dwatt", "fusion_heads": 1, "fusion_scale": False, "fusion_dropout": 0.2},
    "concat-bottleneck": {"fusion": "concat", "fusion_bottleneck": 8},
    "deeper-copy": {"fusion": "deeper", "fusion_copy_last": True, "fusion_num_blocks": 2},
    "dwatt-uniform": {"fusion": "dwatt", "fusion_weights": "uniform"},
    "dwconcat-uniform": {"fusion": "dwconcat", "fusion_weights": "uniform", "fusion_layers": [0, 2, -1]},
    "dwatt-layers": {"fusion": "dwatt", "fusion_layers": [0, -1]},
}
# every method in both backbones, with LoRA in one of them
ALTERNATING = [(family, method, (i + j) % 2 == 1) for i, family in enumerate(BACKBONES) for j, method in enumerate(METHODS)]


def tiny(
    family="bert",
    head="token",
    seed=0,
    width=WIDTH,
    depth=DEPTH,
    dtype=torch.float32,
    dropout=0.1,
    labels=LABELS,
    **settings,
):
    """A random model of 4 blocks of width 32 with a task head; the same weights for the same arguments."""
    torch.manual_seed(seed)
    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "intermediate_size": 2 * width,
        "num_labels": labels,
        "pad_token_id": 0,
    }
    if family == "bert":
        config = BertConfig(**shared, **settings, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    else:
        config = LlamaConfig(**shared, **settings, num_key_value_heads=2, attention_dropout=dropout)
    return HEADS[family, head](config).to(dtype).eval()


def batch(head="token", labels=LABELS, seed=0):
    """Two sequences of nine tokens, the second with two padded positions."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    ids[1, 7:] = 0
    result = {"input_ids": ids, "attention_mask": mask}
    if head == "token":
        result["labels"] = torch.randint(0, labels, ids.shape, generator=generator).masked_fill(mask == 0, -100)
    elif head == "sequence":
        result["labels"] = torch.randint(0, labels, (2,), generator=generator)
    else:
        result["labels"] = ids.masked_fill(mask == 0, -100)
    return result


def attached(family="bert", head="token", model=None, **fields):
    """A tiny model with an adapter."""
    model = tiny(family, head) if model is None else model
    return get_peft_model(model, FusionConfig(task_type=TASKS.get(head), **fields))


def disturb(model, scale=0.1):
    """Moves all trainable parameters off their start, so that an adapter has an effect: what they count for moves by `scale`."""
    torch.manual_seed(1)
    alphas = {adapter: getattr(config, "alpha", 1) for adapter, config in getattr(model, "peft_config", {}).items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                counted = ".fusions." in name or ".modules_to_save." in name
                alpha = next((a for adapter, a in alphas.items() if counted and f".{adapter}." in name), 1)
                parameter.add_(scale / alpha * torch.randn_like(parameter))
    return model


def without_dropout(model):
    """Switches dropout off, modules and functional, so that training mode is deterministic."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "dropout_rate"):  # functional dropout
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def logits(model, head="token"):
    """The answer of a model in evaluation mode to the common batch."""
    model.eval()
    with torch.no_grad():
        return model(**batch(head)).logits


def layer_of(model):
    """The fusion layer of an attached model."""
    (layer,) = fusion_adapters.tuner.fusion_layers(model)
    return layer
