"""Runs the grid of a comparison in processes of one thread each; every run is a file, so that a stopped study goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..backbone.atomic import write_text_whole
from ..fusions import fusion_class, fusion_options
from ..runs.attaching import adapter_config
from ..runs.environment import cores
from ..runs.loading import settle_label_at
from ..runs.pretrained import locate
from ..tuner.budget import settle_budget
from ..tuner.config import FusionConfig
from ..tuner.counts import skeleton
from .examples import count_examples, forget, training_sizes
from .recipe import StudyRecipe
from .report import write_report
from .resume import begin_or_resume, settle_scales
from .states import prepare_states, with_local_backbone
from .statistics import summarise
from .trial import Trial, run_trial

LORA_FIELDS = ("lora_alpha", "use_rslora", "use_dora")
ONLY_IN_TRAINING = ("dropout",)  # options of fusions that change no answer of a trained one
MOST_WORKERS = 61  # Windows cannot wait for more


@dataclass(frozen=True)
class Cell:
    """One method at one size on one data set: its runs for the learning rate, then its reported runs."""

    data: str
    method: str
    size: int


def run_study(study: StudyRecipe, output: str | Path, workers: int | None = None) -> dict[str, Any]:
    """Runs what is not done yet and writes the report.

    Args:
        study: The comparison.
        output: The folder: `runs/` (a file a run), `states/` (cached layer states), `results.csv`, `summary.md`,
            `summary.json` and figures. A folder with the same comparison begun is gone on with.
        workers: Processes; None means one a core, on a machine with a GPU one.

    Returns:
        The content of `summary.json`.

    Raises:
        ValueError: If the folder holds another comparison, or a run cannot be done; finished runs stay.
        OSError: If data, model or folder cannot be read or written, or one of the processes is killed.
    """
    output = Path(output)
    forget()
    sizes = training_sizes(study)
    settle_scales(study, output, _without_weights(study))
    check_budgets(study)
    check_starts(study)
    settle_labels(study)
    begin_or_resume(study, output)
    named, study = study, with_local_backbone(study, output / "states")
    cells = [
        Cell(data, method, size)
        for size in dict.fromkeys(s for data in study.data for s in sizes[data])
        for data in study.data
        if size in sizes[data]
        for method in study.methods
    ]
    if workers is None:
        workers = 1 if torch.cuda.is_available() else min(cores(), MOST_WORKERS)
    # those that others wait for come first: where a rate is chosen, and whose weights others start from
    cells.sort(key=lambda cell: (rate_size(study, cell) != cell.size, study.methods[cell.method].start_from is not None))
    todo = [cell for cell in cells if not _is_done(study, cell, output)]
    if todo:
        prepare_states(study, output / "states")
    steps = {cell: _steps(study, cell) for cell in cells}
    bar = tqdm(total=sum(steps.values()), initial=sum(steps[c] for c in cells if c not in todo), unit="step", desc="runs")
    with bar:
        if workers == 1:
            for cell in todo:
                run_cell(study, cell, output)
                bar.update(steps[cell])
        else:
            context = multiprocessing.get_context("spawn")
            # closed when the comparison is stopped, or killed: its processes then end at once, where they would train on
            alive, end = context.Pipe(duplex=False)
            with end, ProcessPoolExecutor(workers, context, _begin_worker, (alive,)) as pool:
                try:  # a process may end before all cells are handed out
                    waiting = {cell: {c for c in needs(study, cell) if c in todo} for cell in todo}
                    futures: dict[Future[Any], Cell] = {}
                    while waiting or futures:
                        for cell in [cell for cell, others in waiting.items() if not others]:
                            del waiting[cell]
                            futures[pool.submit(run_cell, study, cell, output)] = cell
                        for future in wait(futures, return_when=FIRST_COMPLETED).done:
                            future.result()
                            cell = futures.pop(future)
                            bar.update(steps[cell])
                            for others in waiting.values():
                                others.discard(cell)
                except BrokenProcessPool:
                    raise ChildProcessError(
                        f"One of the {workers} processes of the comparison ended (killed, or out of memory?). The same command "
                        "goes on after the runs that are done; with a smaller --workers it needs less memory."
                    ) from None
                except BaseException:
                    end.close()
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
    runs = [run for cell in cells for run in run_cell(study, cell, output)]
    summary = summarise(named, runs)
    write_report(named, runs, summary, output)
    return summary


def needs(study: StudyRecipe, cell: Cell) -> set[Cell]:
    """The cells whose runs a cell reads: where its rate is chosen, and whose weights it starts from. Two processes would run them twice."""
    found = {replace(cell, size=rate_size(study, cell))}
    source = study.methods[cell.method].start_from
    if source is not None:
        starts = {replace(other, method=source) for other in (cell, *found)}
        found |= starts | {replace(other, size=rate_size(study, other)) for other in starts}
    return found - {cell}


def run_cell(study: StudyRecipe, cell: Cell, output: Path) -> list[dict[str, Any]]:
    """The runs of a cell, read where they are done and run where they are not."""
    chosen, tried = rate_of(study, cell, output)
    runs = [_run(study, Trial(cell.data, cell.method, cell.size, seed, chosen, "report"), output) for seed in study.seeds]
    return [*(run for run in tried if run["size"] == cell.size), *runs]


def rate_of(study: StudyRecipe, cell: Cell, output: Path) -> tuple[float, list[dict[str, Any]]]:
    """The learning rate with the best mean development score, and the runs that chose it; a grid of one needs none.

    A rate with which a run diverged is not chosen.
    """
    rates = study.methods[cell.method].rates or study.rates
    tried = [_run(study, run, output) for run in _tries(study, cell)]
    if not tried:
        return rates[0], []
    sign = 1 if study.task.main.higher_is_better else -1
    whole = [rate for rate in rates if not any(run.get("diverged") for run in tried if run["rate"] == rate)]
    # where all diverged, the lowest, whose reported runs are marked
    ranked = whole or [min(rates)]
    best = max(ranked, key=lambda rate: sign * statistics.mean(run["dev"] for run in tried if run["rate"] == rate))
    return best, tried


def rate_size(study: StudyRecipe, cell: Cell) -> int:
    """The size at which a cell's learning rate is chosen: the largest of `rate_sizes` not above it, or the smallest."""
    if study.rate_sizes is None:
        return cell.size
    sizes = sorted(count_examples(study, cell.data, s) for s in study.rate_sizes)
    return max((s for s in sizes if s <= cell.size), default=sizes[0])


