"""One run of a comparison: a subset, a method, a seed, a learning rate."""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from ..backbone.atomic import written_whole
from ..runs.attaching import adapter_config, load_attached
from ..runs.environment import denormals_flushed, versions
from ..runs.evaluation import evaluations
from ..runs.fitting import not_finite
from ..runs.label_depths import depth_by_label
from ..runs.loading import check_lengths
from ..runs.memory import PeakMemory
from ..runs.trainers import TRAINING_DEFAULTS, make_trainer
from ..states import LayerStateCache
from ..tasks.base import Measure
from ..tuner import FusionConfig
from ..tuner.counts import count_trainable
from .examples import encoded_part, splits_of, subset
from .recipe import StudyRecipe
from .states import states_folder


class RunFailedError(ValueError):
    """A run that did not give a number."""


@dataclass(frozen=True)
class Trial:
    """What identifies one run of a comparison. `stage` is `rate` (development data only) or `report`."""

    data: str
    method: str
    size: int
    seed: int
    rate: float
    stage: str

    def steps(self, study: StudyRecipe) -> int:
        """Optimizer steps."""
        method = study.methods[self.method]
        training = {**study.training, **method.training}
        training = {**TRAINING_DEFAULTS, "gradient_accumulation_steps": 1, **training}
        batch = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
        return min(study.epochs * math.ceil(self.size / batch), method.max_steps or study.max_steps)


class KeepBest(TrainerCallback):
    """Asks for evaluations, evenly spread and with the last step one of them, and keeps the best one's weights in memory.

    Also the curves of score and loss.
    """

    def __init__(self, measure: Measure, steps: int, evaluations: int) -> None:
        self.measure = measure
        self.moments = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
        self.best: tuple[float, int] | None = None
        self.weights: dict[str, torch.Tensor] = {}
        self.curve: list[tuple[int, float]] = []
        self.losses: list[tuple[int, float]] = []
        self.cpu_seconds = 0.0  # of evaluations
        self.begun = 0.0  # processor time at which an evaluation began

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks for an evaluation where one is due."""
        control.should_evaluate = state.global_step in self.moments
        self.begun = time.process_time()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Notes the score, and the weights if it is the best so far."""
        self.cpu_seconds += time.process_time() - self.begun
        score = float(kwargs["metrics"][f"eval_{self.measure.name}"])
        self.curve.append((state.global_step, score))
        self.losses.append((state.global_step, float(kwargs["metrics"]["eval_loss"])))
        if self.best is None or self.measure.better(score, self.best[0]):
            self.best = (score, state.global_step)
            model = kwargs["model"]
            self.weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@denormals_flushed()
