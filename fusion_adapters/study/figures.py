"""The figures of a comparison, axes with units."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..backbone.atomic import written_whole
from ..runs.plots import COLOURS, MARKERS, pyplot
from ..tasks.base import Measure

DASHES = ("-", "--", "-.", ":")
LEGEND_LINE = 0.17  # inches; a figure has room for three lines and grows for more


def _styles(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {
        method: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": DASHES[(i // len(COLOURS)) % len(DASHES)] if i >= len(COLOURS) else "-",
            "markersize": 4,
            "linewidth": 1.3,
        }
        for i, method in enumerate(methods)
    }


def _names(rows: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _save(figure: Any, axes: Any, path: Path) -> None:
    handles: dict[str, Any] = {}
    for axis in axes:
        handles.update(dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True)))
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
    """Score over the number of training examples, with the 95 % interval of the mean shaded."""
    rows = summary["rows"]
    data, methods = _names(rows, "data"), _names(rows, "method")
    styles = _styles(methods)
    figure, axes = pyplot().subplots(1, len(data), figsize=(4.6 * len(data), 4.6), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], data, strict=True):
        for method in methods:
            own = sorted((r for r in rows if r["data"] == name and r["method"] == method), key=lambda r: r["size"])
            sizes, scores = [r["size"] for r in own], [r[r["measure"]] for r in own]
            axis.plot(sizes, [s["mean"] for s in scores], label=method, **styles[method])
            if all(s["interval"] for s in scores):
                low, high = zip(*(s["interval"] for s in scores), strict=True)
                axis.fill_between(sizes, low, high, color=styles[method]["color"], alpha=0.12, linewidth=0)
        ticks = sorted({r["size"] for r in rows if r["data"] == name})
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{t:,}" for t in ticks])
        axis.minorticks_off()
        axis.set_title(name)
        axis.set_xlabel("training examples (log scale)")
        axis.set_ylabel(f"{_measure(rows, name)} score ({summary['unit']})")
        axis.grid(axis="y", alpha=0.3)
    _save(figure, axes[0], path)


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
    styles = _styles(_names(rows, "method"))
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
                    [count], [score["mean"]], yerr=error, label=row["method"], color=style["color"], marker=style["marker"],
                    markersize=5, linestyle="none", elinewidth=1,
                )  # fmt: skip
            axis.set_xscale("symlog", linthresh=10)
            axis.set_title(f"{name}, {size:,} examples", fontsize=9)
            axis.set_xlabel("trained parameters (log scale)")
            axis.grid(axis="y", alpha=0.3)
        line[0].set_ylabel(f"{_measure(rows, name)} score ({summary['unit']})")
    _save(figure, axes.flat, path)


def draw_steps(runs: Sequence[dict[str, Any]], path: Path, measure: Measure) -> None:
    """Development score over optimizer steps, the mean over seeds; a panel for each data set and size."""
    _draw_curves(runs, path, "curve", measure.scale, f"development score ({measure.unit})")


def draw_losses(runs: Sequence[dict[str, Any]], path: Path, unit: str = "nats") -> None:
    """Development loss over optimizer steps, the mean over seeds; a panel for each data set and size."""
    _draw_curves(runs, path, "loss_curve", 1, f"development loss ({unit})")


def _draw_curves(runs: Sequence[dict[str, Any]], path: Path, key: str, scale: float, measure: str) -> None:
    reported = [run for run in runs if run["stage"] == "report"]
    methods = _names(reported, "method")
    styles = _styles(methods)
    figure, axes, panels = _panels(reported)
    for line, name in zip(axes, panels, strict=True):
        for axis, size in zip(line, panels[name], strict=False):
            for method in methods:
                own = [r for r in reported if (r["data"], r["size"], r["method"]) == (name, size, method)]
                if own:
                    steps = [step for step, _ in own[0][key]]
                    means = [scale * statistics.mean(r[key][i][1] for r in own) for i in range(len(steps))]
                    axis.plot(steps, means, label=method, **styles[method])
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
            axis.set_xticks(range(len(layers)), [str(i) for i in layers])
            axis.set_title(f"{method}\n{name}, {largest[name]:,}", fontsize=8)
            axis.set_xlabel("layer")
            axis.set_yticks(range(len(depth)), list(depth) if axis is line[0] else [""] * len(depth), fontsize=7)
    figure.colorbar(image, ax=axes, label="mean weight", fraction=0.03, pad=0.01, aspect=30)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


def _measure(rows: Sequence[dict[str, Any]], data: str) -> str:
    return "test" if next(r["measure"] for r in rows if r["data"] == data) == "test" else "development"
