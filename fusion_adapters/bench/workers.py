"""Processes that take turns, so that a drift of the machine's speed meets all cases alike."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertModel

from ..runs.environment import denormals_flushed
from ..runs.memory import PeakMemory
from ..tuner import fusion_layers
from ..tuner.config import FusionConfig
from .cases import CASES
from .recipe import BenchRecipe
from .rounds import Setting, begin

DEEP_CASES = ("bare model", "DWAtt, all states kept", "DWAtt")
BOTTLENECK = 64  # a quarter of the width of the deep backbone
MEMORY_CASES = ("LoRA", "LoRA + DWAtt", "last, live", "DWAtt, live")
SECONDS_TO_END = 10

# glibc gives what a tensor leaves back to the system at once, so that resident memory is what is in use
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def alternate(
    recipe: BenchRecipe, cases: Sequence[str], folder: Path, advance: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds of each case in each round: all cases once, then all again; the first round is not counted.

    Args:
        recipe: The benchmark.
        cases: Names in `cases.CASES`, each run in a process of its own.
        folder: Where cached states are, and temporary ones go.
        advance: Called with what is done next, for a progress bar.

    Raises:
        ChildProcessError: If a case fails; the message is that of the process.
    """
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    workers = []
    try:
        for case in cases:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, recipe, case, folder), daemon=True)
            process.start()
            theirs.close()  # else the pipe never ends for us when the process does
            workers.append((case, process, ours))
            _answer(ours, case)  # one at a time also while they set themselves up
        for turn in range(recipe.repeats + 1):
            for case, _, connection in workers:
                advance(case)
                with contextlib.suppress(BrokenPipeError):  # it is gone: what follows says so
                    connection.send("go")
                taken = _answer(connection, case)
                if turn:
                    seconds[case].append(taken)
    finally:
        for _, process, connection in workers:
            _end(process, connection)
    return seconds


def peak_memory(recipe: BenchRecipe, folder: Path, advance: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """MiB above the loaded model of one training step and of one inference with the largest batch, per case."""
    found: dict[str, dict[str, float]] = {}
    for case in MEMORY_CASES:
        for kind in ("training", "inference"):
            advance(f"memory, {case}, {kind}")
            found.setdefault(case, {})[kind] = _in_a_process(_measure_memory, case, recipe, case, kind, folder)
    return found


def deep_inference_memory(recipe: BenchRecipe, advance: Callable[[str], None]) -> dict[str, float]:
    """MiB above the model of one inference through a random backbone of the largest of `depths`, per case."""
    found = {}
    for case in DEEP_CASES:
        advance(f"memory at {max(recipe.depths)} blocks, {case}")
        found[case] = _in_a_process(_measure_deep, case, max(recipe.depths), max(recipe.tokens), case)
    return found


def _in_a_process(target: Callable[..., None], case: str, *arguments: Any) -> float:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    before = {name: os.environ.get(name) for name in EXACT_MEMORY}
    os.environ.update(EXACT_MEMORY)  # the process inherits it
    try:
        process.start()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    theirs.close()
    try:
        return _answer(ours, case)
    finally:
        _end(process, ours)


def _end(process: Any, connection: Any) -> None:
    connection.close()  # a process that waits for the next round ends by itself, and cleans up behind itself
    process.join(SECONDS_TO_END)
    process.terminate()
    process.join()


def _answer(connection: Any, case: str) -> float:
    try:
        answer = connection.recv()
    except (EOFError, ConnectionResetError):
        raise ChildProcessError(f"The process of {case!r} ended without an answer (killed, or out of memory?).") from None
    if isinstance(answer, str):
        raise ChildProcessError(f"{case!r} failed: {answer}")
    return answer


@denormals_flushed()
def _work(connection: Any, recipe: BenchRecipe, case: str, folder: Path) -> None:
    try:
        transformers.utils.logging.disable_progress_bar()
        run = begin(Setting(recipe, folder), CASES[case])
        connection.send(0.0)
        while connection.recv() == "go":
            connection.send(run())
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


@denormals_flushed()
def _measure_memory(connection: Any, recipe: BenchRecipe, case: str, kind: str, folder: Path) -> None:
    try:
        transformers.utils.logging.disable_progress_bar()
        setting = Setting(recipe, folder)
        model = setting.attached(CASES[case])
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


def _measure_deep(connection: Any, depth: int, tokens: int, case: str) -> None:
    try:
        torch.manual_seed(0)
        shape: dict[str, Any] = {"vocab_size": 100, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
        model: Any = BertModel(BertConfig(**shape, num_hidden_layers=depth)).eval()
        if case != "bare model":
            model = get_peft_model(model, FusionConfig(fusion_bottleneck=BOTTLENECK))  # type: ignore[arg-type]
        if case == "DWAtt, all states kept":  # for whoever waits for the fusion's call
            fusion_layers(model)[0].active_fusion.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        ids = torch.zeros(max(1, tokens // 256), 256, dtype=torch.long, device=model.device)
        _inference(model, {"input_ids": ids[:1, :8]}, step=False)
        with PeakMemory() as memory:
            _inference(model, {"input_ids": ids}, step=False)
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
