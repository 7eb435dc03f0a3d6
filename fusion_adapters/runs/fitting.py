"""One training of an attached model with transformers' Trainer, and what is measured of it."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..states import LayerStateCache
from ..tasks.splits import Splits
from ..tuner.counts import count_trainable
from .environment import versions
from .evaluation import evaluations
from .intervals import interval
from .label_depths import depth_by_label
from .loading import check_lengths
from .memory import peak_of_process
from .recipe import Recipe
from .storing import rounded
from .trainers import make_trainer

WHOLE = "float32"  # in which an adapter is trained


class Fit:
    """Trains an attached model on the splits, keeps the best epoch by the development score, and measures.

    Args:
        model: The attached model.
        tokenizer: Its tokenizer.
        recipe: Training arguments, task and seed.
        splits: The data.
        folder: Where checkpoints go while training; they are removed at the end.
        cache: Layer states to train and score from, instead of running the backbone.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        splits: Splits,
        folder: Path,
        cache: LayerStateCache | None = None,
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.encoded = splits.encoded(recipe.task, tokenizer, recipe.data)
        self.sets = evaluations(model, recipe.task, splits, self.encoded, cache)
        check_lengths(model, [row for part in self.encoded.values() for row in part.rows])
        self.checkpoints = folder / "checkpoints"
        self.trainer = make_trainer(model, tokenizer, recipe, self.sets["train"], self.sets["dev"], self.checkpoints)
        self.seconds = 0.0
        self._compared: dict[str, tuple[list[Any], list[Any]]] = {}

    def train(self) -> None:
        """Trains; a model in which nothing trains stays as it is, to be scored.

        Raises:
            ValueError: If the training diverged.
        """
        if not any(p.requires_grad for p in self.model.parameters()):
            return
        begun = time.perf_counter()
        try:
            with warnings.catch_warnings():
                # peft looks beside a backbone whether its vocabulary has grown; beside a GGUF file there is no configuration to tell
                warnings.filterwarnings("ignore", message="Could not find a config file in")
                self.trainer.train()
        finally:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        self.seconds = time.perf_counter() - begun
        _check_finite(self.model, self.trainer.args.learning_rate)
        if self.recipe.save_dtype != WHOLE:  # what is scored from here on is what is stored
            rounded(self.model, getattr(torch, self.recipe.save_dtype))

    def compared(self, split: str) -> tuple[list[Any], list[Any]]:
        """Gold and predicted values of a split, in the order of its examples; predicted once, so after the training."""
        if split not in self._compared:
            self._compared[split] = self.sets[split].predictions(self.trainer)
        return self._compared[split]

    def metrics(self, scored: Sequence[str] = ("dev", "test")) -> dict[str, Any]:
        """Scores of these splits, where they are there, counts, times, memory and versions, as in `metrics.json`."""
        task = self.recipe.task
        scores = {name: task.score(*self.compared(name)) for name in scored if name in self.sets}
        name = task.main.name
        history = [
            {"epoch": round(entry["epoch"], 2), "loss": entry["eval_loss"], name: entry[f"eval_{name}"]}
            for entry in self.trainer.state.log_history
            if f"eval_{name}" in entry
        ]
        best = self.trainer.state.best_metric if self.trainer.args.load_best_model_at_end else None
        stored = {"dtype": self.recipe.save_dtype, "dev_before": best}
        return {
            "scores": scores,
            **({"stored": stored} if self.recipe.save_dtype != WHOLE else {}),
            "dev_by_epoch": history,
            "parameters": count_trainable(self.model),
            "examples": {name: len(s.examples) for name, s in self.sets.items()},
            "notes": {name: part.notes for name, part in self.encoded.items()},
            "seconds": {"train": round(self.seconds, 2)},
            "peak_memory_mib": peak_of_process(),
            "device": str(self.trainer.args.device),
            "seed": self.recipe.seed,
            "versions": versions(),
        }

    def details(self) -> dict[str, Any]:
        """What a card says beyond the scores: `intervals`, where there are examples enough, and `weights_over_depth` by label.

        The latter for fusions that have such weights, over the development data.
        """
        task, found = self.recipe.task, dict[str, Any]()
        if "test" in self.sets:
            between = interval(task, *self.compared("test"), len(self.sets["test"].examples))
            found = {} if between is None else {"intervals": {"test": {task.main.name: between}}}
        by_label, layers = depth_by_label(self.model, self.trainer, self.sets["dev"])
        return found | ({"weights_over_depth": {"layers": layers, "by_label": by_label}} if by_label else {})


def not_finite(model: nn.Module) -> list[str]:
    """The names of trained tensors that hold values which are not finite: the training diverged."""
    return [n for n, p in model.named_parameters() if p.requires_grad and not bool(p.detach().isfinite().all())]


def _check_finite(model: nn.Module, rate: float) -> None:
    if broken := not_finite(model):
        trained = sum(p.requires_grad for p in model.parameters())
        raise ValueError(
            f"The training diverged: {len(broken)} of {trained} trained tensors hold values that are not finite. Lower "
            f"training.learning_rate ({rate:g}), or give more training.warmup_steps."
        )
