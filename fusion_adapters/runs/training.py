"""A recipe to a run: load, attach, train with transformers' Trainer, score, save."""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import PartialState
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..states import LayerStateCache, cache_layer_states
from ..tasks.alignment import IGNORED, MAIN_SCORE, Encoded, decode_tags, encode, main_score, score
from ..tasks.data import Example, Splits, load_splits
from ..tuner import fusion_layers
from ..tuner.budget import count_trainable
from ..tuner.config import FusionConfig
from .card import model_card
from .environment import versions
from .files import check_output, json_text, written_aside
from .loading import PEFT_TASKS, check_lengths, load_model, load_tokenizer, match_padding
from .memory import peak_of_process
from .recipe import Recipe, Task
from .trainers import MaskedLMTrainer, OrderedTrainer

# Of the recipe's own; whatever it sets wins.
TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "num_train_epochs": 10,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "warmup_steps": 0.1,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "logging_strategy": "epoch",
    "load_best_model_at_end": True,
    "save_total_limit": 1,
    "report_to": "none",
}


@dataclass
class Evaluation:
    """Examples with their encoding; turns what a model predicts (label numbers, pieces) into scores.

    The dataset is sorted by length, so that a batch has little padding; with a cache it brings the layer states along.
    """

    task: Task
    labels: list[str]
    examples: Sequence[Example]
    encoded: Encoded
    cache: LayerStateCache | None = None
    positions: str = "all"

    def __post_init__(self) -> None:
        rows = self.encoded.rows
        self.order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]), reverse=True)
        ordered = [rows[i] for i in self.order]
        self.dataset: Any = (
            Dataset.from_list(ordered) if self.cache is None else self.cache.dataset(ordered, positions=self.positions)
        )

    def scores(self, predictions: Any, label_ids: Any) -> dict[str, Any]:
        """All scores of predicted label numbers; for arguments and errors see `watched_scores`."""
        return score(self.task, *self._compared(predictions, label_ids))

    def watched_scores(self, predictions: Any, label_ids: Any) -> dict[str, float]:
        """The one score by which epochs are compared, by name; for masked language modelling also the exact `loss`.

        Args:
            predictions: In the order of `dataset`, `(rows, positions)`, or `(rows,)` for sequences; for masked language
                modelling the two arrays of `MaskedLMTrainer`.
            label_ids: The labels that came back with them, of the same shape.

        Raises:
            RuntimeError: If the labels show that the predictions come in another order.
        """
        if self.task == "masked_lm":
            scores = self.scores(predictions, label_ids)
            return {name: scores[name] for name in (MAIN_SCORE[self.task], "loss")}
        return {MAIN_SCORE[self.task]: main_score(self.task, *self._compared(predictions, label_ids))}

    def _compared(self, predictions: Any, label_ids: Any) -> tuple[list[Any], list[Any]]:
        """Gold and predicted labels in the order of the examples."""
        if self.task == "masked_lm":
            predictions = np.stack(predictions, axis=-1)  # (rows, positions, 2)
        rows: list[Any] = [None] * len(self.order)
        for i, predicted, expected in zip(self.order, predictions, label_ids, strict=True):
            own = self.encoded.rows[i]["labels"]
            if list(expected[: len(own)]) != own if isinstance(own, list) else expected != own:
                raise RuntimeError("The Trainer returned predictions in another order than that of the dataset.")
            rows[i] = predicted
        if self.task == "masked_lm":
            pieces = [row["labels"] for row in self.encoded.rows]
            found = [p for own, row in zip(pieces, rows, strict=True) for p in row[: len(own)][np.array(own) != IGNORED]]
            return [piece for own in pieces for piece in own if piece != IGNORED], found
        if self.task == "sequence_classification":
            return [e.labels[0] for e in self.examples], [self.labels[int(p)] for p in rows]
        return [e.labels for e in self.examples], decode_tags(self.encoded, rows, self.examples, self.labels)


