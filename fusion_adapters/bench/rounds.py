"""One round of work of each case: backbone and rows, models with an adapter, and what is done with them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    DataCollatorForTokenClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ..fusions import Fusion
from ..runs.loading import load_model, settle_label_at
from ..runs.tokenizers import load_tokenizer
from ..states import LayerStateCache, cache_layer_states, source_of
from ..tasks.registry import TASKS
from ..tasks.splits import load_splits
from ..tuner import fusion_layers
from ..tuner.budget import resolve_budget
from ..tuner.config import FusionConfig
from .cases import Case
from .recipe import BenchRecipe

TASK = TASKS["token_classification"]
PAPER = "dwatt-paper"


class EpochTimer(TrainerCallback):
    """Times the epochs of a Trainer, data loading included."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_epoch_begin(self, *arguments: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self._begun = time.perf_counter()

    def on_epoch_end(self, *arguments: Any, **kwargs: Any) -> None:
        """Stops the clock."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._begun


class Setting:
    """Backbone, rows and collator of a benchmark, loaded once a process."""

    def __init__(self, recipe: BenchRecipe, folder: Path) -> None:
        self.recipe = recipe
        self.folder = folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        splits = load_splits(recipe.data, TASK, seed=0)
        self.labels = splits.labels
        self.tokenizer = load_tokenizer(recipe.backbone, TASK)
        examples = splits.train[: recipe.examples]
        self.examples = len(examples)
        data = recipe.data.model_copy()
        settle_label_at(data, TASK, self.bare(), FusionConfig())
        self.rows = TASK.encode(examples, self.tokenizer, self.labels, data.max_length, data.label_at).rows
        self.tokens = sum(len(row["input_ids"]) for row in self.rows)
        self.collator = DataCollatorForTokenClassification(self.tokenizer)

    def bare(self) -> nn.Module:
        """The backbone with a fresh head."""
        set_seed(0)
        return load_model(self.recipe.backbone, TASK, self.labels).to(self.device)

    def attached(self, case: Case) -> Any:
        """The backbone with the adapter of a case, if it has one."""
        fields: dict[str, Any] = {"task_type": "TOKEN_CLS", **(self.recipe.lora if case.lora else {})}
        if case.share is not None:
            fields["fusion_budget"] = self.budget(case.share)
        if case.depth is not None:
            fields["fusion_depth"] = case.depth
        model: Any = self.bare()  # last, because it seeds
        if case.fusion is not None:
            model = get_peft_model(model, FusionConfig(fusion=case.fusion, **fields))
        elif case.lora:
            model = get_peft_model(model, LoraConfig(**fields))
        if case.compiled:
            for module in model.modules():
                if isinstance(module, Fusion):
                    module.compile(dynamic=True)
        return model

    def budget(self, share: float) -> int | str:
        """A share of what the paper's DWAtt trains on this backbone, as `fusion_budget` takes it."""
        if share == 1:
            return PAPER
        paper = resolve_budget(FusionConfig(fusion_budget=PAPER), load_model(self.recipe.backbone, TASK, self.labels))
        return int(share * (paper or 0))

    def cache(self, model: nn.Module, folder: Path | None = None) -> LayerStateCache:
        """The layer states of the rows, for a model."""
        target = folder or self.folder / "states"
        layers = range(1, source_of(model).backbone.num_layers + 1)
        cache_layer_states(
            model, self.rows, target, self.collator, layers=layers, batch_size=self.recipe.batch_size, progress=False
        )
        return LayerStateCache(target, model, verify=False)


def begin(setting: Setting, case: Case) -> Callable[[], float]:
    """Makes ready for a case; the function that comes back does one round of its work and returns the seconds."""
    return {"epoch": _epochs, "forward": _forwards, "extraction": _extractions}[case.work](setting, case)


def _epochs(setting: Setting, case: Case) -> Callable[[], float]:
    model = setting.attached(case)
    if case.source == "loop":
        return _loop(setting, model)
    dataset: Any = setting.rows
    collator: Any = setting.collator
    if case.source == "cached":
        cache = setting.cache(model)
        dataset, collator = cache.dataset(setting.rows, positions="packed"), cache.collator(collator)

    def run() -> float:
        with tempfile.TemporaryDirectory() as folder:
            timer = EpochTimer()
            arguments = TrainingArguments(
                folder,
                num_train_epochs=1,
                per_device_train_batch_size=setting.recipe.batch_size,
                learning_rate=1e-4,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                label_names=["labels"],
                dataloader_pin_memory=torch.cuda.is_available(),
            )
            trainer = Trainer(model, arguments, collator, dataset, callbacks=[timer])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            return timer.seconds

    return run


def _loop(setting: Setting, model: Any) -> Callable[[], float]:
    """An epoch as a bare loop: tensors in memory, fusion and head called by hand, the same optimizer."""
    cache = setting.cache(model)
    dataset, collator = cache.dataset(setting.rows, positions="labelled"), cache.collator(setting.collator)
    size = setting.recipe.batch_size
    batches = []
    for start in range(0, len(dataset), size):
        batch = collator([dataset[i] for i in range(start, min(start + size, len(dataset)))])
        labels = batch["labels"].flatten()[batch["layer_states"]["positions"]]
        states = batch["layer_states"]["states"].to(setting.device, torch.float32).unsqueeze(1)
        batches.append((states, labels.to(setting.device)))
    model.train()
    fusion: Any = fusion_layers(model)[0].active_fusion
    base = model.base_model.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def run() -> float:
        begun = time.perf_counter()
        for states, labels in batches:
            fused = fusion(list(states.unbind(0)), states[-1])
            loss = nn.functional.cross_entropy(base.classifier(base.dropout(fused))[0], labels)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    return run


def _forwards(setting: Setting, case: Case) -> Callable[[], float]:
    model = setting.attached(case)
    model.eval()
    batches = _batches(setting)
    called = model if case.head else model.base_model
    if not case.head:
        batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]

    def run() -> float:
        begun = time.perf_counter()
        with torch.no_grad():
            for batch in batches:
                called(**batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    return run


def _extractions(setting: Setting, case: Case) -> Callable[[], float]:
    model = setting.attached(case)

    def run() -> float:
        with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
            begun = time.perf_counter()
            setting.cache(model, Path(folder) / "states")
            return time.perf_counter() - begun

    return run


def _batches(setting: Setting) -> list[dict[str, Any]]:
    """All rows in batches of like length, as an extraction takes them."""
    rows = sorted(setting.rows, key=lambda row: -len(row["input_ids"]))
    size = setting.recipe.batch_size
    batches = [setting.collator(rows[start : start + size]) for start in range(0, len(rows), size)]
    return [{k: v.to(setting.device) for k, v in batch.items()} for batch in batches]
