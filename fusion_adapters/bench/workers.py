"""Processes that take turns, so that a drift of the machine's speed meets all cases alike."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..memory import PeakMemory
from .cases import ROUNDS, Setting
from .settings import BenchRecipe

MEMORY_CASES = ("LoRA", "LoRA + DWAtt", "last, live", "DWAtt, live")


def alternate(
    recipe: BenchRecipe, cases: Sequence[str], folder: Path, advance: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds of each case in each round: all cases once, then all again; the first round is not counted.

    Args:
        recipe: The benchmark.
        cases: Names in `cases.ROUNDS`, each run in a process of its own.
        folder: Where cached states are, and temporary ones go.
        advance: Called with what is done next, for a progress bar.

    Raises:
        RuntimeError: If a case fails; the message is that of the process.
    """
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    workers = []
    try:
        for case in cases:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, recipe, case, folder), daemon=True)
            process.start()
            workers.append((case, process, ours))
            _answer(ours, case)  # one at a time also while they set themselves up
        for turn in range(recipe.repeats + 1):
            for case, _, connection in workers:
                advance(case)
                connection.send("go")
                taken = _answer(connection, case)
                if turn:
                    seconds[case].append(taken)
    finally:
        for _, process, _ in workers:
            process.terminate()
            process.join()
    return seconds


def peak_memory(recipe: BenchRecipe, folder: Path, advance: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """MiB above the loaded model of one training step and of one inference with the largest batch, per case."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, dict[str, float]] = {}
    for case in MEMORY_CASES:
        for kind in ("training", "inference"):
            advance(f"memory, {case}, {kind}")
            ours, theirs = context.Pipe()
            process = context.Process(target=_measure_memory, args=(theirs, recipe, case, kind, folder), daemon=True)
            process.start()
            try:
                found.setdefault(case, {})[kind] = _answer(ours, case)
            finally:
                process.terminate()
                process.join()
    return found


def _answer(connection: Any, case: str) -> float:
    try:
        answer = connection.recv()
    except EOFError:
        raise RuntimeError(f"The process of {case!r} ended without an answer (killed, or out of memory?).") from None
    if isinstance(answer, str):
        raise RuntimeError(f"{case!r} failed: {answer}")
    return answer


def _work(connection: Any, recipe: BenchRecipe, case: str, folder: Path) -> None:
    try:
        run = ROUNDS[case](Setting(recipe, folder), case)
        connection.send(0.0)
        while connection.recv() == "go":
            connection.send(run())
    except EOFError:
        return
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


def _measure_memory(connection: Any, recipe: BenchRecipe, case: str, kind: str, folder: Path) -> None:
    try:
        setting = Setting(recipe, folder)
        model = setting.attached(case)
        rows = sorted(setting.rows, key=lambda row: -len(row["input_ids"]))[: recipe.batch_size]
        small, large = (
            {k: v.to(setting.device) for k, v in setting.collator(chosen).items()} for chosen in (rows[:1], rows)
        )
        run = _training_step if kind == "training" else _inference
        run(model, small, step=False)  # kernels and their scratch memory are there then
        model.zero_grad()
        with PeakMemory() as memory:
            run(model, large, step=True)
        connection.send(memory.mib)
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


def _training_step(model: nn.Module, batch: dict[str, Any], step: bool) -> None:
    model.train()
    model(**batch).loss.backward()
    if step:
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4).step()


def _inference(model: nn.Module, batch: dict[str, Any], step: bool) -> None:
    model.eval()
    with torch.no_grad():
        model(**batch)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
