"""The pictures of shortcuts: scores by layer, r2 of all pairs of layers, and what each layer would say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..backbone.atomic import written_whole
from ..shortcuts import FUSED, IDENTITY, MAT, Saving
from ..shortcuts.evaluate import TOPS, Score
from .plots import COLOURS, MARKERS, pyplot, spaced

FIRST = (IDENTITY, MAT, FUSED)  # have the same colour in every picture
NUMBERS = 13  # layers up to which a heat map has its numbers in the cells
LABELS = 16  # on an axis of layers


def _style(kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    order = [*FIRST, *(kind for kind in kinds if kind not in FIRST)]
    look = {"linewidth": 1.4, "markersize": 3.5}
    colours = (COLOURS[6], *COLOURS[:6], *COLOURS[7:])
    return {
        kind: {"color": colours[i % len(colours)], "marker": MARKERS[i % len(MARKERS)], **look}
        for i, kind in enumerate(order)
    }


def draw_curves(scores: Sequence[Score], num_layers: int, path: Path, title: str, text: bool = False) -> None:
    """Draws Precision@k and surprisal over the layer that is cast from, a line a kind.

    Args:
        scores: Those to the last layer.
        num_layers: Its number.
        path: The PNG to write.
        title: Printed above.
        text: Whether classes of texts were compared, not tokens.
    """
    kinds = sorted(dict.fromkeys(s.kind for s in scores), key=lambda kind: (*FIRST, kind).index(kind))
    styles, said = _style(kinds), "class" if text else "token"
    panels = [(f"Precision@{k}", [(s, s.precision[k]) for s in scores if k in s.precision]) for k in TOPS]
    panels = [panel for panel in panels if panel[1]]
    panels.append((f"surprisal of the {said} (nats)", [(s, s.surprisal) for s in scores if s.surprisal is not None]))
    rows = -(-len(panels) // 2)
    figure, axes = pyplot().subplots(rows, 2, figsize=(9.2, 3.1 * rows + 0.7), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (name, values) in zip(axes.flat, panels, strict=False):
        for kind in kinds:
            line = sorted((s.source, value) for s, value in values if s.kind == kind)
            axis.plot([x for x, _ in line], [y for _, y in line], label=kind, **styles[kind])
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_xlim(-0.02 * num_layers, num_layers)
        axis.set_ylim(0, 1.02 if name.startswith("Precision") else None)
        axis.grid(alpha=0.3, linewidth=0.5)
        axis.set_xlabel("cast from layer (0: embeddings)")
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(6, len(names)), frameon=False)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def draw_r2(scores: Sequence[Score], num_layers: int, path: Path, title: str) -> None:
    """Draws r2 of all pairs of layers as a heat map, from below against to.

    What is at or below 0, where the mean of the states would do as well, has one colour.

    Args:
        scores: Those of one kind.
        num_layers: The number of the last block.
        path: The PNG to write.
        title: Printed above.
    """
    sources = sorted({s.source for s in scores})
    targets = sorted({s.target for s in scores})
    grid = np.full((len(sources), len(targets)), np.nan)
    for s in scores:
        grid[sources.index(s.source), targets.index(s.target)] = s.r2
    size = max(3.4, min(6.5, 0.42 * max(grid.shape)))
    figure, axis = pyplot().subplots(figsize=(size + 1.6, size + 0.9), layout="constrained")
    image = axis.imshow(grid, cmap="viridis", vmin=0, vmax=1, origin="lower")
    axis.set_facecolor("#F2F2F2")
    if max(grid.shape) <= NUMBERS:
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                shown = f"{value:.2f}".lstrip("0") if value > 0 else "\N{MINUS SIGN}"
                axis.text(
                    column, row, shown, ha="center", va="center", fontsize=7, color="white" if value < 0.6 else "black"
                )
    for ticks, numbers in ((axis.set_xticks, targets), (axis.set_yticks, sources)):
        places = spaced(numbers, LABELS)
        ticks(places, [str(numbers[i]) for i in places])
    axis.set_xlabel(f"to layer (the last block is {num_layers})")
    axis.set_ylabel("from layer (0: embeddings)")
    axis.set_title(title, fontsize=10)
    bar = figure.colorbar(image, ax=axis, shrink=0.85, extend="min")
    bar.set_label("r2 (0 or less: no better than the mean)")
    _save(figure, path)


def draw_exits(curves: Mapping[str, Sequence[Saving]], agreement: float, path: Path, title: str) -> None:
    """Draws the share of layers saved over the agreement with the full model, a line a kind, a point a threshold.

    Args:
        curves: By kind, from low thresholds to high ones.
        agreement: The one that was asked for, marked.
        path: The PNG to write.
        title: Printed above.
    """
    styles = _style(list(curves))
    figure, axis = pyplot().subplots(figsize=(6.2, 4.4), layout="constrained")
    for kind, points in curves.items():
        axis.plot([100 * p.agreement for p in points], [100 * p.saved for p in points], label=kind, **styles[kind])
    axis.axvline(100 * agreement, color="grey", linewidth=1, linestyle=":")
    axis.set_xlabel(f"agreement with the full model (%), dotted: {100 * agreement:g} %")
    axis.set_ylabel("layers saved (%)")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3, linewidth=0.5)
    axis.legend(frameon=False)
    axis.set_title(title, fontsize=10)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot().close(figure)
