"""What the shell prints for people: the figures of a run, or of several from one extraction, a verdict, an estimate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .recipe import Recipe
from .several import Outcome
from .tables import beside_table, contents_table, depths_table, estimate_tables, metrics_table, zero_notes
from .terminal import visible
from .verifying import Verdict


def show_run(metrics: dict[str, Any], recipe: Recipe, name: str, output: Path) -> None:
    """Prints the figures of one run.

    Args:
        metrics: The content of `metrics.json`.
        recipe: Its recipe.
        name: That of the recipe's file.
        output: The run's folder.
    """
    console = Console()
    console.print(metrics_table(metrics, recipe.task, f"{name}, seed {metrics['seed']}"))
    if "depths" in metrics:
        console.print(depths_table(metrics, recipe.task))
    if metrics.get("beside"):
        console.print(beside_table(metrics, recipe.task, f"this run ({recipe.adapter.get('fusion', 'dwatt')})"))
    for other, found in metrics.get("beside", {}).items():
        if "failed" in found:
            _warn(console, f"{other} failed: {found['failed']}")
    for note in zero_notes(metrics, recipe.task):
        _warn(console, note)
    console.print(f"adapter: {output / 'adapter'}\nfigures: {output / 'metrics.json'}", highlight=False, soft_wrap=True)


def show_several(outcomes: Mapping[str, Outcome], recipes: Mapping[str, Recipe], output: Path) -> bool:
    """Prints the scores of several runs, and why some failed; returns whether none did.

    Args:
        outcomes: What came of each recipe.
        recipes: The recipes.
        output: The folder of all runs.
    """
    console = Console()
    console.print(several_table(outcomes, recipes))
    failed = {name: outcome.failed for name, outcome in outcomes.items() if outcome.failed is not None}
    for name, why in failed.items():
        _warn(console, f"{name} failed: {why}")
    for name, outcome in outcomes.items():
        for note in [] if outcome.metrics is None else zero_notes(outcome.metrics, recipes[name].task):
            _warn(console, f"{name}: {note}")
    for name in (name for name in outcomes if name not in failed):
        console.print(f"{name}: {output / name}", markup=False, highlight=False, soft_wrap=True)
    return not failed


def show_verdict(verdict: Verdict) -> None:
    """Prints what a saved adapter holds, and what of it is right or wrong."""
    console = Console()
    if verdict.inside:
        console.print(contents_table(verdict.inside, verdict.adapter))
    marked = {
        "[green]right[/]": verdict.checked,
        "[dim]not checked[/]": verdict.unchecked,
        "[yellow]note[/]": verdict.notes,
        "[bold red]wrong[/]": verdict.problems,
    }
    for mark, texts in marked.items():
        for text in texts:
            console.print(f"{mark}: {escape(visible(text))}", highlight=False, soft_wrap=True)


def show_estimate(found: dict[str, Any], memory: float | None) -> None:
    """Prints what a recipe needs; `memory` is that of the card in GiB."""
    console = Console()
    for table in estimate_tables(found, memory):
        console.print(table)
    for note in found["assumed"]:
        _warn(console, f"Assumed: {note}.")


def several_table(outcomes: Mapping[str, Outcome], recipes: Mapping[str, Recipe]) -> Table:
    """Several runs, each by its task's main score."""
    table = Table(title=f"{len(outcomes)} recipes from one extraction", title_justify="left")
    for title in ("recipe", "score"):
        table.add_column(title)
    for title in ("dev", "test", "trainable parameters", "training"):
        table.add_column(title, justify="right")
    for name, outcome in outcomes.items():
        main = recipes[name].task.main
        row = [escape(visible(name)), main.name.replace("_", " ")]
        if outcome.metrics is None:
            table.add_row(*row, "failed", "", "", "")
            continue
        scores = outcome.metrics["scores"]
        shown = [main.shown(scores[split][main.name]) if split in scores else "-" for split in ("dev", "test")]
        seconds = "was there" if outcome.kept else f"{outcome.metrics['seconds']['train']:.1f} s"
        table.add_row(*row, *shown, f"{outcome.metrics['parameters']['total']:,}", seconds)
    return table


def _warn(console: Console, text: str) -> None:
    console.print(escape(visible(text)), style="yellow", highlight=False, soft_wrap=True)
