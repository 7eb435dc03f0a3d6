"""Five tasks on one backbone: trained from one extraction of layer states, answered from one pass, beside a LoRA for each.

Entities in messages (WNUT-17) and in an encyclopedia (WikiGold), intents of bank customers (Banking77), and two tasks that are made of
these data here: which of the three a text comes from, and whether a sentence speaks of a person. The recipes are in
recipes/five_tasks/. `python recipes/five_tasks.py --data FOLDER` prints scores and seconds of both ways, and answers a text by all
five. With the LoRAs it takes some twenty minutes on two cores, without them (`--without-lora`) five.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from pathlib import Path
from typing import Any

from fusion_adapters import load_recipe, load_runs, run_recipe
from fusion_adapters.runs.several import run_recipes

HERE = Path(__file__).parent / "five_tasks"
NAMES = ("entities", "wikigold", "intents", "corpus", "people")
# LoRA and a head on the last layer; 1e-3 was its best rate on WNUT-17 (docs/results/lora.md), and is not searched for here
LORA = [
    "adapter.fusion=last",
    "adapter.fusion_alpha=1",
    "adapter.fusion_pool=null",
    "adapter.r=8",
    "adapter.lora_alpha=16",
    "adapter.target_modules=[query, value]",
    "training.learning_rate=1e-3",
]
OF_EACH, HELD_OUT, SEED = 700, 0.25, 0


def sentences(file: Path) -> list[tuple[list[str], list[str]]]:
    """Words and tags of the sentences of a CoNLL file."""
    found, words, tags = [], [], []
    for line in [*file.read_text(encoding="utf-8").splitlines(), ""]:
        parts = line.split()
        if len(parts) >= 2:
            words.append(parts[0])
            tags.append(parts[-1])
        elif words:
            found.append((words, tags))
            words, tags = [], []
    return found


def make_data(data: Path, folder: Path) -> None:
    """Writes the examples of the two tasks that are made here."""
    drawn = random.Random(SEED)
    messages = sentences(data / "ner-wnut17" / "wnut17train.conll")
    articles = sentences(data / "ner-wikigold" / "wikigold.conll.txt")
    with (data / "cls-banking77" / "train.csv").open(encoding="utf-8", newline="") as file:
        questions = [row["text"] for row in csv.DictReader(file)]
    texts = {
        "message": [" ".join(words) for words, _ in messages],
        "encyclopedia": [" ".join(words) for words, _ in articles],
        "bank": questions,
    }
    corpus = [{"text": text, "label": name} for name, own in texts.items() for text in drawn.sample(own, OF_EACH)]
    people: dict[str, list[str]] = {"person": [], "none": []}
    for words, tags in messages + articles:
        people["person" if any("PER" in tag.upper() for tag in tags) else "none"].append(" ".join(words))
    balanced = [{"text": text, "label": name} for name, own in people.items() for text in drawn.sample(own, OF_EACH)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus", corpus), ("people", balanced)):
        drawn.shuffle(rows)
        cut = round(len(rows) * HELD_OUT)
        for split, part in (("test", rows[:cut]), ("train", rows[cut:])):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            (folder / f"{name}.{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def located(name: str, data: Path, made: Path) -> list[str]:
    """The setting that tells a recipe where its data are."""
    folder = load_recipe(HERE / f"{name}.yaml").data.path
    return [f"data.path={made if folder.startswith('outputs') else data / Path(folder).name}"]


def score(metrics: dict[str, Any]) -> float:
    """The test score of a run, of 100: entity F1 or accuracy."""
    found = metrics["scores"]["test"]
    return 100 * next(found[name] for name in ("f1", "accuracy") if name in found)


def main() -> None:
    """Trains both ways, prints the table, and answers a text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output", type=Path, default=Path("outputs/five_tasks"))
    parser.add_argument("--text", default="Barack Obama flew to Oslo and still waits for his new card")
    parser.add_argument("--without-lora", action="store_true", help="train the fusions alone")
    given = parser.parse_args()
    made = given.output / "data"
    make_data(given.data, made)
    settings = {name: located(name, given.data, made) for name in NAMES}
    recipes = {name: load_recipe(HERE / f"{name}.yaml", settings[name]) for name in NAMES}
    outcomes = run_recipes(recipes, given.output / "fusions", given.output / "states")
    rows = {name: [outcome.metrics] for name, outcome in outcomes.items()}
    for name in () if given.without_lora else NAMES:
        lora = load_recipe(HERE / f"{name}.yaml", settings[name] + LORA)
        rows[name].append(run_recipe(lora, given.output / "lora" / name, overwrite=True))
    ways = ("fusion", "LoRA")[: len(rows[NAMES[0]])]
    print("| task | test examples | " + " | ".join(f"{way} | training, s" for way in ways) + " |")
    print("| --- | ---: |" + " ---: | ---: |" * len(ways))
    for name, found in rows.items():
        scores = " | ".join(f"{score(metrics):.1f} | {metrics['seconds']['train']:.0f}" for metrics in found)
        print(f"| {name} | {found[0]['examples']['test']:,} | {scores} |")
    print()
    (answers,) = load_runs([given.output / "fusions" / name for name in NAMES]).predict([given.text])
    for name, answer in answers.items():
        print(f"{name}: {answer}")


if __name__ == "__main__":
    main()
