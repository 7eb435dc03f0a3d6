"""Short tables and lines for the terminal."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from ..tasks.base import Task
from .terminal import visible


def metrics_table(metrics: dict[str, Any], task: Task, title: str) -> Table:
    """The figures of a run that a person wants to see first, from the content of `metrics.json`."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    for split, scores in metrics["scores"].items():
        for name, value in scores.items():
            if isinstance(value, float):
                shown, between = task.measure(name).shown, metrics.get("intervals", {}).get(split, {}).get(name)
                apart = f" (95 %: {' to '.join(map(shown, between))})" if between else ""
                table.add_row(f"{split} {name.replace('_', ' ')}", shown(value) + apart)
    counts = metrics["parameters"]
    table.add_row("trainable parameters", f"{counts['total']:,}")
    table.add_row("", f"({_parts(counts)})")
    if "stored" in metrics and metrics["stored"]["dev_before"] is not None:
        before = task.main.shown(metrics["stored"]["dev_before"])
        table.add_row(f"dev {task.main.name} before {metrics['stored']['dtype']}", before)
    table.add_row("adapter on disk", f"{sum(metrics['bytes'].values()) / 2**20:.2f} MiB")
    table.add_row("reloaded, largest difference", f"{metrics['reload_difference']:.1g}")
    table.add_row("training", f"{metrics['seconds']['train']:.1f} s")
    table.add_row("peak memory", f"{metrics['peak_memory_mib']:,.0f} MiB")
    for split, notes in metrics["notes"].items():
        for name, value in notes.items():
            if value:
                table.add_row(f"{split}: {name.replace('_', ' ')}", str(value))
    return table


def beside_table(metrics: dict[str, Any], task: Task, name: str) -> Table:
    """A run and what was trained beside it, by the main score."""
    splits = list(metrics["scores"])
    main = task.main.name
    table = Table(title=f"{main.replace('_', ' ')}, {task.main.unit}", title_justify="left")
    table.add_column("")
    for title in (*splits, "trainable parameters", "training"):
        table.add_column(title, justify="right")
    for row, found in {**metrics.get("beside", {}), name: metrics}.items():
        if "failed" in found:
            table.add_row(row, *["failed"] * len(splits))
            continue
        scores = [task.main.shown(found["scores"][split][main]) for split in splits]
        table.add_row(row, *scores, f"{found['parameters']['total']:,}", f"{found['seconds']['train']:.1f} s")
    return table


def depths_table(metrics: dict[str, Any], task: Task) -> Table:
    """The depths that `fusion_depth: auto` compared, from the content of `metrics.json`."""
    record, main = metrics["depths"], task.main
    table = Table(title=f"fusion_depth: auto, {main.name.replace('_', ' ')}, {main.unit}", title_justify="left")
    for title in ("blocks", "dev", "below the best", "its standard error", "trainable parameters", "training"):
        table.add_column(title, justify="right")
    for row in record["tried"]:
        if "failed" in row:
            table.add_row(str(row["depth"]), "failed", "", "", "", "")
            continue
        shown = [main.shown(row[name]) for name in (main.name, "below_best", "standard_error")]
        chosen = row["depth"] == record["chosen"]
        name = f"chosen: {row['depth']}" if chosen else str(row["depth"])
        style = "bold" if chosen else None
        table.add_row(name, *shown, f"{row['parameters']:,}", f"{row['seconds']:.1f} s", style=style)
    return table


def zero_notes(metrics: dict[str, Any], task: Task) -> list[str]:
    """A line for each split whose main score is 0, with the likeliest reasons."""
    count, epochs = metrics["examples"]["train"], len(metrics["dev_by_epoch"])
    return [
        f"{split} {task.main.name} is 0 (trained on {count:,} examples, scored {epochs} times in training). {task.why_zero}"
        for split, scores in metrics["scores"].items()
        if scores[task.main.name] == 0 and task.why_zero
    ]


