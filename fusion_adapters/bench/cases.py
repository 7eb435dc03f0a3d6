"""What is measured: models with an adapter, their data, and one round of work for each case."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DataCollatorForTokenClassification, PrinterCallback, TrainerCallback, set_seed

from ..fusions import Fusion
from ..runs.loading import load_model
from ..runs.tokenizers import load_tokenizer
from ..states import LayerStateCache, cache_layer_states
from ..states.key import backbone_of
from ..tasks.registry import TASKS
from ..tasks.splits import load_splits
from ..tuner import fusion_layers
from ..tuner.config import FusionConfig
from .recipe import BenchRecipe

TASK = TASKS["token_classification"]
SHARE = 0.2  # of the paper's budget, for the small fusion
DWATT = {"fusion": "dwatt", "fusion_budget": "dwatt-paper"}
# name -> fields of FusionConfig; None for what is not a fusion
EPOCHS: dict[str, dict[str, Any] | None] = {
    "LoRA": None,
    "LoRA + DWAtt": DWATT,
    "last, live": {"fusion": "last"},
    "DWAtt, live": DWATT,
    "last, cached": {"fusion": "last"},
    "DWAtt, cached": DWATT,
    "DWAtt 20 %, cached": {"fusion": "dwatt"},
    "DWAtt 20 %, cached, compiled": {"fusion": "dwatt"},
    "dwconcat, cached": {"fusion": "dwconcat", "fusion_budget": "dwatt-paper"},
    "dwconcat 20 %, cached": {"fusion": "dwconcat"},
    "DWAtt, loop in memory": DWATT,
    "DWAtt 20 %, loop in memory": {"fusion": "dwatt"},
}
FORWARDS = ("bare model", "last attached", "DWAtt attached")
EXTRACTIONS = ("bare forward", "extraction")


def epoch_cases() -> list[str]:
    """The cases of an epoch that this machine can run: torch.compile wants a C++ compiler and Python's headers."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except Exception:
        return [case for case in EPOCHS if "compiled" not in case]
    return list(EPOCHS)


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
        splits = load_splits(recipe.data, TASK, seed=0)
        self.labels = splits.labels
        self.tokenizer = load_tokenizer(recipe.backbone, TASK)
        examples = splits.train[: recipe.examples]
        self.examples = len(examples)
        self.rows = TASK.encode(examples, self.tokenizer, self.labels, recipe.data.max_length).rows
        self.tokens = sum(len(row["input_ids"]) for row in self.rows)
        self.collator = DataCollatorForTokenClassification(self.tokenizer)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def bare(self) -> nn.Module:
        """The backbone with a fresh head."""
        set_seed(0)
        if not torch.cuda.is_available():
            torch.set_flush_denormal(True)
        return load_model(self.recipe.backbone, TASK, self.labels).to(self.device)

    def attached(self, case: str) -> Any:
        """The backbone with the adapter of a case."""
        fields = EPOCHS[case]
        if case == "LoRA":
            return get_peft_model(self.bare(), LoraConfig(task_type="TOKEN_CLS", **self.recipe.lora))  # type: ignore[arg-type]
        assert fields is not None
        lora = self.recipe.lora if case.startswith("LoRA") else {}
        more = {"fusion_budget": self.small_budget()} if "20 %" in case else {}
        config = FusionConfig(task_type="TOKEN_CLS", **{**fields, **more, **lora})  # type: ignore[arg-type]
        model = get_peft_model(self.bare(), config)  # type: ignore[arg-type]
        if "compiled" in case:
            for module in model.modules():
                if isinstance(module, Fusion):
                    module.compile(dynamic=True)
        return model

    def small_budget(self) -> int:
        """A fifth of what the paper's DWAtt trains on this backbone."""
        from ..tuner.budget import resolve_budget

        config = FusionConfig(fusion_budget="dwatt-paper")
        return int(SHARE * (resolve_budget(config, load_model(self.recipe.backbone, TASK, self.labels)) or 0))

    def cache(self, model: nn.Module, folder: Path | None = None) -> LayerStateCache:
        """The layer states of the rows, for a model."""
        target = folder or self.folder / "states"
        layers = range(1, backbone_of(model)[0].num_layers + 1)
        cache_layer_states(
            model, self.rows, target, self.collator, layers=layers, batch_size=self.recipe.batch_size, progress=False
        )
        return LayerStateCache(target, model, verify=False)


def epoch_round(setting: Setting, case: str) -> Callable[[], float]:
    """A function that trains for one epoch and returns its seconds."""
    model = setting.attached(case)
    if "loop" in case:
        return _loop(setting, model)
    from transformers import Trainer, TrainingArguments

    dataset: Any = setting.rows
    collator: Any = setting.collator
    if "cached" in case:
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


def forward_round(setting: Setting, case: str) -> Callable[[], float]:
    """A function that answers all rows without a graph and returns the seconds."""
    named = {"last attached": "last, live", "DWAtt attached": "DWAtt, live"}
    model = setting.attached(named[case]) if case in named else setting.bare()
    batches = _batches(setting)
    model.eval()

    def run() -> float:
        begun = time.perf_counter()
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    return run


def extraction_round(setting: Setting, case: str) -> Callable[[], float]:
    """A function that extracts the layer states of all rows, or runs the same batches through the bare backbone."""
    model = setting.bare()
    if case == "bare forward":
        base: Any = model.base_model
        batches = _batches(setting)

        def forward() -> float:
            base.eval()
            begun = time.perf_counter()
            with torch.no_grad():
                for batch in batches:
                    base(**{k: v for k, v in batch.items() if k != "labels"})
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter() - begun

        return forward

    def extract() -> float:
        with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
            begun = time.perf_counter()
            setting.cache(model, Path(folder) / "states")
            return time.perf_counter() - begun

    return extract


def _batches(setting: Setting) -> list[dict[str, Any]]:
    """All rows in batches of like length, as an extraction takes them."""
    rows = sorted(setting.rows, key=lambda row: -len(row["input_ids"]))
    size = setting.recipe.batch_size
    batches = [setting.collator(rows[start : start + size]) for start in range(0, len(rows), size)]
    return [{k: v.to(setting.device) for k, v in batch.items()} for batch in batches]


ROUNDS: dict[str, Callable[[Setting, str], Callable[[], float]]] = {
    **dict.fromkeys(EPOCHS, epoch_round),
    **dict.fromkeys(FORWARDS, forward_round),
    **dict.fromkeys(EXTRACTIONS, extraction_round),
}