def _tries(study: StudyRecipe, cell: Cell) -> list[Trial]:
    """The runs that choose a cell's learning rate; none where there is one rate."""
    size, rates = rate_size(study, cell), study.methods[cell.method].rates or study.rates
    tries = [Trial(cell.data, cell.method, size, seed, rate, "rate") for rate in rates for seed in study.rate_seeds]
    return tries if len(rates) > 1 else []


def _run(study: StudyRecipe, run: Trial, output: Path) -> dict[str, Any]:
    result = _found(study, run, output)
    if result is not None:
        return result
    path, source, start = _path(run, output), study.methods[run.method].start_from, None
    start_rate = _start_rate(study, run, output)
    if source is not None and start_rate is not None:
        start = _weights(study, replace(run, method=source, rate=start_rate), output)
    begun = time.perf_counter()
    keep = path.with_suffix(".safetensors") if _is_source(study, run.method) else None
    result = run_trial(study, run, output / "states", start, keep)
    result["start_rate"] = start_rate
    result["seconds_total"] = round(time.perf_counter() - begun, 2)
    write_text_whole(path, json.dumps(result) + "\n")
    return result


def _found(study: StudyRecipe, run: Trial, output: Path) -> dict[str, Any] | None:
    """The result of a run that is done, and is what it would be today.

    Its seed may have chosen a rate before it was to be reported, and its weights may have come from a method that has
    another rate now.
    """
    path = _path(run, output)
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    same = result["stage"] == run.stage and result.get("start_rate") == _start_rate(study, run, output)
    return result if same else None


def _start_rate(study: StudyRecipe, run: Trial, output: Path) -> float | None:
    """The learning rate of the method whose weights a run starts from; None where it starts from none."""
    source = study.methods[run.method].start_from
    return None if source is None else rate_of(study, Cell(run.data, source, run.size), output)[0]


def _weights(study: StudyRecipe, run: Trial, output: Path) -> Path:
    """The trained weights of a run that others start from; where only its scores were kept, it trains again for them."""
    _run(study, run, output)
    path = _path(run, output).with_suffix(".safetensors")
    if not path.is_file():
        run_trial(study, run, output / "states", None, path)
    return path


