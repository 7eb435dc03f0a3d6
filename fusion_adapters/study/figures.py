"""The figures of a comparison, axes with units."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..backbone.atomic import written_whole
from ..runs.plots import COLOURS, MARKERS, apart, pyplot, spaced
from ..tasks.base import Measure

LEGEND_LINE = 0.17  # inches; a figure has room for three lines and grows for more
MANY, BEST = 8, 6  # of more methods than that, so many have a colour and a name
GREY = {"color": "#BDBDBD", "marker": "", "linestyle": "-", "markersize": 3, "linewidth": 0.9, "zorder": 1}
OTHERS = "other methods"
LABEL = 8  # points, size of a name at the end of a line


def _named(
    methods: Sequence[str], panels: Sequence[Mapping[str, float]], higher: bool, also: Sequence[Any] = ()
) -> list[str]:
    """The methods that have a colour and a name in a figure: all, or of many the best by their mean rank over the panels.

    Args:
        methods: All methods.
        panels: For each panel the value by which its methods are ranked; a run that diverged has none (NaN) and is last.
        higher: Whether higher values are better.
        also: Methods that have a name in any case.
    """
    if len(methods) <= MANY:
        return list(methods)
    ranks: dict[str, list[int]] = {method: [] for method in methods}
    for panel in panels:
        known = {m: v for m, v in panel.items() if not math.isnan(v)}
        order = sorted(known, key=known.__getitem__, reverse=higher)
        for method in methods:
            ranks[method].append(order.index(method) if method in known else len(methods))
    best = sorted(methods, key=lambda m: statistics.mean(ranks[m] or [0]))[:BEST]
    return [m for m in methods if m in best or m in also]


def _styles(methods: Sequence[str], named: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each method is drawn, and under which name it stands in a legend: all without a name of their own share a grey one."""
    grey = {**GREY, "label": f"{len(methods) - len(named)} {OTHERS}"}
    return {method: grey for method in methods} | {
        method: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": "-",
            "markersize": 4,
            "linewidth": 1.4,
            "zorder": 3,
            "label": method,
        }
        for i, method in enumerate(named)
    }


