"""What the code of pages on language models finds there: a small decoder of 30 blocks, rows, and shortcuts on disk."""

import torch
from support_text import byte_tokenizer
from transformers import DataCollatorWithPadding, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from fusion_adapters.shortcuts import FitOptions, fit_shortcuts, save_shortcuts

LANGUAGE_PAGES = ("docs/early_exit.md", "docs/drafts.md", "docs/removed_blocks.md")
TEXTS = (
    "the old man lives in oslo .",
    "anna works in rome at acme corp .",
    "bob lives at the old corp in rome .",
    "the man works .",
)


def names_of_language_pages(folder):
    """Names for the code of `LANGUAGE_PAGES`; writes shortcuts of the model to `folder / "shortcuts"`."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 30, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, intermediate_size=32, vocab_size=len(tokenizer), pad_token_id=0, num_labels=3)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    classifier = LlamaForSequenceClassification(config).eval().requires_grad_(False)
    classifier.model.load_state_dict(model.model.state_dict())
    rows = [dict(tokenizer(" ".join(text.split()[i:] + text.split()[:i]))) for text in TEXTS for i in range(6)]
    collator = DataCollatorWithPadding(tokenizer)
    shortcuts = fit_shortcuts(model, rows, collator, FitOptions(ridge=1e-2), progress=False).shortcuts
    save_shortcuts(shortcuts, model, folder / "shortcuts")
    return {
        "tokenizer": tokenizer,
        "model": model,
        "classifier": classifier,
        "rows": rows[:16],
        "dev_rows": rows[16:20],
        "test_rows": rows[20:],
        "collator": collator,
        "shortcuts": shortcuts,
        "inputs": tokenizer(TEXTS[0], return_tensors="pt"),
    }
