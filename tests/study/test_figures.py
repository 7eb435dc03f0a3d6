"""Figures of a comparison: nothing of them is cut off."""

import pytest

from fusion_adapters.runs.plots import pyplot
from fusion_adapters.study.figures import draw_losses


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
