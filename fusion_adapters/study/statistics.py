"""Means, intervals and paired differences over the runs of a comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from .recipe import StudyRecipe

RESAMPLES = 10_000
SHARE_OF_FINAL = 0.9
FEWEST_SEEDS = 3  # two have three different resamples: an interval from the one to the other, whatever the spread


def interval(values: Sequence[float]) -> list[float] | None:
    """The 95 % bootstrap interval (percentiles) of a mean over seeds; None for fewer than three.

    With few seeds it is narrower than a t interval; five give 126 different resamples.
    """
    if len(values) < FEWEST_SEEDS:
        return None
    drawn = np.random.default_rng(0).choice(np.asarray(values, dtype=float), (RESAMPLES, len(values)))
    low, high = np.percentile(drawn.mean(1), (2.5, 97.5))
    return [float(low), float(high)]


def describe(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation, interval and the values themselves; a run that diverged makes the first three NaN."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": spread, "interval": interval(values), "values": list(values)}


def steps_to_share(curve: Sequence[Sequence[float]], higher: bool = True, share: float = SHARE_OF_FINAL) -> int:
    """The first evaluated step at which a score has reached a share of the run's best.

    Of a score of which less is better, the best one is a share of it.
    """
    if not higher:
        enough = min(score for _, score in curve) / share
        return int(next((step for step, score in curve if score <= enough), curve[-1][0]))  # none, if the run diverged
    best = max(score for _, score in curve)
    enough = share * best if best > 0 else best  # a correlation can be negative, where a share of it would be more
    return int(next(step for step, score in curve if score >= enough))


def _score(run: dict[str, Any], key: str) -> float:
    """A score of a run; NaN if the run diverged, so that it counts in no mean and is marked."""
    return math.nan if run.get("diverged") else float(run[key])


def summarise(study: StudyRecipe, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row for each data set, size and method, from the reported runs; scores in `unit`.

    Returns:
        `rows`, each with `dev`, `test` (or null), where the task reports a loss `dev_loss` and `test_loss`, `seconds`,
        the chosen `rate` and whether it is the lowest or highest of its grid (`rate_at_edge`), `parameters`, and
        `to_baseline` and `to_reference`: the paired differences of the test score (of the development score where there is
        no test). `score`, the name of the scores, their `unit` and decimal places (`digits`), and whether higher ones are better;
        `loss`, what it is, or null. And `versions`, the different ones that the runs were made with.
    """
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for run in runs:
        if run["stage"] == "report":
            groups.setdefault((run["data"], run["size"], run["method"]), []).append(run)
    main = study.task.main
    rows, scale = [], main.scale
    for (data, size, method), group in groups.items():
        measure = "test" if "test" in group[0] else "dev"
        grid = study.methods[method].rates or study.rates
        row = {
            "data": data,
            "size": size,
            "method": method,
            "regime": group[0]["regime"],
            "parameters": group[0]["parameters"],
            "rate": group[0]["rate"],
            "rate_at_edge": group[0]["rate"] in (min(grid), max(grid)) and len(grid) > 1,
            "seeds": [run["seed"] for run in group],
            "measure": measure,
            "dev": describe([scale * _score(run, "dev") for run in group]),
            "test": describe([scale * _score(run, "test") for run in group]) if measure == "test" else None,
            **{
                key: describe([_score(run, key) for run in group])
                for key in ("dev_loss", "test_loss")
                if all(key in run for run in group)
            },
            "seconds": statistics.mean(run["seconds"] for run in group),
            "training_seconds": statistics.mean(run["seconds"] - run["evaluation_seconds"] for run in group),
            "peak_memory_mib": statistics.mean(run["peak_memory_mib"] for run in group),
            "steps_to_90": statistics.mean(steps_to_share(run["curve"], main.higher_is_better) for run in group),
        }
        for key, other in (("to_baseline", study.baseline), ("to_reference", study.reference)):
            against = {run["seed"]: run for run in groups.get((data, size, other or ""), [])}
            both = [(_score(run, measure), _score(against[run["seed"]], measure)) for run in group if run["seed"] in against]
            pairs = [scale * (own - others) for own, others in both]
            row[key] = describe(pairs) if pairs and method != other else None
        rows.append(row)
    versions = [run["versions"] for run in runs if "versions" in run]  # runs of earlier versions did not say
    different = [v for i, v in enumerate(versions) if v not in versions[:i]]
    loss = study.task.loss
    return {
        "baseline": study.baseline,
        "reference": study.reference,
        "score": main.name,
        "unit": main.unit,
        "digits": main.digits,
        "higher_is_better": main.higher_is_better,
        "why_zero": study.task.why_zero,
        "loss": None if loss is None else loss.meaning,
        "versions": different,
        "rows": rows,
    }
