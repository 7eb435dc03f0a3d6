"""The model card of a run: what was trained, what it scored. peft adds the base model, FusionConfig how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..tuner import FusionConfig
from .contents import short_fingerprint
from .intervals import FEWEST, resamples
from .pretrained import PACKAGED_MODELS
from .recipe import Recipe
from .trainers import TRAINING_DEFAULTS

BARS = " " + "".join(map(chr, range(0x2581, 0x2589)))  # blocks from an eighth to the whole height
ROWS = 12  # labels in the picture


def model_card(recipe: Recipe, metrics: dict[str, Any], labels: list[str], config: FusionConfig) -> str:
    """Markdown for the README.md beside an adapter.

    Args:
        recipe: The recipe.
        metrics: The content of `metrics.json`.
        labels: The label set.
        config: The adapter's config, attached.
    """
    counts = metrics["parameters"]
    parts = ", ".join(f"{part} {counts[part]:,}" for part in ("fusion", "lora", "head", "other") if counts[part])
    title = f"{config.fusion} over the layers of {recipe.backbone.model}"
    bits = f", quantised to {recipe.backbone.bits} bits" if recipe.backbone.bits else ""
    lines = [
        "---",
        yaml.safe_dump(_metadata(recipe, metrics, title), sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {title}",
        "",
        f"A fusion adapter for {recipe.task.title}: the backbone ({recipe.backbone.model}{bits}) is frozen, and",
        f"{counts['total']:,} parameters were trained ({parts}).",
        "",
        *_facts(recipe, metrics, config),
        "",
        *(
            [f"Labels, in the order of the model's outputs: {', '.join(f'`{label}`' for label in labels)}.", ""]
            if labels
            else []
        ),
        *_scores(recipe, metrics),
        *(_picture(**metrics["weights_over_depth"]) if "weights_over_depth" in metrics else []),
    ]
    return "\n".join(lines) + "\n"


def data_name(path: str) -> str:
    """What a data set is called: a folder by its own name, since those above it are of no use to others."""
    return Path(path).resolve().name if Path(path).is_dir() else path


def _metadata(recipe: Recipe, metrics: dict[str, Any], title: str) -> dict[str, Any]:
    """The card's metadata, with the scores as the hub reads them."""
    name = data_name(recipe.data.path)
    data = {"type": name, "name": name}
    if recipe.data.config_name is not None:
        data["config"] = recipe.data.config_name
    results: list[dict[str, Any]] = [
        {
            "task": {"type": recipe.task.hub_task, "name": recipe.task.title},
            "dataset": {**data, "split": split},
            "metrics": [{"type": k, "value": v, "name": f"{split} {k}"} for k, v in scores.items() if isinstance(v, float)],
        }
        for split, scores in metrics["scores"].items()
    ]
    return {"library_name": "peft", "model-index": [{"name": title, "results": results}]}


