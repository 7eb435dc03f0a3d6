"""A tiny causal model with a tokenizer that knows a chat template, texts, and recipes of causal language modelling."""

from __future__ import annotations

import json

import torch
import yaml
from support_text import WORDS, write_changed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fusion_adapters.tasks.registry import TASKS

TASK = TASKS["causal_lm"]
TEXTS = [
    "anna lives in oslo.",
    "bob works at acme corp in the old rome.",
    "the old man lives",
    "the man at the corp works in oslo.",
    "rome",
    "bob and anna, the old man and the corp: all live in oslo and at other unusual places.",
]
PAIRS = [("where does anna live", "oslo"), ("where does bob work", "acme corp"), ("who lives", "the old man")]
# ChatML, as SmolLM2 and Qwen have it
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# leaves out of earlier answers what the last one has, as templates of thinking models do
FORGETFUL = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' else '...' }}")


def tokenizer(bos=False, template=CHATML):
    """Byte-level BPE, all 256 bytes; `<|im_end|>` ends texts, and `<s>` begins them if asked for."""
    inner = Tokenizer(models.BPE(unk_token=None))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<s>"]
    trainer = trainers.BpeTrainer(
        special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), vocab_size=330, show_progress=False
    )
    inner.train_from_iterator([" ".join((*WORDS, *WORDS, "user assistant"))] * 4, trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=template,
        model_max_length=512,
        **({"bos_token": "<s>"} if bos else {}),
    )


def model(seed=0, tied=True):
    """A random Llama of four blocks of width 32, with embeddings large enough to prefer one piece to all others."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes["initializer_range"] = 0.3
    config = LlamaConfig(
        **sizes,
        intermediate_size=64,
        vocab_size=330,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def save_model(folder, **options):
    model(**options).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_data(folder):
    """The texts as lines, the pairs as columns, and as conversations."""
    for name in ("train", "test"):
        times = 5 if name == "train" else 1
        (folder / f"{name}.txt").write_text("\n\n".join(TEXTS * times) + "\n", encoding="utf-8")
        rows = [{"question": asked, "answer": answer} for asked, answer in PAIRS * times]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        talks = [
            {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in PAIRS * times
        ]
        (folder / f"{name}-chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks), encoding="utf-8")


FORMS = {
    "text": {"train": "train.txt", "test": "test.txt"},
    "packed": {"train": "train.txt", "test": "test.txt", "packing": True},
    "completion": {
        "train": "train.jsonl",
        "test": "test.jsonl",
        "text": "question",
        "completion": "answer",
        "max_length": 48,
    },
    "chat": {
        **{"train": "train.jsonl", "test": "test.jsonl", "text": "question", "completion": "answer"},
        **{"chat": True, "max_length": 80},
    },
    "messages": {"train": "train-chat.jsonl", "test": "test-chat.jsonl", "chat": True, "max_length": 80},
}


def write_files(folder, form="text", **changes):
    """Model, data and a recipe; returns the recipe's path."""
    save_model(folder / "model")
    write_data(folder)
    recipe = {
        "task": TASK.name,
        "backbone": {"model": str(folder / "model")},
        "adapter": {"fusion": "dwatt", "fusion_heads": 2},
        "data": {"path": str(folder), "max_length": 16, **FORMS[form]},
        "training": {"num_train_epochs": 2, "per_device_train_batch_size": 4, "disable_tqdm": True},
    }
    return write_changed(folder, recipe, changes)


def write_study(folder, form="packed", **changes):
    save_model(folder / "model")
    write_data(folder)
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    study = {
        "task": TASK.name,
        "backbone": {"model": str(folder / "model")},
        "data": {"toy": {"path": str(folder), "max_length": 16, **FORMS[form]}},
        "methods": {
            "bare": {"adapter": {"fusion": "last"}, "rates": [1e-3]},
            "dwatt": {"adapter": {"fusion": "dwatt", "fusion_heads": 2}},
            "lora": {"adapter": {"fusion": "last", **lora}},
            "lora and dwatt": {"adapter": {"fusion": "dwatt", "fusion_heads": 2, **lora}},
        },
        "baseline": "bare",
        "reference": "lora",
        "sizes": ["all"],
        "seeds": [1],
        "rates": [1e-3, 1e-2],
        "epochs": 2,
        "evaluations": 2,
        "training": {"per_device_train_batch_size": 4},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**study, **changes}, sort_keys=False), encoding="utf-8")
    return path