def run_recipe(
    recipe: Recipe, output: str | Path, overwrite: bool = False, cache: str | Path | None = None
) -> dict[str, Any]:
    """Trains what a recipe describes and writes the run to a folder.

    The folder holds `adapter/` (what peft saves), `metrics.json`, `run.json` (what `predict` needs: recipe, labels) and
    `recipe.yaml`. It appears when the run is complete.

    Args:
        recipe: The recipe.
        output: The folder, new or empty.
        overwrite: Replace an earlier run in that folder.
        cache: A folder of cached layer states to train from, see `cache_recipe`.

    Returns:
        The content of `metrics.json`.

    Raises:
        StaleCacheError: If the cache belongs to something else.
        ValueError: If data, adapter and backbone do not fit.
        OSError: If the model, the data or the output folder cannot be read or written.
    """
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:  # set by torchrun, accelerate and their like
        raise ValueError(
            f"A recipe is trained in one process, and this is one of {processes}, which would write over each other's run. Start it "
            "without a launcher; on several processes, train with transformers' Trainer in a script of your own (README)."
        )
    output = check_output(output, overwrite)
    config = adapter_config(recipe)
    started = time.perf_counter()
    splits = load_splits(recipe.data, recipe.task, recipe.seed)
    model, tokenizer = load_attached(recipe, config, splits.labels)
    states = None
    if cache is not None:
        states = LayerStateCache(cache, model, tokenizer=tokenizer, max_length=recipe.data.max_length)
    with written_aside(output, overwrite) as folder:
        metrics = train(model, tokenizer, recipe, splits, folder, states)
        # the name to record is the recipe's, not the folder of an installed package
        base = model.get_base_model()
        base.name_or_path = base.config._name_or_path = config.base_model_name_or_path = recipe.backbone.model
        (folder / "adapter").mkdir()
        (folder / "adapter" / "README.md").write_text(model_card(recipe, metrics, splits.labels), encoding="utf-8")
        model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
        length = min(64, recipe.data.max_length)  # a look at the beginnings is enough
        metrics["reload_difference"] = reload_difference(
            model, folder / "adapter", tokenizer, splits.dev, recipe.task, length
        )
        metrics["bytes"] = {p.name: p.stat().st_size for p in sorted((folder / "adapter").iterdir())}
        metrics["seconds"]["total"] = round(time.perf_counter() - started, 2)
        run = {"recipe": recipe.model_dump(), "labels": splits.labels}
        (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(), sort_keys=False), encoding="utf-8")
        (folder / "metrics.json").write_text(json_text(metrics), encoding="utf-8")
    return metrics


def cache_recipe(recipe: Recipe, folder: str | Path, dtype: str = "float16") -> LayerStateCache:
    """Computes the layer states of a recipe's data once, for `run_recipe(..., cache=folder)`.

    Args:
        recipe: The recipe; its backbone must stay as it is, so no LoRA.
        folder: See `cache_layer_states`.
        dtype: See there.
    """
    config = adapter_config(recipe)
    splits = load_splits(recipe.data, recipe.task, recipe.seed)
    model, tokenizer = load_attached(recipe, config, splits.labels)
    length = recipe.data.max_length
    rows = [
        row
        for examples in (splits.train, splits.dev, splits.test)
        for row in encode(examples, tokenizer, splits.labels, recipe.task, length).rows
    ]
    check_lengths(model, rows)
    if recipe.backbone.bits is None:  # a quantised model is where it was loaded
        model.to(PartialState().device)
    collator = DataCollatorWithPadding(tokenizer)
    return cache_layer_states(model, rows, folder, collator, dtype=dtype, tokenizer=tokenizer, max_length=length)


def adapter_config(recipe: Recipe) -> FusionConfig:
    """The adapter that a recipe describes."""
    fields = copy.deepcopy(recipe.adapter)  # peft adds to the config's lists when it attaches
    return FusionConfig(task_type=PEFT_TASKS.get(recipe.task), **fields)  # type: ignore[arg-type]


def load_attached(recipe: Recipe, config: FusionConfig, labels: list[str]) -> tuple[Any, PreTrainedTokenizerBase]:
    """Seeds, loads backbone and tokenizer, and attaches the adapter with a fresh head."""
    set_seed(recipe.seed)
    if not torch.cuda.is_available():
        # sharp softmaxes over depth make denormal numbers, on which a CPU is several times slower
        torch.set_flush_denormal(True)
    tokenizer = load_tokenizer(recipe.backbone, recipe.task)
    backbone = load_model(recipe.backbone, recipe.task, labels, config.modules_to_save or ())
    return attach(backbone, config, tokenizer), tokenizer