def _facts(recipe: Recipe, metrics: dict[str, Any], config: FusionConfig) -> list[str]:
    examples, seconds = metrics["examples"], metrics["seconds"]
    counts = [f"{examples[part]:,} {name}" for part, name in SPLITS.items() if part in examples]
    options = [f"{name.replace('_', ' ')} {value}" for name, value in config.options.items()]
    options += [f"norm {config.fusion_norm}", f"alpha {config.alpha:g}"]
    options += [f"layers {config.fusion_layers}"] if config.fusion_layers is not None else []
    options += [f"the first {config.fusion_depth} blocks"] if config.fusion_depth is not None else []
    options += [f"pool {config.fusion_pool}"] if config.fusion_pool is not None else []
    options += [f"LoRA of rank {config.r} in {_listed(config.target_modules)}"] if config.has_lora else []
    packaged = PACKAGED_MODELS.get(recipe.backbone.model)
    backbone = [recipe.backbone.model, *([f"revision {recipe.backbone.revision}"] if recipe.backbone.revision else [])]
    if config.fusion_gguf is not None:
        install = f", from the package {packaged.package} ({packaged.install})" if packaged is not None else ""
        backbone.append(f"the GGUF file {config.fusion_gguf}{install}")
    shape = f"{_listed(config.fusion_num_layers)} blocks of hidden size {_listed(config.fusion_hidden_size)}"
    training = {**TRAINING_DEFAULTS, **recipe.training}
    budget = recipe.adapter.get("fusion_budget")
    rows = {
        "task": recipe.task.title,
        "data": f"{data_name(recipe.data.path)}: {', '.join(counts)} examples",
        "backbone": f"{', '.join(backbone)}; {shape}",
        "its fingerprint": f"`{short_fingerprint(config.fusion_fingerprint)}`, compared whenever the adapter is loaded",
        "method": ", ".join([f"`{config.fusion}`", *options]),
        "budget": None if budget is None else f"at most {budget} trainable parameters, the head excluded",
        "training": f"{seconds['train']:,.1f} s on {metrics['device']}, learning rate {training['learning_rate']}, "
        f"{len(metrics['dev_by_epoch'])} evaluations, the best kept; seed {metrics['seed']}",
        "stored in": _stored(recipe, metrics),
        "made with": ", ".join(f"{name} {number}" for name, number in metrics["versions"].items()),
    }
    return ["| what | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items() if value)]


def _stored(recipe: Recipe, metrics: dict[str, Any]) -> str | None:
    stored = metrics.get("stored")
    if stored is None:
        return None
    main, before = recipe.task.main, stored["dev_before"]
    told = "" if before is None else f" (development {main.name} of the float32 weights: {main.shown(before)})"
    return f"{stored['dtype']}; the scores are of what is stored{told}"


SPLITS = {"train": "training", "dev": "development", "test": "test"}


def _listed(value: Any) -> str:
    if isinstance(value, (set, frozenset)):
        value = sorted(value)
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _scores(recipe: Recipe, metrics: dict[str, Any]) -> list[str]:
    lines = ["| split | score | value | 95 % interval |", "| --- | --- | --- | --- |"]
    intervals = metrics.get("intervals", {})
    for split, scores in metrics["scores"].items():
        for name, value in scores.items():
            if not isinstance(value, float):
                continue
            shown, between = recipe.task.measure(name).shown, intervals.get(split, {}).get(name)
            lines.append(f"| {split} | {name} | {shown(value)} | {' to '.join(map(shown, between)) if between else ''} |")
    number = metrics["examples"].get("test")
    if intervals:
        told = (
            f"The interval is over the {number:,} test examples, drawn anew {resamples(number):,} times. What another seed would "
            "change is not in it."
        )
    elif number is not None and number < FEWEST:
        told = f"Without an interval: the test data are {number} examples."
    else:
        told = "The scores are of one training, without an interval."
    return [*lines, "", told]


def _picture(layers: Sequence[int], by_label: Mapping[str, Sequence[float]]) -> list[str]:
    """The weights over depth as bars in text, which needs no file beside the card."""
    rows = {label: list(weights) for label, weights in list(by_label.items())[:ROWS]}
    highest = max(max(weights) for weights in rows.values()) or 1.0
    wide, cell = max(len(name) for name in ("layer", *rows)), len(str(max(layers))) + 1
    more = f"; {len(by_label) - ROWS} more labels are left out" if len(by_label) > ROWS else ""
    lines = [f"{'layer':<{wide}}" + "".join(f"{layer:>{cell}}" for layer in layers)]
    for label, weights in rows.items():
        bars = (BARS[max(1, round((len(BARS) - 1) * weight / highest))] for weight in weights)
        lines.append(f"{label:<{wide}}" + "".join(f"{bar:>{cell}}" for bar in bars))
    return [
        "",
        "## Which layers it reads",
        "",
        f"The mean weight that tokens of each label give each layer, over the development data (the whole height is {highest:.2f}, equal",
        f"weights are {1 / len(layers):.2f}{more}).",
        "",
        "```text",
        *lines,
        "```",
    ]
