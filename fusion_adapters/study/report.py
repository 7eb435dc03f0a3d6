"""What a comparison leaves: results.csv, summary.md, summary.json and the figures."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..backbone.atomic import write_text_whole
from ..runs.files import json_text
from ..tasks.language import LARGEST_EXPONENT
from .figures import draw_budget, draw_depth, draw_losses, draw_samples, draw_steps, trained_parameters
from .recipe import StudyRecipe
from .statistics import FEWEST_SEEDS

COLUMNS = (
    "data",
    "method",
    "regime",
    "size",
    "seed",
    "stage",
    "diverged",
    "rate",
    "dev",
    "test",
    "dev_loss",
    "test_loss",
    "best_step",
    "steps",
    "fusion_parameters",
    "lora_parameters",
    "head_parameters",
    "seconds",
    "evaluation_seconds",
    "training_cpu_seconds",
    "peak_memory_mib",
    "adapter",
)


def write_report(study: StudyRecipe, runs: Sequence[dict[str, Any]], summary: dict[str, Any], output: Path) -> None:
    """Writes tables and figures of a comparison into its folder.

    Args:
        study: The recipe of the comparison.
        runs: All runs, also those that chose learning rates.
        summary: From `study.statistics.summarise`.
        output: The folder.
    """
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for run in runs:
        parts = {f"{part}_parameters": run["parameters"][part] for part in ("fusion", "lora", "head")}
        flat = {**run, **parts, "adapter": json.dumps(run["adapter"], sort_keys=True)}
        writer.writerow({name: flat.get(name, "") for name in COLUMNS})
    write_text_whole(output / "results.csv", table.getvalue())
    write_text_whole(output / "summary.json", json_text(summary, indent=1))
    write_text_whole(output / "summary.md", summary_text(summary))
    draw_samples(summary, output / "samples.png")
    draw_budget(summary, output / "budget.png")
    draw_steps(runs, output / "steps.png", study.task.main)
    traced = [run for run in runs if run.get("loss_curve")]  # runs of earlier versions kept no loss
    depths = [run for run in runs if run.get("depth") and not run.get("diverged") and not _constant(run["depth"])]
    for name in ("loss.png", "depth.png"):  # not beside a table of other methods
        (output / name).unlink(missing_ok=True)
    if any(run["stage"] == "report" for run in traced):
        draw_losses(traced, output / "loss.png", *([study.task.loss.unit] if study.task.loss else []))
    if depths:
        draw_depth(depths, output / "depth.png")


def _constant(depth: dict[str, list[float]]) -> bool:
    """Whether all weights over depth are the same: those of a control, of which a picture says nothing."""
    return len({weight for weights in depth.values() for weight in weights}) == 1


def summary_text(summary: dict[str, Any]) -> str:
    """The tables of a comparison as Markdown."""
    rows, digits = summary["rows"], summary["digits"]
    lines = ["# Comparison", ""]
    made = [", ".join(f"{name} {version}" for name, version in each.items()) for each in summary["versions"]]
    if len(made) > 1:
        lines += [f"**Runs were made with {len(made)} sets of versions:** {'; '.join(made)}.", ""]
    elif made:
        lines += [f"Made with {made[0]}.", ""]
    for data in dict.fromkeys(row["data"] for row in rows):
        here = [row for row in rows if row["data"] == data]
        sizes = sorted({row["size"] for row in here})
        measure = here[0]["measure"]
        of_loss = summary["score"] == "loss"
        name = f"Loss ({summary['loss']}; less is better)" if of_loss else "Score"
        lines += [
            f"## {data}",
            "",
            f"{name} on the {'test' if measure == 'test' else 'development'} data: mean and standard deviation over "
            f"{len(here[0]['seeds'])} seeds, by number of training examples.",
            "",
            *_grid(here, sizes, lambda row, measure=measure: _spread(row[measure], digits), with_counts=True),
        ]
        if of_loss and summary["unit"] == "nats":
            lines += [
                "Perplexity, the exponential of that mean.",
                "",
                *_grid(here, sizes, lambda row, measure=measure: _perplexity(row[measure])),
            ]
        zero = [f"`{row['method']}` at {row['size']:,}" for row in here if not any(row[measure]["values"])]
        if zero and (reasons := summary.get("why_zero")):
            lines += [f"**0 with every seed:** {', '.join(zero)}. {reasons}", ""]
        lost = f"{measure}_loss"
        if not of_loss and any(lost in row for row in here):
            lines += [
                f"Loss on the same data: {summary['loss']}; less is better.",
                "",
                *_grid(here, sizes, lambda row, lost=lost: _spread(row[lost], 3) if lost in row else "-"),
            ]
            if measure == "test":
                lines += [
                    "Loss on the development data, of the same weights.",
                    "",
                    *_grid(here, sizes, lambda row: _spread(row["dev_loss"], 3) if "dev_loss" in row else "-"),
                ]
        for key, name in (("to_baseline", summary["baseline"]), ("to_reference", summary["reference"])):
            if any(row[key] for row in here):
                lines += [
                    f"Difference to `{name}`, paired by seed: mean and, from {FEWEST_SEEDS} seeds, 95 % bootstrap interval.",
                    "",
                    *_grid(
                        [row for row in here if row["method"] != name],
                        sizes,
                        lambda row, key=key: _difference(row[key], digits),
                    ),
                ]
        lines += [
            "Seconds of training without evaluation, steps to 90 % of the run's best development score, chosen learning rate "
            "(with a star the lowest or highest of its grid: a wider grid may have a better one).",
            "",
            *_grid(here, sizes, _course),
        ]
    return "\n".join(lines)


def _grid(rows: list[dict[str, Any]], sizes: list[int], cell: Any, with_counts: bool = False) -> list[str]:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found = {(row["method"], row["size"]): row for row in rows}
    head = ["method", *(["parameters"] if with_counts else []), *(f"{size:,}" for size in sizes)]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for method in methods:
        own = next(row for row in rows if row["method"] == method)
        count = trained_parameters(own["parameters"])
        cells = [cell(found[method, size]) if (method, size) in found else "-" for size in sizes]
        lines.append(f"| {' | '.join([f'`{method}`', *([f'{count:,}'] if with_counts else []), *cells])} |")
    return [*lines, ""]


def _course(row: dict[str, Any]) -> str:
    edge = "*" if row["rate_at_edge"] else ""
    return f"{row['training_seconds']:.1f} s, {row['steps_to_90']:.0f}, {row['rate']:g}{edge}"


def _spread(values: dict[str, Any], digits: int = 1) -> str:
    diverged = sum(not math.isfinite(value) for value in values["values"])
    if diverged:
        return f"diverged ({diverged} of {len(values['values'])})"
    spread = f" ± {values['sd']:.{digits}f}" if values["sd"] is not None else ""
    return f"{values['mean']:.{digits}f}{spread}"


def _perplexity(values: dict[str, Any]) -> str:
    mean = values["mean"]
    return f"{math.exp(min(mean, LARGEST_EXPONENT)):,.2f}" if math.isfinite(mean) else "diverged"


def _difference(values: dict[str, Any] | None, digits: int = 1) -> str:
    if values is None or not math.isfinite(values["mean"]):
        return "-"
    inside = f" [{values['interval'][0]:+.{digits}f}, {values['interval'][1]:+.{digits}f}]" if values["interval"] else ""
    return f"{values['mean']:+.{digits}f}{inside}"
