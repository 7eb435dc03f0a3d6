"""The Python code in README and docs runs as it stands; the names that a reader brings along are given."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

from fusion_adapters import FUSIONS, FusionConfig
from fusion_adapters.bench import load_bench
from fusion_adapters.fusions import build_fusion, fusion_options
from fusion_adapters.runs.pretrained import resolve_model
from fusion_adapters.runs.recipe import BackboneRecipe, load_recipe
from fusion_adapters.runs.tokenizers import load_tokenizer
from fusion_adapters.study import load_study
from fusion_adapters.tasks.registry import TASKS

ROOT = Path(__file__).parents[2]
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    code = blocks(page)
    if not code:
        return
    folder = resolve_model(MINILM)
    if folder == MINILM:
        pytest.skip("the package with the MiniLM weights is not installed (extra: demo)")
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer(BackboneRecipe(model=MINILM), TASKS["token_classification"])
    rows = [
        {**tokenizer(text), "labels": [0] * len(tokenizer(text)["input_ids"])} for text in ("A short text.", "And another.")
    ]
    names = {
        "name": folder,
        "backbone": AutoModelForTokenClassification.from_pretrained(folder, num_labels=9),
        "collator": DataCollatorForTokenClassification(tokenizer),
        "train_set": Dataset.from_list(rows),
        "batch": tokenizer(["A short text."], return_tensors="pt"),
    }
    names["model"] = get_peft_model(
        AutoModelForTokenClassification.from_pretrained(folder, num_labels=9), FusionConfig(task_type="TOKEN_CLS")
    )
    for block in code:
        exec(compile(block.replace(f'"{MINILM}"', repr(folder)), page, "exec"), names)
    if page == "README.md":
        assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 5_000_000
    if "weights" in names:
        torch.testing.assert_close(names["weights"].sum(-1), torch.ones(names["weights"].shape[:-1]))


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)\)", (ROOT / page).read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_is_valid_explains_itself_and_stands_in_the_docs(recipe):
    text = recipe.read_text(encoding="utf-8")
    assert text.startswith("# ") and "# Shows:" in text and "# Expect:" in text
    if "\nmethods:" in text:
        load_study(recipe)
        load_study(recipe, quick=True)
    elif recipe.parent.name == "benchmark":
        load_bench(recipe)
    else:
        load_recipe(recipe)
    assert f"`{recipe.relative_to(ROOT / 'recipes')}`" in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


def table(page, first):
    """The rows of the table whose first cell is that, as lists of cells."""
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = re.search(rf"^\| {re.escape(first)} \|.*\n\|[ -|]*\n((?:\|.*\n)+)", text, flags=re.M)[1]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows.splitlines()]


def test_the_options_and_defaults_in_the_docs_are_those_of_the_code():
    told = {}
    for names, options in table("docs/methods.md", "method"):
        for name in re.findall(r"`(\w+)`", names):
            told[name] = dict(re.findall(r"`(\w+)` ([^,;|]+)", options))
    written = {True: "true", False: "false"}
    # a default that the hidden size decides is told in words
    words = {
        "concat": {"bottleneck": "none: a single map"},
        "deeper": {"feedforward": "four hidden sizes", "heads": "of size 64"},
    }
    for name in FUSIONS:
        expected = {**fusion_options(name), **words.get(name, {})}
        found = told.pop(name, {})
        assert found.keys() == expected.keys(), name
        for option, default in expected.items():
            value = found[option].strip().strip('"').rstrip("|").strip()
            if isinstance(default, bool) or not isinstance(default, (int, float)):
                assert value == written.get(default, default), f"{name}, {option}"
            else:
                assert float(value) == default, f"{name}, {option}"
    assert not told


def test_the_sizes_in_the_readme_are_those_of_the_code():
    told = {}
    for names, _, sizes in table("README.md", "`fusion=`"):
        told.update(zip(re.findall(r"`(\w+)`", names), sizes.split(";"), strict=True))
    assert told.keys() == set(FUSIONS)
    for name, size in told.items():
        parameters = sum(p.numel() for p in build_fusion(name, 768, 12).parameters())
        assert int(size.replace(",", "")) == parameters, name


def test_every_method_and_option_stands_in_the_docs():
    readme, methods = ((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/methods.md"))
    fields = set(FusionConfig.__dataclass_fields__)
    for name in FUSIONS:
        assert f"`{name}`" in readme and f"`{name}`" in methods
        assert {f"fusion_{option}" for option in fusion_options(name)} <= fields