def contents_table(inside: dict[str, Any], title: str) -> Table:
    """What a saved adapter is, from `contents`."""
    table = Table(title=escape(visible(title)), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    backbone, counts, lora = inside["backbone"], inside["parameters"] or {}, inside["lora"]
    rows: dict[str, Any] = {
        "method": ", ".join([inside["method"], *(f"{name} {value}" for name, value in inside["options"].items())]),
        "task": inside["task"],
        "layers": inside["layers"] or "the outputs of all blocks",
        "depth": inside["depth"],
        "pool": inside["pool"],
        "LoRA": lora and f"r {lora['r']}, alpha {lora['lora_alpha']}, in {lora['target_modules']}",
        "backbone": ", ".join(str(backbone[k]) for k in ("name", "revision", "gguf", "type") if backbone[k] is not None),
        "its shape": f"{backbone['blocks']} blocks of hidden size {backbone['hidden_size']}",
        "its fingerprint": backbone["fingerprint"] or "none",
        "budget": inside["budget"],
        "parameters": counts and f"{counts['total']:,} ({_parts(counts)}), {', '.join(counts['dtypes'])}",
        "weights on disk": inside["bytes"] and f"{inside['bytes']:,} bytes",
        "labels": inside["labels"] and ", ".join(inside["labels"]),
        "versions": ", ".join(f"{name} {value}" for name, value in inside["versions"].items() if value),
    }
    for split, scores in (inside["scores"] or {}).items():
        numbers = (f"{name} {value:.4g}" for name, value in scores.items() if isinstance(value, float))
        rows[f"{split} scores"] = ", ".join(numbers)
    for name, value in rows.items():
        if value:
            table.add_row(name, escape(visible(str(value))))
    return table


def _parts(counts: dict[str, Any]) -> str:
    return ", ".join(f"{part} {counts[part]:,}" for part in ("fusion", "lora", "head", "other") if counts.get(part))


def budget_table(rows: list[dict[str, Any]], title: str) -> Table:
    """Methods fitted to one budget, from `costs.compare_budgets`."""
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for name in ("choice", "parameters", "adapter on disk", "extra FLOPs per token"):
        table.add_column(name, justify="right")
    for row in rows:
        if "smallest" in row:
            table.add_row(row["method"], f"needs {row['smallest']:,}", "-", "-", "-")
            continue
        choice = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in row["choice"].items())
        size = f"{row['bytes'] / 2**20:,.1f} MiB"
        table.add_row(row["method"], choice or "-", f"{row['parameters']:,}", size, f"{row['flops_percent']:.2f} %")
    return table


def estimate_tables(found: dict[str, Any], memory: float | None) -> list[Table]:
    """What a recipe needs, from `estimate_recipe`.

    Args:
        found: Its answer.
        memory: GiB of the card; None for no column that says what fits.
    """
    backbone, adapter, batch, cache = (found[part] for part in ("backbone", "adapter", "batch", "cache"))
    title = (
        f"{backbone['model']}, {backbone['parameters']:,} parameters; batches of {batch['rows']} x {batch['tokens']} tokens"
    )
    steps = Table(title=title, title_justify="left")
    steps.add_column("a training step, GiB", no_wrap=True)
    for name in ("weights", "Adam", "kept", "peak", *(() if memory is None else (f"fits {memory:.0f}",))):
        steps.add_column(name, justify="right")
    for kind, step in found["steps"].items():
        shown = [f"{step[part] / 2**30:,.2f}" for part in ("weights", "optimizer", "kept", "peak")]
        fits = [] if memory is None else ["yes" if step["peak"] <= memory * 2**30 else "no"]
        steps.add_row(kind, *shown, *fits)
    weights = Table(title="weights of the backbone, and the adapter", title_justify="left", show_header=False)
    weights.add_column()
    weights.add_column(justify="right")
    for form, size in backbone["bytes"].items():
        weights.add_row(form, f"{size / 2**30:,.2f} GiB")
    parts = ", ".join(f"{part} {adapter[part]:,}" for part in ("fusion", "lora", "head", "other") if adapter[part])
    weights.add_row(f"adapter ({parts})", f"{adapter['bytes'] / 1e6:,.1f} MB")
    if "refused" in cache:
        return [steps, weights]
    disk = Table(title="layer states on disk", title_justify="left")
    disk.add_column(f"{cache['layers']} layers")
    count = cache["count"] or 10**6
    of_data = f"{count:,} {cache['unit']}s{'' if cache['count'] is None else ' of the data'}, GiB"
    for name in (f"bytes a {cache['unit']}", of_data):
        disk.add_column(name, justify="right")
    for form, size in cache["bytes"].items():
        disk.add_row(form, f"{size:,}", f"{count * size / 2**30:,.2f}")
    return [steps, weights, disk]


def export_table(note: dict[str, Any], title: str) -> Table:
    """What an exported program wants and gives, from the content of `program.json`."""
    table = Table(title=escape(visible(title)), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    far = note["compared"]["largest_difference"]
    lacking = [layer for layer, place in (note["hidden_states"] or {}).items() if place is None]
    rows = {
        "layer states": ", ".join(map(str, note["layers"])),
        "not in hidden_states": ", ".join(lacking),
        **{name: f"({', '.join(map(str, told['shape']))}), {told['dtype']}" for name, told in note["inputs"].items()},
        "scores": f"({', '.join(map(str, note['scores']['shape']))}), {note['scores']['dtype']}",
        "of the vocabulary": note["scores"]["of_word_pieces"] and "the head's embeddings are in the file",
        "size": f"{note['bytes'] / 2**20:,.2f} MiB",
        "largest difference from the model": f"{far:.1g} of the largest score" if far else "none",
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    return table
