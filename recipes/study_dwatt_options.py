"""Which options of DWAtt win in the few-shot and the full setting? The table of docs/results/defaults.md.

Trains fusion and head on layer states of frozen all-MiniLM-L6-v2 that are computed once, and scores on development data
(never on test data): WNUT-17's own development set, and for WikiGold a cut by a fixed seed (1,200 / 300 sentences).
The learning rate of each variant is the best of one grid on that development data, so scores are for choosing only.

    python recipes/study_dwatt_options.py --data ../shared/data --output outputs/dwatt_options.json
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusion_adapters.fusions import FUSIONS, build_fusion
from fusion_adapters.runs.loading import load_model
from fusion_adapters.runs.recipe import BackboneRecipe
from fusion_adapters.runs.tokenizers import load_tokenizer
from fusion_adapters.tasks.base import IGNORED, Example
from fusion_adapters.tasks.data import DataRecipe
from fusion_adapters.tasks.registry import TASKS
from fusion_adapters.tasks.splits import load_splits, read_file

TASK = TASKS["token_classification"]
BACKBONE = BackboneRecipe(model="sentence-transformers/all-MiniLM-L6-v2")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "last": ("last", {}),
    "mlp, size of dwatt": ("mlp", {"bottleneck": 1368}),
    "scalar_mix": ("scalar_mix", {}),
    "concat, paper": ("concat", FUSIONS["concat"].paper),
    "concat": ("concat", {}),
    "concat, bottleneck 384": ("concat", {"bottleneck": 384}),
    "dwatt, paper": ("dwatt", FUSIONS["dwatt"].paper),
    "dwatt, 1 head": ("dwatt", {"heads": 1, "scale": False}),
    "dwatt, 1 head, scaled": ("dwatt", {"heads": 1}),
    "dwatt, 8 heads": ("dwatt", {"heads": 8, "scale": False}),
    "dwatt, 8 heads, scaled": ("dwatt", {"heads": 8}),
    "dwatt, 8 heads, scaled, paper init": ("dwatt", {"heads": 8, "init": "paper"}),
    "dwatt, 8 heads, scaled, plain gain": ("dwatt", {"heads": 8, "gain_scale": 1.0}),
    "dwatt, 48 heads, scaled": ("dwatt", {"heads": 48}),
    "dwatt, 8 heads, scaled, dropout 0.1": ("dwatt", {"heads": 8, "dropout": 0.1}),
    "dwatt, 8 heads, scaled, bottleneck 0.1": ("dwatt", {"heads": 8, "bottleneck": 0.1}),
}
RATES = (3e-4, 1e-3, 3e-3)
EPOCHS = {50: 30, 200: 30, 1200: 12, 3394: 8}
BATCH = 16


def load_wikigold(folder: Path) -> tuple[list[Example], list[Example]]:
    recipe = DataRecipe(path=str(folder / "ner-wikigold"), format="conll")
    examples = TASK.examples(read_file(folder / "ner-wikigold" / "wikigold.conll.txt", recipe, TASK), recipe)
    random.Random(13).shuffle(examples)
    return examples[:1200], examples[1200:1500]


def load_wnut(folder: Path) -> tuple[list[Example], list[Example]]:
    recipe = DataRecipe(path=str(folder / "ner-wnut17"), train="wnut17train.conll", dev="emerging.dev.conll", format="conll")
    splits = load_splits(recipe, TASK, seed=1)
    return splits.train, splits.dev


def states_of(examples: list[Example], labels: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each sentence the states z_0 .. z_L at the first pieces of its words, (words, L + 1, d), and the labels."""
    tokenizer = load_tokenizer(BACKBONE, TASK)
    model = load_model(BACKBONE, TASK, labels).eval()
    encoded = TASK.encode(examples, tokenizer, labels, 256)
    result: list[Any] = [None] * len(encoded.rows)
    order = sorted(range(len(encoded.rows)), key=lambda i: len(encoded.rows[i]["input_ids"]))
    for start in range(0, len(order), 32):
        chosen = order[start : start + 32]
        rows = [encoded.rows[i] for i in chosen]
        batch = tokenizer.pad([{k: r[k] for k in ("input_ids", "attention_mask")} for r in rows], return_tensors="pt")
        with torch.no_grad():
            states = torch.stack(model(**batch, output_hidden_states=True).hidden_states, dim=2)  # (B, T, L + 1, d)
        for i, row, state in zip(chosen, rows, states, strict=True):
            gold = torch.tensor(row["labels"])
            result[i] = (state[: len(gold)][gold != IGNORED].clone(), gold[gold != IGNORED])
    return result


