"""What judging shortcuts leaves: scores.json, scores.csv, summary.md and the pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..shortcuts import IDENTITY
from ..shortcuts.evaluate import TOPS, Score, best_of
from .files import json_text
from .shortcut_figures import draw_curves, draw_r2

COLUMNS = ("kind", "source", "target", "positions", "r2", *(f"precision@{k}" for k in TOPS), "surprisal", "predictions")
PAIRS = 3  # heat maps begin to say something


def write_report(scores: Sequence[Score], num_layers: int, model: str, run: dict[str, Any], folder: Path) -> None:
    """Writes tables and pictures of scores into a folder.

    Args:
        scores: The scores.
        num_layers: The number of the last block.
        model: The name of the backbone.
        run: What `run.json` says: the split and its rows.
        folder: The folder.
    """
    (folder / "scores.json").write_text(json_text([score.as_json() for score in scores]), encoding="utf-8")
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(score.as_json() for score in scores)
    (folder / "scores.csv").write_text(table.getvalue(), encoding="utf-8")
    text = bool(run["recipe"]["task"] == "sequence_classification")
    (folder / "summary.md").write_text(summary_text(scores, num_layers, model, run, text), encoding="utf-8")
    last = [score for score in scores if score.target == num_layers]
    if any(score.precision for score in last):
        draw_curves(last, num_layers, folder / "curves.png", f"{model}, {run['split']}: against the full model", text)
    for kind in kinds_of(scores):
        own = [score for score in scores if score.kind == kind]
        if len({score.target for score in own}) >= PAIRS:
            draw_r2(own, num_layers, folder / f"r2-{kind.replace(' ', '-')}.png", f"{model}: r2 of {kind} on {run['split']}")


def kinds_of(scores: Sequence[Score]) -> list[str]:
    """The kinds of shortcuts, the identity first."""
    found = list(dict.fromkeys(score.kind for score in scores))
    return sorted(found, key=lambda kind: kind != IDENTITY)


def summary_text(scores: Sequence[Score], num_layers: int, model: str, run: dict[str, Any], text: bool) -> str:
    """The scores to the last layer as Markdown: a row a layer, the best of each in bold."""
    kinds = kinds_of([score for score in scores if score.target == num_layers])
    by_kind = {kind: best_of(scores, kind) for kind in kinds}
    counts = next((s for s in scores if s.predictions), scores[0])
    over = (
        f"{counts.predictions:,} {'texts' if text else 'positions'}"
        if counts.predictions
        else f"{counts.positions:,} positions"
    )
    lines = [
        f"# Shortcuts to layer {num_layers} of {model}",
        "",
        f"{over} of {run['rows']:,} rows of `{run['split']}`; layer 0 is the embeddings. `identity` is the state as it is.",
    ]
    said = "class" if text else "token"
    for name, value, higher, meaning in (
        ("Precision@1", lambda s: s.precision.get(1), True, f"how often the first {said} is that of the full model"),
        (
            "Surprisal",
            lambda s: s.surprisal,
            False,
            f"mean of -log p, by the full model, of the {said} after the cast, in nats",
        ),
        ("r2", lambda s: s.r2, True, "of the states, a mean over coordinates"),
    ):
        if all(value(s) is None for found in by_kind.values() for s in found.values()):
            continue
        lines += [
            "",
            f"## {name}: {meaning}",
            "",
            f"| from layer | {' | '.join(kinds)} |",
            "|" + " --- |" * (len(kinds) + 1),
        ]
        for layer in sorted({layer for found in by_kind.values() for layer in found}):
            row = [value(by_kind[kind][layer]) if layer in by_kind[kind] else None for kind in kinds]
            there = [number for number in row if number is not None]
            best = (max if higher else min)(there)
            cells = ["" if number is None else _cell(number, number == best) for number in row]
            lines.append(f"| {layer} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(number: float, best: bool) -> str:
    shown = f"{number:.3f}" if abs(number) < 1000 else f"{number:.1e}"
    return f"**{shown}**" if best else shown