def attach(model: nn.Module, config: FusionConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Attaches the adapter, and tells the model which padding token the tokenizer uses."""
    match_padding(model, tokenizer)
    return get_peft_model(model, config)  # type: ignore[arg-type]


def train(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    splits: Splits,
    folder: Path,
    cache: LayerStateCache | None = None,
) -> dict[str, Any]:
    """Trains an attached model on the splits, keeps the best epoch by the development score, and measures.

    Args:
        model: The attached model.
        tokenizer: Its tokenizer.
        recipe: Training arguments, task and seed.
        splits: The data.
        folder: Where checkpoints go while training; they are removed at the end.
        cache: Layer states to train and score from, instead of running the backbone.

    Returns:
        Scores, counts, times, memory and versions, as in `metrics.json`.
    """
    sets = {
        name: Evaluation(
            recipe.task,
            splits.labels,
            examples,
            encode(examples, tokenizer, splits.labels, recipe.task, recipe.data.max_length),
            cache,
            positions_for(model, recipe.task, training=name == "train"),
        )
        for name, examples in (("train", splits.train), ("dev", splits.dev), ("test", splits.test))
        if examples
    }
    check_lengths(model, [row for part in sets.values() for row in part.encoded.rows])
    trainer = make_trainer(model, tokenizer, recipe, sets["train"], sets["dev"], folder / "checkpoints")
    begun = time.perf_counter()
    trainer.train()
    trained = time.perf_counter()
    _check_finite(model, trainer.args.learning_rate)
    trainer.compute_metrics = None  # it scores the development set
    scores = {}
    for name in ("dev", "test"):
        if name in sets:
            result = trainer.predict(sets[name].dataset)  # type: ignore[arg-type]
            scores[name] = sets[name].scores(result.predictions, result.label_ids)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    name = MAIN_SCORE[recipe.task]
    history = [
        {"epoch": round(entry["epoch"], 2), "loss": entry["eval_loss"], name: entry[f"eval_{name}"]}
        for entry in trainer.state.log_history
        if f"eval_{name}" in entry
    ]
    return {
        "scores": scores,
        "dev_by_epoch": history,
        "parameters": count_trainable(model),
        "examples": {name: len(s.examples) for name, s in sets.items()},
        "notes": {name: s.encoded.notes for name, s in sets.items()},
        "seconds": {"train": round(trained - begun, 2)},
        "peak_memory_mib": peak_of_process(),
        "device": str(trainer.args.device),
        "seed": recipe.seed,
        "versions": versions(),
    }


def _check_finite(model: nn.Module, rate: float) -> None:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    broken = [n for n, p in trained.items() if not bool(p.detach().isfinite().all())]
    if broken:
        raise ValueError(
            f"The training diverged: {len(broken)} of {len(trained)} trained tensors hold values that are not finite. Lower "
            f"training.learning_rate ({rate:g}), or give more training.warmup_steps."
        )


def positions_for(model: nn.Module, task: Task, training: bool) -> str:
    """Which positions a cached dataset needs: without a label they do not count, unless positions are mixed."""
    if task == "sequence_classification" or any(layer.mixes_positions for layer in fusion_layers(model)):
        return "all"
    return "packed" if training else "labelled"


def make_trainer(
    model: Any, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, train_set: Evaluation, dev_set: Evaluation, folder: Path
) -> Trainer:
    """A Trainer with our defaults, the recipe's arguments, and the task's collator and score.

    Raises:
        ValueError: If a training argument has a value that transformers refuses.
    """
    machine = {
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # transformers wants to be told before it takes bf16 there
    }
    chosen = {**TRAINING_DEFAULTS, **machine, **recipe.training}
    try:
        arguments = TrainingArguments(
            output_dir=str(folder),
            seed=recipe.seed,
            metric_for_best_model=MAIN_SCORE[recipe.task],
            greater_is_better=True,
            label_names=["labels"],
            **chosen,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"The recipe's section 'training' does not fit: {' '.join(str(error).split())}") from error
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # DataParallel would copy the backbone without the fusion
    sequences = recipe.task == "sequence_classification"
    collator: Any = DataCollatorWithPadding(tokenizer) if sequences else DataCollatorForTokenClassification(tokenizer)
    if train_set.cache is not None:
        collator = train_set.cache.collator(collator)
    masked = recipe.task == "masked_lm"
    return (MaskedLMTrainer if masked else OrderedTrainer)(
        model=model,
        args=arguments,
        train_dataset=train_set.dataset,
        eval_dataset=dev_set.dataset,
        data_collator=collator,
        compute_metrics=lambda result: dev_set.watched_scores(result.predictions, result.label_ids),
        # label numbers instead of logits: the scores need no more, and a large set of labels would fill the memory
        preprocess_logits_for_metrics=None if masked else lambda logits, labels: logits.argmax(-1),
    )


def reload_difference(
    model: Any, folder: Path, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], task: Task, length: int
) -> float:
    """Loads a saved adapter beside the one in the model and compares their answers to texts cut at `length` pieces.

    Returns:
        The largest difference of a logit over the first examples; 0 if everything came back.
    """
    texts = [example.words for example in examples[:8]]
    words = task == "token_classification"
    batch = tokenizer(
        texts if words else [t[0] for t in texts],
        is_split_into_words=words,
        truncation=True,
        max_length=length,
        padding=True,
        return_tensors="pt",
    )
    batch = batch.to(model.device)
    active = model.active_adapter
    model.eval()
    with torch.no_grad():
        before = model(**batch).logits
        model.load_adapter(str(folder), "reloaded")
        model.set_adapter("reloaded")
        after = model(**batch).logits
    model.set_adapter(active)
    model.delete_adapter("reloaded")
    return float((after - before).abs().max())
