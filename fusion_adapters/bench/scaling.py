"""How the time of a fusion grows with depth, width, sequence length and tokens."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ..fusions import build_fusion
from .recipe import BenchRecipe

BASE = {"depth": 12, "width": 256, "rows": 16, "length": 64}


def measure_scaling(recipe: BenchRecipe, advance: Callable[[str], None]) -> list[dict[str, Any]]:
    """Seconds of one forward and backward pass of DWAtt (bottleneck 64, so that the width enters once) on random states.

    Returns:
        A row for each axis and value: `axis`, `value`, `seconds` (median over rounds that take turns).
    """
    axes = {
        "depth": [{**BASE, "depth": n} for n in recipe.depths],
        "width": [{**BASE, "width": d} for d in recipe.widths],
        "sequence length": [{**BASE, "rows": 4, "length": t} for t in recipe.lengths],
        "tokens": [{**BASE, "rows": t // 64, "length": 64} for t in recipe.tokens],
    }
    rows = []
    for axis, shapes in axes.items():
        advance(f"scaling, {axis}")
        runs = [_round(**shape) for shape in shapes]
        for run in runs:
            run()
        seconds: list[list[float]] = [[] for _ in runs]
        for _ in range(max(3, recipe.repeats)):
            for i, run in enumerate(runs):
                seconds[i].append(run())
        names = {"depth": "depth", "width": "width", "sequence length": "length"}
        for shape, taken in zip(shapes, seconds, strict=True):
            value = shape[names[axis]] if axis in names else shape["rows"] * shape["length"]
            rows.append({"axis": axis, "value": value, "seconds": statistics.median(taken)})
    return rows


def exponents(rows: list[dict[str, Any]]) -> dict[str, float]:
    """For each axis the exponent `b` of the fit `seconds = a value^b`, by least squares on logarithms."""
    result = {}
    for axis in dict.fromkeys(row["axis"] for row in rows):
        points = [(math.log(row["value"]), math.log(row["seconds"])) for row in rows if row["axis"] == axis]
        if len(points) > 1:
            result[axis] = statistics.linear_regression(*zip(*points, strict=True)).slope
    return result


def _round(depth: int, width: int, rows: int, length: int) -> Callable[[], float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    fusion = build_fusion("dwatt", width, depth, bottleneck=64).to(device)
    states = [torch.randn(rows, length, width, device=device) for _ in range(depth)]

    def run() -> float:
        begun = time.perf_counter()
        fusion(states, states[-1]).sum().backward()
        fusion.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    return run
