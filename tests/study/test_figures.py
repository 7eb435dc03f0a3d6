"""Figures of a comparison and of depth: nothing is cut off, and nothing overlaps."""

import contextlib
import itertools
import math

import pytest
import torch
from matplotlib.text import Text

from fusion_adapters.runs.heatmap import draw_depth_map
from fusion_adapters.runs.plots import apart, pyplot, spaced
from fusion_adapters.study.figures import BEST, GREY, MANY, draw_budget, draw_depth, draw_losses, draw_samples


@pytest.mark.parametrize("methods", [2, 5, 16])
@pytest.mark.parametrize("sizes", [[500], [50, 100, 200, 500]])
def test_the_legend_fits_into_the_figure(methods, sizes, tmp_path):
    runs = [
        {"stage": "report", "data": "d", "method": f"dwconcat-uniform-{i}", "size": size, "loss_curve": [[1, 6.0 + i], [2, 5.0 + i]]}
        for i in range(methods)
        for size in sizes
    ]  # fmt: skip
    draw_losses(runs, tmp_path / "loss.png")
    picture = pyplot().imread(tmp_path / "loss.png")[..., :3]
    edges = (picture[0], picture[-1], picture[:, 0], picture[:, -1])
    assert all((edge == 1.0).all() for edge in edges), "something reaches the edge of the picture"
    dark = (picture.min(-1) < 0.5).any(0).nonzero()[0]
    assert len(dark) > picture.shape[1] / 4, "the picture is empty"


def summary_of(methods, sizes=(50, 100, 500), data=("d", "e")):
    """Scores in which the last method is the best; all end within a point."""
    score = [{"mean": 40 + i / methods + size / 100, "sd": 1.0} for i in range(methods) for size in sizes]
    score = [{**s, "interval": [s["mean"] - 1, s["mean"] + 1], "values": [s["mean"]]} for s in score]
    rows = [
        {"data": name, "size": size, "method": f"dwconcat-uniform-{i}", "measure": "test", "test": score[i * len(sizes) + j],
         "parameters": {"fusion": 10**i % 7919, "lora": 0, "other": 0}}
        for name in data for i in range(methods) for j, size in enumerate(sizes)
    ]  # fmt: skip
    return {"rows": rows, "unit": "points", "baseline": "dwconcat-uniform-0", "reference": None, "higher_is_better": True}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, kept open."""
    seen, plt = [], pyplot()
    monkeypatch.setattr(plt, "close", seen.append)
    yield seen
    monkeypatch.undo()
    plt.close("all")


@pytest.mark.parametrize("methods", [1, 2, 8, 16])
def test_names_stand_at_the_ends_of_lines_and_do_not_overlap(methods, tmp_path, drawn):
    draw_samples(summary_of(methods), tmp_path / "samples.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    few = methods <= MANY
    for axis in figure.axes:
        names = [text.get_text() for text in axis.texts]
        assert len(names) == (methods if few else BEST + 1) and f"dwconcat-uniform-{methods - 1}" in names
        assert "dwconcat-uniform-0" in names  # the baseline, whatever its place
        boxes = [Text.get_window_extent(text) for text in axis.texts]  # without the line to it
        boxes.sort(key=lambda box: box.y0)
        assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(boxes))
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height for box in boxes)
        assert sum(line.get_color() == GREY["color"] for line in axis.lines) == (0 if few else methods - BEST - 1)
    legend = [text.get_text() for each in figure.legends for text in each.get_texts()]
    assert legend == ([] if few else [f"{methods - BEST - 1} other methods"])


def test_a_run_that_diverged_is_not_among_the_best(tmp_path, drawn):
    summary = summary_of(12)
    for row in summary["rows"]:
        if row["method"] == "dwconcat-uniform-11":
            row["test"] = {"mean": math.nan, "sd": math.nan, "interval": [math.nan] * 2, "values": [math.nan]}
    draw_samples(summary, tmp_path / "samples.png")
    draw_budget(summary, tmp_path / "budget.png")
    assert "dwconcat-uniform-11" not in [text.get_text() for text in drawn[0].axes[0].texts]
    legend = [text.get_text() for text in drawn[1].legends[0].get_texts()]
    assert len(legend) == BEST + 2 and legend[-1] == f"{12 - BEST - 1} other methods"


@pytest.mark.parametrize("layers", [6, 12, 30, 48, 80])
def test_ticks_of_many_layers_do_not_overlap(layers, tmp_path, drawn):
    depth = {f"B-{i}": [1 / layers + i / 1000] * layers for i in range(5)}
    runs = [
        {"data": name, "method": method, "size": 500, "layers": list(range(1, layers + 1)), "depth": depth}
        for name in ("d", "e") for method in ("dwatt", "dwconcat", "attnres")
    ]  # fmt: skip
    draw_depth(runs, tmp_path / "depth.png")
    figure = drawn[0]
    figure.draw_without_rendering()
    for axis in figure.axes[:6]:
        boxes = [label.get_window_extent() for label in axis.get_xticklabels()]
        shown = [label.get_text() for label in axis.get_xticklabels()]
        assert (shown[0], shown[-1]) == ("1", str(layers)) and len(shown) >= min(layers, 5)
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


@pytest.mark.parametrize("layers", [2, 12, 30, 48, 80])
def test_layers_and_tokens_of_a_depth_map_do_not_overlap(layers, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: figures.append(self))
    tokens = [" word", "$x$", "\n", " ", "\u2019"] * 12
    with contextlib.suppress(FileNotFoundError):  # nothing was written
        draw_depth_map(tokens, range(1, layers + 1), torch.ones(60, layers) / layers, tmp_path / "d.png", "title", layers)
    (figure,) = figures
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = sorted((label.get_window_extent() for label in axes.get_yticklabels()), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))
    assert axes.get_yticklabels()[-1].get_text() == f"{layers} (last block)"
    assert [label.get_text() for label in axes.get_xticklabels()][:5] == ["word", "$x$", "\u21b5", "\u2423", "\u2019"]
    assert figure.get_figheight() <= 10


@pytest.mark.parametrize("count", [1, 2, 7, 13, 30, 48, 80, 126])
@pytest.mark.parametrize("most", [2, 8, 20])
def test_spaced_ticks(count, most):
    numbers = list(range(1, count + 1))
    chosen = spaced(numbers, most)
    assert chosen == sorted(set(chosen)) and chosen[0] == 0 and chosen[-1] == count - 1
    assert len(chosen) <= most + 1
    if count > most:
        assert all(numbers[i] % 2 == 0 or numbers[i] % 5 == 0 for i in chosen[1:-1])
    assert spaced([0, 3, 7], 8) == [0, 1, 2]


def test_labels_move_apart_as_little_as_needed():
    assert apart([5.0, 30.0], 10, 0, 100) == [5.0, 30.0]
    assert apart([50.0, 50.0], 10, 0, 100) == [45.0, 55.0] and apart([52.0, 50.0], 10, 0, 100) == [56.0, 46.0]
    assert apart([0.0, 0.0, 1.0], 10, 0, 100) == [0.0, 10.0, 20.0]
    found = sorted(apart([99.0, 98.0, 97.0, 80.0], 10, 0, 100))
    assert found == pytest.approx([70, 80, 90, 100])
