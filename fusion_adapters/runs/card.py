"""The model card of a run: what was trained, what it scored. peft adds the base model, FusionConfig how to load it."""

from __future__ import annotations

from typing import Any

from .recipe import Recipe


def model_card(recipe: Recipe, metrics: dict[str, Any], labels: list[str]) -> str:
    """Markdown for the README.md beside an adapter, from the recipe, the content of `metrics.json` and the label set."""
    counts = metrics["parameters"]
    parts = ", ".join(f"{part} {counts[part]:,}" for part in ("fusion", "lora", "head", "other") if counts[part])
    fusion = recipe.adapter.get("fusion", "dwatt")
    bits = f", quantised to {recipe.backbone.bits} bits" if recipe.backbone.bits else ""
    lines = [
        "---",
        "library_name: peft",
        "---",
        "",
        f"# {fusion} over the layers of {recipe.backbone.model}",
        "",
        f"A fusion adapter for {recipe.task.title}: the backbone ({recipe.backbone.model}{bits}) is frozen, and",
        f"{counts['total']:,} parameters were trained ({parts}).",
        "",
        f"Data: {recipe.data.path}, {metrics['examples']['train']} training examples, seed {metrics['seed']}.",
        "",
        *(
            [f"Labels, in the order of the model's outputs: {', '.join(f'`{label}`' for label in labels)}.", ""]
            if labels
            else []
        ),
        "| split | score | value |",
        "| --- | --- | --- |",
    ]
    for split, scores in metrics["scores"].items():
        lines += [
            f"| {split} | {name} | {recipe.task.measure(name).shown(value)} |"
            for name, value in scores.items()
            if isinstance(value, float)
        ]
    return "\n".join(lines) + "\n"