def _path(run: Trial, output: Path) -> Path:
    return output / "runs" / run.data / run.method / f"{run.size}-seed{run.seed}-{run.rate:g}.json"


def _is_source(study: StudyRecipe, method: str) -> bool:
    return any(m.start_from == method for m in study.methods.values())


def check_budgets(study: StudyRecipe) -> None:
    """Fits every method to its budget on the backbone's configuration, before anything is computed.

    Raises:
        BudgetTooSmallError: If one does not fit.
    """
    data = next(iter(study.data))
    configs = [adapter_config(study.recipe_of(data, method)) for method in study.methods]
    budgeted = [replace(c, task_type=None, modules_to_save=None) for c in configs if c.fusion_budget is not None]
    if budgeted:
        model = _without_weights(study)
        for config in budgeted:
            settle_budget(config, model)


def settle_labels(study: StudyRecipe) -> None:
    """Settles for each data set which piece of a word has its label, see `settle_label_at`."""
    if study.task.of_words and any(data.label_at == "auto" for data in study.data.values()):
        model = _without_weights(study)
        for name, data in study.data.items():
            settle_label_at(data, study.task, model, adapter_config(study.recipe_of(name, next(iter(study.methods)))))


def _without_weights(study: StudyRecipe) -> nn.Module:
    """The backbone from its configuration alone."""
    name, options = locate(study.backbone)
    try:  # with its task head: names in a config may begin with the name that the head's model gives the backbone
        return skeleton(name, study.task.auto_model, **options)
    except ValueError:  # there is none for the task, as loading it says better
        return skeleton(name, **options)


def check_starts(study: StudyRecipe) -> None:
    """Checks that a method computes with the weights that it starts from as the method that trained them.

    Names and shapes are checked when they are loaded; scales and switches leave no trace in them.

    Raises:
        ValueError: If a setting of the part that both have differs.
    """
    data = next(iter(study.data))
    for name, method in study.methods.items():
        if method.start_from is None:
            continue
        own, source = (adapter_config(study.recipe_of(data, n)) for n in (name, method.start_from))
        fields: tuple[str, ...] = ("fusion_alpha", *(LORA_FIELDS if own.has_lora and source.has_lora else ()))
        if own.fusion == source.fusion != "last":
            # the widths are in the shapes
            aside = (*fusion_class(own.fusion).widths, *ONLY_IN_TRAINING)
            fields += (
                "fusion_layers",
                "fusion_norm",
                *(f"fusion_{name}" for name in fusion_options(own.fusion) if name not in aside),
            )
        for field in fields:
            here, there = (_setting(config, field) for config in (own, source))
            if here != there:
                raise ValueError(
                    f"Method {name!r} starts from {method.start_from!r}, but {field} is {here} here and {there} there, so the same "
                    "weights would mean something else. Give both the same."
                )


def _setting(config: FusionConfig, field: str) -> Any:
    value = getattr(config, field)
    return fusion_options(config.fusion).get(field.removeprefix("fusion_")) if value is None else value


def _begin_worker(alive: Connection) -> None:
    # two that share cores slow each other down many times over
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()


def _end_with_parent(alive: Connection) -> None:
    # runs that are done are files; the one under way is lost
    alive.poll(None)  # until the other end is closed
    os._exit(1)


def _is_done(study: StudyRecipe, cell: Cell, output: Path) -> bool:
    if not _has_rate(study, cell, output):
        return False
    rate, _ = rate_of(study, cell, output)  # nothing is run: its runs are all there
    runs = [Trial(cell.data, cell.method, cell.size, seed, rate, "report") for seed in study.seeds]
    return all(_found(study, run, output) for run in runs)


def _has_rate(study: StudyRecipe, cell: Cell, output: Path) -> bool:
    """Whether the learning rate of a cell is chosen, and that of the method it starts from."""
    source = study.methods[cell.method].start_from
    if source is not None and not _has_rate(study, replace(cell, method=source), output):
        return False
    return all(_found(study, run, output) for run in _tries(study, cell))


def _steps(study: StudyRecipe, cell: Cell) -> int:
    tried = len(_tries(study, cell)) if rate_size(study, cell) == cell.size else 0
    return Trial(cell.data, cell.method, cell.size, 0, 0.0, "rate").steps(study) * (tried + len(study.seeds))