def run(
    train: list[Any], dev: list[Any], labels: list[str], variant: tuple[str, dict[str, Any]], rate: float, seed: int
) -> tuple[float, int]:
    torch.manual_seed(seed)
    order = random.Random(seed)
    name, options = variant
    size, depth = train[0][0].shape[2], train[0][0].shape[1] - 1
    fusion = build_fusion(name, size, depth, **{k: v for k, v in options.items() if k != "gain_scale"})
    if "gain_scale" in options:  # not an option of the method: what the identity start would be without it
        fusion.gain_scale = options["gain_scale"]
    head = nn.Linear(size, len(labels))
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    parameters = [*fusion.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    steps = EPOCHS[len(train)] * math.ceil(len(train) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / (0.1 * steps), 1) * (1 - s / steps))

    def forward(states: torch.Tensor) -> torch.Tensor:
        states = states.unsqueeze(0)  # (1, words, L + 1, d)
        fused = fusion([states[:, :, i] for i in fusion.layers], states[:, :, depth])
        return head(nn.functional.dropout(fused, 0.1, fusion.training))[0]

    for _ in range(EPOCHS[len(train)]):
        order.shuffle(train)
        for start in range(0, len(train), BATCH):
            batch = train[start : start + BATCH]
            logits = forward(torch.cat([states for states, _ in batch]))
            loss = nn.functional.cross_entropy(logits, torch.cat([gold for _, gold in batch]))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    fusion.eval()
    with torch.no_grad():
        predicted = [[labels[i] for i in forward(states).argmax(-1).tolist()] for states, _ in dev]
    gold = [[labels[i] for i in labels_of.tolist()] for _, labels_of in dev]
    return TASK.score(gold, predicted)["f1"], sum(p.numel() for p in fusion.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=["wikigold", "wnut17"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[50, 200, 3394], help="the last is cut to the set's size")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    results = []
    for name in arguments.sets:
        train, dev = {"wikigold": load_wikigold, "wnut17": load_wnut}[name](arguments.data)
        labels = sorted({label for example in train for label in example.labels})
        train_states, dev_states = states_of(train, labels), states_of(dev, labels)
        for size in dict.fromkeys(min(size, len(train)) for size in arguments.sizes):
            for variant in arguments.variants:
                by_rate = {}
                for rate in RATES:
                    runs = [
                        run(random.Random(s).sample(train_states, size), dev_states, labels, VARIANTS[variant], rate, s)
                        for s in arguments.seeds
                    ]
                    by_rate[rate] = [100 * f1 for f1, _ in runs]
                best = max(by_rate, key=lambda rate: statistics.mean(by_rate[rate]))
                row = {
                    "set": name,
                    "size": size,
                    "variant": variant,
                    "parameters": runs[0][1],
                    "f1": round(statistics.mean(by_rate[best]), 1),
                    "sd": round(statistics.stdev(by_rate[best]), 1) if len(arguments.seeds) > 1 else None,
                    "rate": best,
                    "runs": {str(rate): [round(f1, 1) for f1 in f1s] for rate, f1s in by_rate.items()},
                }
                results.append(row)
                print(json.dumps(row), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
