"""README and docs: the Python code runs, links lead somewhere, tables and numbers are those of their sources."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from support_answering import CLASSES, TAGS, make_run
from support_docs import LANGUAGE_PAGES, names_of_language_pages
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification, LlamaConfig

from fusion_adapters import FUSIONS, FusionConfig
from fusion_adapters.bench import load_bench
from fusion_adapters.fusions import fusion_options
from fusion_adapters.runs.pretrained import locate
from fusion_adapters.runs.recipe import BackboneRecipe, load_recipe
from fusion_adapters.runs.shortcut_recipe import ShortcutFields, load_shortcut_recipe
from fusion_adapters.runs.tokenizers import load_tokenizer
from fusion_adapters.study import load_study
from fusion_adapters.tasks.readers import READERS
from fusion_adapters.tasks.registry import TASKS
from fusion_adapters.tuner.costs import count_config
from fusion_adapters.tuner.counts import skeleton

ROOT = Path(__file__).parents[2]
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    code = blocks(page)
    if not code:
        return
    folder, _ = locate(BackboneRecipe(model=MINILM))
    if folder == MINILM:
        pytest.skip("the package with the MiniLM weights is not installed (extra: demo)")
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer(BackboneRecipe(model=MINILM), TASKS["token_classification"])
    rows = [
        {**tokenizer(text), "labels": [0] * len(tokenizer(text)["input_ids"])} for text in ("A short text.", "And another.")
    ]
    names = {
        "name": folder,
        "collator": DataCollatorForTokenClassification(tokenizer),
        "train_set": Dataset.from_list(rows),
        "batch": tokenizer(["A short text."], return_tensors="pt"),
        "texts": ["A short text."],
    }
    if any('"outputs/' in block for block in code):
        make_run(tmp_path / "outputs" / "ner", MINILM, "token_classification", TAGS)
        make_run(tmp_path / "outputs" / "intent", MINILM, "sequence_classification", CLASSES)
    names["model"] = get_peft_model(
        AutoModelForTokenClassification.from_pretrained(folder, num_labels=9), FusionConfig(task_type="TOKEN_CLS")
    )
    if page in LANGUAGE_PAGES:
        names.update(names_of_language_pages(tmp_path))
    for block in code:
        names["backbone"] = AutoModelForTokenClassification.from_pretrained(folder, num_labels=9)
        exec(compile(block.replace(f'"{MINILM}"', repr(folder)), page, "exec"), names)
    if page == "README.md":
        assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 5_000_000
    if "weights" in names:
        torch.testing.assert_close(names["weights"].sum(-1), torch.ones(names["weights"].shape[:-1]))


def anchors(page):
    """The names that links to the headings of a page have on GitHub."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text(encoding="utf-8")):
            if not target.startswith("http"):
                name, _, anchor = target.partition("#")
                file = (ROOT / page).parent / name if name else ROOT / page
                assert file.exists(), f"{page} links to {target}"
                assert not anchor or anchor in anchors(file), f"{page} links to {target}"


def test_every_page_is_found_from_the_readme():
    seen, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        seen.add(page)
        links = re.findall(r"\]\(([^)#]+\.md)", page.read_text(encoding="utf-8"))
        ahead += {(page.parent / link).resolve() for link in links if not link.startswith("http")} - seen
    assert not {ROOT / page for page in PAGES} - seen


def test_the_files_that_contributing_names_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in set(re.findall(r"[\w/]+\.py\b", text)) - {"fusions/NAME.py", "tasks/NAME.py"}:
        found = [path for room in ("fusion_adapters", "tests", "recipes") for path in ROOT.glob(f"{room}/**/{name}")]
        assert found or (ROOT / name).is_file(), f"CONTRIBUTING.md names {name}"


@pytest.mark.parametrize("page", PAGES)
def test_prose_keeps_to_its_line_length(page):
    lines = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S).splitlines()
    assert not [line for line in lines if len(line) >= 140 and not line.startswith(("|", "<!--"))]


