"""Folders of runs of different tasks on one tiny backbone, with adapters that have an effect; nothing is trained."""

from __future__ import annotations

import json

import support_causal
import torch
from support import disturb, tiny
from support_text import tokenizer

from fusion_adapters.runs.attaching import adapter_config, load_attached
from fusion_adapters.runs.recipe import parse_recipe

TAGS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
CLASSES = ["person", "place", "none"]
LORA = {"bert": {"r": 2, "target_modules": ["query"]}, "llama": {"r": 2, "target_modules": ["q_proj"]}}


def save_backbone(folder, family="bert", head=None, **options):
    """A tiny model with a tokenizer that knows its mask, or a chat."""
    if family == "bert":
        model, words = tiny("bert", head or "sequence", **options), tokenizer(mask=True)
    else:
        model, words = support_causal.model(**options), support_causal.tokenizer()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # fresh ones are all zero, and none is missed
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def make_run(folder, backbone, task, labels=(), *, data=None, seed=0, **adapter):
    """Writes what `train` leaves of a run, as far as it is read again; returns the folder."""
    described = backbone if isinstance(backbone, dict) else {"model": str(backbone)}
    values = {"task": task, "backbone": described, "adapter": adapter, "data": {"path": ".", **(data or {})}, "seed": seed}
    recipe = parse_recipe(values, "recipe")
    model, _ = load_attached(recipe, adapter_config(recipe), list(labels))
    torch.manual_seed(seed)
    disturb(model, 0.3).save_pretrained(folder / "adapter")
    content = {"recipe": recipe.model_dump(), "labels": list(labels)}
    (folder / "run.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def mixed_runs(folder, family="bert"):
    """Runs of many kinds on one backbone, by name; the folders are named so."""
    backbone = save_backbone(folder / "model", family)
    lengths = {"max_length": 12}

    def run(name, *args, **fields):
        return make_run(folder / name, backbone, *args, **fields)

    runs = {
        "ner": run("ner", "token_classification", TAGS, fusion="dwatt"),
        "intent": run("intent", "sequence_classification", CLASSES, fusion="concat", seed=1),
        "short": run("short", "sequence_classification", CLASSES[:2], data=lengths, fusion="scalar_mix", seed=2),
        "stars": run("stars", "regression", fusion="laya", seed=3),
        "topic": run("topic", "sequence_classification", CLASSES, fusion="dwconcat", fusion_pool="mean", seed=4),
        "lower": run("lower", "token_classification", TAGS[:3], fusion="concat", fusion_depth=2, seed=5),
        "deep": run("deep", "sequence_classification", CLASSES, fusion="deeper", seed=6),
        "lora": run("lora", "sequence_classification", CLASSES, fusion="dwatt", **LORA[family], seed=7),
    }
    if family == "llama":
        data = {"max_new_tokens": 6}
        runs["writes"] = run("writes", "causal_lm", fusion="concat", data=data, seed=8)
        runs["answers"] = run("answers", "causal_lm", fusion="dwatt", data={**data, "chat": True}, seed=9)
    return runs