def run_trial(
    study: StudyRecipe, run: Trial, states: Path, start: Path | None = None, keep_weights: Path | None = None
) -> dict[str, Any]:
    """Trains once and scores; a method in which nothing trains is scored as it is.

    Args:
        study: The comparison.
        run: Which run.
        states: Folder of the layer states.
        start: Weights of another method's run to begin with, where names and shapes fit.
        keep_weights: Where to write the weights of the best evaluation.

    Returns:
        The run's settings and the versions it was made with, `dev` (the best score), `diverged` (a loss or a weight is not finite),
        `curve` (step, score), `loss_curve` (step, development loss as the Trainer has it: over pieces or rows where the task reports a
        loss, else a mean over batches), parameters by part, seconds of training (those of the processor are without evaluations, and
        other work beside does not lengthen them), memory, and for a reported run `test` and the mean weights over depth by label.
        Where the task reports a loss also `dev_loss` and `test_loss`, of the same weights as `dev` and `test`.
    """
    transformers.utils.logging.disable_progress_bar()  # "Loading weights", once a run
    recipe = study.recipe_of(run.data, run.method, run.seed)
    steps = run.steps(study)
    recipe.training.update(
        learning_rate=run.rate,
        max_steps=steps,
        eval_strategy="no",  # KeepBest asks for them
        save_strategy="no",
        logging_strategy="no",
        load_best_model_at_end=False,
        disable_tqdm=True,
    )
    splits = splits_of(study, run.data)
    config = adapter_config(recipe)
    # not cut (fusion_depth): all methods read the states of one backbone
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Nothing trains")  # told below by what is left out
        model, tokenizer = load_attached(recipe, config, splits.labels, cut=False)
    trains = any(p.requires_grad for p in model.parameters())  # else it is the backbone as it is, to compare with
    if start is not None:
        start_from(model, start)
    task, length = recipe.task, recipe.data.max_length
    cache = None
    if not config.has_lora:
        cached = states_folder(study, run.data, run.method, states)
        cache = LayerStateCache(cached, model, verify=False, tokenizer=tokenizer, max_length=length)
    classes = [example.labels[0] for example in splits.train] if study.per_class else None
    drawn = subset(classes, len(splits.train), run.size, run.seed)
    # what is joined stays in its order
    chosen = [splits.train[i] for i in (sorted(drawn) if recipe.data.packing else drawn)]
    encoded = {"train": task.encoded(chosen, tokenizer, splits.labels, recipe.data)}
    for name in ("dev", "test") if run.stage == "report" and splits.test else ("dev",):
        encoded[name] = encoded_part(recipe.data.model_dump_json(), task, study.backbone.model_dump_json(), name)
    for part in encoded.values():
        check_lengths(model, part.rows)
    sets = evaluations(model, task, replace(splits, train=chosen), encoded, cache)
    keep = KeepBest(task.main, steps, study.methods[run.method].evaluations or study.evaluations)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, tokenizer, recipe, sets["train"], sets["dev"], Path(folder))
        trainer.add_callback(keep)
        trainer.remove_callback(PrinterCallback)  # the study has one progress bar
        if study.methods[run.method].lora_rate_scale != 1:
            scale_lora_rate(trainer, study.methods[run.method].lora_rate_scale)
        begun, begun_cpu = time.perf_counter(), time.process_time()
        with PeakMemory() as memory:
            if trains:
                trainer.train()
            else:
                keep.begun = begun_cpu
                trainer.evaluate()
        seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - begun_cpu
    if keep.best is None:
        raise RunFailedError(f"The run {run} was never evaluated.")
    broken = not_finite(model)
    result = {
        **asdict(run),
        "regime": regime(study, run.method),
        "adapter": recipe.adapter,
        "dev": keep.best[0],
        "best_step": keep.best[1],
        "diverged": bool(broken) or not all(math.isfinite(loss) for _, loss in keep.losses),
        "curve": keep.curve,
        "loss_curve": keep.losses,
        "steps": steps if trains else 0,
        "parameters": count_trainable(model),
        "seconds": round(seconds, 2),
        "training_cpu_seconds": round(cpu_seconds - keep.cpu_seconds, 2),
        "evaluation_seconds": round(sum(e["eval_runtime"] for e in trainer.state.log_history if "eval_runtime" in e), 2),
        "peak_memory_mib": memory.mib,
        "versions": versions(),
    }
    if task.loss is not None:
        result["dev_loss"] = dict(keep.losses)[keep.best[1]]
    if keep_weights is not None:
        with written_whole(keep_weights) as temporary:
            save_file(keep.weights, temporary)
    if run.stage == "report":
        model.load_state_dict(keep.weights, strict=False)
        if "test" in sets:
            scores = sets["test"].predicted_scores(trainer)
            result["test"] = scores[task.main.name]
            if task.loss is not None:
                result["test_loss"] = scores["loss"]
        if run.seed == study.seeds[0] and not result["diverged"]:
            result["depth"], result["layers"] = depth_by_label(model, trainer, sets["dev"])
    return result


def start_from(model: nn.Module, weights: Path) -> None:
    """Loads the trained weights that `run_trial` kept of another method's run: the fusion, LoRA, or both, and the head.

    Raises:
        RunFailedError: If the methods share neither, or what they share differs in a name or a shape.
    """
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept = load_file(weights)
    parts = [p for p in (".fusions.", ".lora_") if any(p in name for name in own) and any(p in name for name in kept)]
    shared = [name for name in kept if any(part in name for part in parts)]
    wrong = [name for name in shared if name not in own or own[name].shape != kept[name].shape]
    if wrong or not shared:
        which = f"{len(wrong)} of {len(shared)} tensors, for example {wrong[0]!r}" if wrong else "none of the tensors"
        raise RunFailedError(
            f"The adapter weights in {str(weights)!r} do not fit the method that should start from them ({which}). Give both "
            "methods the same fusion, LoRA rank and widths for the part that they share."
        )
    model.load_state_dict({n: w for n, w in kept.items() if n in own and own[n].shape == w.shape}, strict=False)


def regime(study: StudyRecipe, method: str) -> str:
    """`frozen`, `lora`, `lora + fusion`, with the bits of a quantised backbone."""
    chosen = study.methods[method]
    lora = FusionConfig(**chosen.adapter).has_lora
    fusion = chosen.adapter.get("fusion", "dwatt") != "last"
    name = ("lora + fusion" if fusion else "lora") if lora else "frozen"
    bits = chosen.bits or study.backbone.bits
    return name if bits is None else f"{name}, {bits}-bit"


def scale_lora_rate(trainer: Any, scale: float) -> None:
    """Gives LoRA's matrices a learning rate of their own, as a multiple of the others'."""
    optimizer = trainer.create_optimizer()
    lora = {id(p) for n, p in trainer.model.named_parameters() if ".lora_" in n}
    groups = []
    for group in optimizer.param_groups:
        parts = {True: [], False: []}  # type: dict[bool, list[Any]]
        for parameter in group["params"]:
            parts[id(parameter) in lora].append(parameter)
        rate = group["lr"]
        groups += [{**group, "params": ps, "lr": rate * (scale if own else 1)} for own, ps in parts.items() if ps]
    optimizer.param_groups.clear()
    for group in groups:
        optimizer.add_param_group(group)