def test_tables_that_name_a_csv_file_are_what_the_script_prints():
    spec = importlib.util.spec_from_file_location("table", ROOT / "docs" / "results" / "table.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    checked = set()
    for page in (ROOT / "docs" / "results").glob("*.md"):
        for arguments, shown in re.findall(r"<!-- table\.py (.*?) -->\n\n((?:\|.*\n)+)", page.read_text(encoding="utf-8")):
            assert shown.rstrip("\n") == script.table(shlex.split(arguments)), f"{page.name}: table.py {arguments}"
            checked.add(shlex.split(arguments)[0])
        marked = page.read_text(encoding="utf-8").count("<!-- table.py")
        assert marked == len(re.findall(r"<!-- table\.py .*? -->\n\n\|", page.read_text(encoding="utf-8"))), page.name
    assert checked == {path.name for path in (ROOT / "docs" / "results").glob("*.csv")}


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_is_valid_explains_itself_and_stands_in_the_docs(recipe):
    text = recipe.read_text(encoding="utf-8")
    assert text.startswith("# ") and "# Shows:" in text and "# Expect:" in text
    if "\nmethods:" in text:
        load_study(recipe)
        load_study(recipe, quick=True)
    elif recipe.parent.name == "benchmark":
        load_bench(recipe)
    elif recipe.name.startswith("shortcuts_"):
        load_shortcut_recipe(recipe)
    else:
        load_recipe(recipe)
    assert f"`{recipe.relative_to(ROOT / 'recipes')}`" in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_the_recipe_in_the_docs_is_valid_also_with_the_lines_that_other_tasks_change(tmp_path):
    lines = {}
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 3
    for block in blocks:
        lines.update({line.partition(":")[0]: line for line in block.splitlines()})
        (tmp_path / "recipe.yaml").write_text("\n".join(lines.values()))
        load_recipe(tmp_path / "recipe.yaml")


def test_the_recipe_and_the_options_of_shortcuts_in_the_docs_are_those_of_the_code(tmp_path):
    text = (ROOT / "docs" / "shortcuts.md").read_text(encoding="utf-8")
    found = re.findall(r"```yaml\n(.*?)```", text, flags=re.S)
    assert found
    for number, block in enumerate(found):
        (tmp_path / f"{number}.yaml").write_text(block)
        load_shortcut_recipe(tmp_path / f"{number}.yaml")
    told = {
        row[0].strip("`"): row[1].strip("`")
        for row in table("docs/shortcuts.md", "option of `FitOptions`, key in `shortcuts:`")
    }
    defaults = {name: field.default for name, field in ShortcutFields.model_fields.items()}
    words = {"sources": "all", "rank": "whole", "positions": "by task", "skip": "1 if causal"}  # for None
    written = {True: "yes", 0.0: "0"}
    assert told == {
        name: words[name] if value is None else written.get(value, str(value)) for name, value in defaults.items()
    }


def test_tasks_and_formats_in_the_docs_are_those_of_the_code():
    rows = table("docs/recipes.md", "`task`")
    assert [row[0].strip("`") for row in rows] == list(TASKS)
    for (_, _, texts, labels, scores), task in zip(rows, TASKS.values(), strict=True):
        if labels != "as above":
            assert re.findall(r"`(\w+)`", labels) == list(task.label_columns), task.name
        assert re.findall(r"`(\w+)`", texts) == [word for name in task.text_columns for word in name.split(" and ")], (
            task.name
        )
        assert task.main.name in scores.split(",")[0].lower(), task.name
    formats = {row[0].strip("`"): re.findall(r"`([.\w]+)`", row[1]) for row in table("docs/recipes.md", "`data.format`")}
    assert formats == {name: list(reader.suffixes) for name, reader in READERS.items()}


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
        model = skeleton(LlamaConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=64))
        assert int(size.replace(",", "")) == count_config(FusionConfig(fusion=name), model)["fusion"], name


def test_every_method_and_option_stands_in_the_docs():
    readme, methods = ((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/methods.md"))
    fields = set(FusionConfig.__dataclass_fields__)
    for name in FUSIONS:
        assert f"`{name}`" in readme and f"`{name}`" in methods
        assert {f"fusion_{option}" for option in fusion_options(name)} <= fields