def _name_lines(axis: Any, ends: Mapping[str, tuple[float, float]], styles: Mapping[str, dict[str, Any]]) -> None:
    """Writes names beside the ends of their lines, moved apart where they would overlap."""
    axis.figure.draw_without_rendering()  # only now are sizes known
    points = 72 / axis.figure.dpi
    height = axis.bbox.height * points
    at = [(axis.transData.transform(end)[1] - axis.bbox.y0) * points for end in ends.values()]
    for (method, end), here, there in zip(ends.items(), at, apart(at, 1.25 * LABEL, 0, height), strict=True):
        colour = styles[method]["color"]
        axis.annotate(
            method, end, xytext=(14, there - here), textcoords="offset points", va="center", fontsize=LABEL, color=colour,
            annotation_clip=False, arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def _names(rows: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _save(figure: Any, axes: Any, path: Path) -> None:
    handles: dict[str, Any] = {}
    for axis in axes:
        handles.update(dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True)))
    handles = dict(sorted(handles.items(), key=lambda item: item[0].endswith(OTHERS)))
    columns = 1
    for columns in range(min(5, len(handles)), 0, -1):
        # as many as fit beside each other: a legend wider than the figure is cut
        legend = figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=8
        )
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * max(0, -(-len(handles) // columns) - 3))
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot().close(figure)


def trained_parameters(parameters: dict[str, int]) -> int:
    """What a method trains besides the head: fusion, LoRA, and biases where LoRA trains them."""
    return parameters["fusion"] + parameters["lora"] + parameters["other"]


def draw_samples(summary: dict[str, Any], path: Path) -> None:
    """Score over the number of training examples, with the 95 % interval of the mean shaded, and names at the lines' ends.

    Of many methods, the best at the largest sizes have colour and name, with the baseline and the reference; the others are grey.
    """
    rows = summary["rows"]
    data, methods = _names(rows, "data"), _names(rows, "method")
    named = _named(
        methods, _last_scores(rows), summary.get("higher_is_better", True), (summary["baseline"], summary["reference"])
    )
    styles = _styles(methods, named)
    figure, axes = pyplot().subplots(1, len(data), figsize=(5.4 * len(data), 4.6), layout="constrained", squeeze=False)
    lines = []
    for axis, name in zip(axes[0], data, strict=True):
        ends: dict[str, tuple[float, float]] = {}
        for method in methods:
            own = sorted((r for r in rows if r["data"] == name and r["method"] == method), key=lambda r: r["size"])
            sizes, scores = [r["size"] for r in own], [r[r["measure"]] for r in own]
            style = {**styles[method], "label": None if method in named else styles[method]["label"]}
            axis.plot(sizes, [s["mean"] for s in scores], **style)
            if method not in named:
                continue
            shown = [(size, s["mean"]) for size, s in zip(sizes, scores, strict=True) if not math.isnan(s["mean"])]
            if shown:
                ends[method] = shown[-1]
            if all(s["interval"] for s in scores):
                low, high = zip(*(s["interval"] for s in scores), strict=True)
                axis.fill_between(sizes, low, high, color=style["color"], alpha=0.12, linewidth=0)
        lines.append((axis, ends))
        ticks = sorted({r["size"] for r in rows if r["data"] == name})
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{t:,}" for t in ticks])
        axis.minorticks_off()
        axis.set_title(name)
        axis.set_xlabel("training examples (log scale)")
        axis.set_ylabel(f"{_measure(rows, name)} score ({summary['unit']})")
        axis.grid(axis="y", alpha=0.3)
    for axis, ends in lines:
        _name_lines(axis, ends, styles)
    _save(figure, axes[0], path)


def _last_scores(rows: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """For each data set the mean score of each method at its largest size."""
    panels = []
    for name in _names(rows, "data"):
        own = [r for r in rows if r["data"] == name]
        panels.append({r["method"]: r[r["measure"]]["mean"] for r in sorted(own, key=lambda r: r["size"])})
    return panels


def _panels(rows: Sequence[dict[str, Any]]) -> tuple[Any, Any, dict[str, list[int]]]:
    """A figure, its axes with a line for each data set and a column for each size, and the sizes of each data set."""
    sizes = {name: sorted({r["size"] for r in rows if r["data"] == name}) for name in _names(rows, "data")}
    columns = max(len(s) for s in sizes.values())
    figure, axes = pyplot().subplots(
        len(sizes), columns, figsize=(2.9 * columns + 0.6, 2.9 * len(sizes) + 0.9), layout="constrained", squeeze=False
    )
    for line, own in zip(axes, sizes.values(), strict=True):
        for axis in line[len(own) :]:
            axis.axis("off")
    return figure, axes, sizes


def draw_budget(summary: dict[str, Any], path: Path) -> None:
    """Score over the number of trained parameters without head; a panel for each data set and size."""
    rows = summary["rows"]
    methods = _names(rows, "method")
    named = _named(
        methods, _last_scores(rows), summary.get("higher_is_better", True), (summary["baseline"], summary["reference"])
    )
    styles = _styles(methods, named)
    figure, axes, panels = _panels(rows)
    for line, name in zip(axes, panels, strict=True):
        for axis, size in zip(line, panels[name], strict=False):
            for row in (r for r in rows if r["data"] == name and r["size"] == size):
                count = max(1, trained_parameters(row["parameters"]))
                score = row[row["measure"]]
                bounds = score["interval"] or [score["mean"]] * 2
                style = styles[row["method"]]
                error = [[max(0.0, score["mean"] - bounds[0])], [max(0.0, bounds[1] - score["mean"])]]
                axis.errorbar(
                    [count], [score["mean"]], yerr=error, label=style["label"], color=style["color"], marker=style["marker"] or "o",
                    markersize=style["markersize"] + 1, linestyle="none", elinewidth=1, zorder=style["zorder"],
                )  # fmt: skip
            axis.set_xscale("symlog", linthresh=10)
            axis.set_title(f"{name}, {size:,} examples", fontsize=9)
            axis.set_xlabel("trained parameters (log scale)")
            axis.grid(axis="y", alpha=0.3)
        line[0].set_ylabel(f"{_measure(rows, name)} score ({summary['unit']})")
    _save(figure, axes.flat, path)


def draw_steps(runs: Sequence[dict[str, Any]], path: Path, measure: Measure) -> None:
    """Development score over optimizer steps, the mean over seeds; a panel for each data set and size."""
    _draw_curves(runs, path, "curve", measure.scale, f"development score ({measure.unit})", measure.higher_is_better)


def draw_losses(runs: Sequence[dict[str, Any]], path: Path, unit: str = "nats") -> None:
    """Development loss over optimizer steps, the mean over seeds; a panel for each data set and size."""
    _draw_curves(runs, path, "loss_curve", 1, f"development loss ({unit})", False)


def _draw_curves(runs: Sequence[dict[str, Any]], path: Path, key: str, scale: float, measure: str, higher: bool) -> None:
    reported = [run for run in runs if run["stage"] == "report"]
    methods = _names(reported, "method")
    curves: dict[tuple[str, int], dict[str, tuple[list[int], list[float]]]] = {}
    for run in reported:
        curves.setdefault((run["data"], run["size"]), {})
    for (name, size), found in curves.items():
        for method in methods:
            own = [r for r in reported if (r["data"], r["size"], r["method"]) == (name, size, method)]
            if own:
                steps = [step for step, _ in own[0][key]]
                found[method] = steps, [scale * statistics.mean(r[key][i][1] for r in own) for i in range(len(steps))]
    best = max if higher else min
    named = _named(methods, [{m: best(means) for m, (_, means) in found.items()} for found in curves.values()], higher)
    styles = _styles(methods, named)
    figure, axes, panels = _panels(reported)
    for line, name in zip(axes, panels, strict=True):
        for axis, size in zip(line, panels[name], strict=False):
            for method, (steps, means) in curves[name, size].items():
                axis.plot(steps, means, **styles[method])
            axis.set_title(f"{name}, {size:,} examples", fontsize=9)
            axis.set_xlabel("optimizer steps")
            axis.grid(axis="y", alpha=0.3)
        line[0].set_ylabel(measure)
    _save(figure, axes.flat, path)


def draw_depth(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """The mean weight over depth by label, for each method that has weights and each data set, at the largest size."""
    data, methods = _names(runs, "data"), _names(runs, "method")
    largest = {name: max(r["size"] for r in runs if r["data"] == name) for name in data}
    found = {(r["data"], r["method"]): r["depth"] for r in runs if r["size"] == largest[r["data"]]}
    plt = pyplot()
    heights = [max(len(found[d, m]) for m in methods if (d, m) in found) for d in data]
    figure, axes = plt.subplots(
        len(data),
        len(methods),
        figsize=(2.5 * len(methods) + 1.2, 0.22 * sum(heights) + 1.2 * len(data)),
        layout="constrained",
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    top = max(v for depth in found.values() for weights in depth.values() for v in weights)
    image = None
    for line, name in zip(axes, data, strict=True):
        for axis, method in zip(line, methods, strict=True):
            depth = found.get((name, method))
            if depth is None:
                axis.axis("off")
                continue
            image = axis.imshow(list(depth.values()), aspect="auto", cmap="viridis", vmin=0, vmax=top)
            layers = next(r["layers"] for r in runs if (r["data"], r["method"]) == (name, method))
            ticks = spaced(layers, 8)
            axis.set_xticks(ticks, [str(layers[i]) for i in ticks])
            axis.set_title(f"{method}\n{name}, {largest[name]:,}", fontsize=8)
            axis.set_xlabel("layer")
            axis.set_yticks(range(len(depth)), list(depth) if axis is line[0] else [""] * len(depth), fontsize=7)
    figure.colorbar(image, ax=axes, label="mean weight", fraction=0.03, pad=0.01, aspect=30)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


def _measure(rows: Sequence[dict[str, Any]], data: str) -> str:
    return "test" if next(r["measure"] for r in rows if r["data"] == data) == "test" else "development"
