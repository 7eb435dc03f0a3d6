"""A recipe becomes a run: load, attach, train with transformers' Trainer, score, save."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from peft import get_peft_model
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, set_seed

from ..fusions import fusion_class, resolve_layers
from ..states import LayerStateCache, cache_layer_states, source_of
from ..tasks.splits import Splits, load_splits
from ..tuner import FusionConfig
from ..tuner.counts import count_trainable
from .card import model_card
from .environment import denormals_flushed, versions
from .evaluation import evaluations, reload_difference
from .files import check_output, json_text, written_aside
from .loading import check_lengths, load_lower, settle_label_at
from .memory import forget_peak, peak_of_process
from .recipe import Recipe, recipe_beside
from .tokenizers import load_tokenizer, match_padding
from .trainers import make_trainer


@denormals_flushed()
def run_recipe(
    recipe: Recipe, output: str | Path, overwrite: bool = False, cache: str | Path | None = None
) -> dict[str, Any]:
    """Trains what a recipe describes and writes the run to a folder.

    The folder holds `adapter/` (what peft saves), `metrics.json`, `run.json` (what `predict` needs: recipe, labels) and
    `recipe.yaml`. It appears when the run is complete. What stands in `recipe.beside` is trained and scored too, from the same layer
    states where nothing trains inside the backbone; its metrics are in `metrics.json`.

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
    forget_peak()
    started = time.perf_counter()
    for each in _all_of(recipe):
        adapter_config(each)  # a wrong one is told before anything is trained
    if recipe.beside and cache is None and _share_states(recipe):
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.states.", dir=output.parent) as states_of_all:
            cache_recipe(recipe, states_of_all)  # one pass through the backbone for all of them
            return run_recipe(recipe, output, overwrite, states_of_all)
    config = adapter_config(recipe)
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
        if recipe.beside:
            metrics["beside"] = {name: _beside(recipe, name, splits, folder, cache) for name in recipe.beside}
        metrics["bytes"] = {p.name: p.stat().st_size for p in sorted((folder / "adapter").iterdir())}
        metrics["seconds"]["total"] = round(time.perf_counter() - started, 2)
        run = {"recipe": recipe.model_dump(), "labels": splits.labels}
        (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(), sort_keys=False), encoding="utf-8")
        (folder / "metrics.json").write_text(json_text(metrics), encoding="utf-8")
    return metrics


def _share_states(recipe: Recipe) -> bool:
    """Whether a run and what stands beside it read the states of one backbone, in which nothing trains."""
    configs = [adapter_config(each) for each in _all_of(recipe)]
    return not any(c.has_lora for c in configs) and len({c.fusion_depth for c in configs}) == 1


def _all_of(recipe: Recipe) -> list[Recipe]:
    return [recipe, *(recipe_beside(recipe, name) for name in recipe.beside)]


def _beside(recipe: Recipe, name: str, splits: Splits, folder: Path, cache: str | Path | None) -> dict[str, Any]:
    """Trains and scores what stands beside a run; of it the metrics stay, or, where it fails, why: the run itself is done."""
    other = recipe_beside(recipe, name)
    try:
        model, tokenizer = load_attached(other, adapter_config(other), splits.labels)
        states = None
        if cache is not None:
            states = LayerStateCache(cache, model, tokenizer=tokenizer, max_length=other.data.max_length)
        return train(model, tokenizer, other, splits, folder, states)
    except (ValueError, RuntimeError) as error:
        return {"failed": " ".join(str(error).split())}


@denormals_flushed()
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
    rows = [row for part in splits.encoded(recipe.task, tokenizer, recipe.data).values() for row in part.rows]
    check_lengths(model, rows)
    if recipe.backbone.bits is None:  # a quantised model is where it was loaded
        model.to(PartialState().device)
    collator = DataCollatorWithPadding(tokenizer)
    beside = [adapter_config(other) for other in _all_of(recipe)[1:]]
    means = all(c.fusion_pool is not None and not fusion_class(c.fusion).mixes_positions for c in beside)
    layers = None
    if beside:  # those that any of them reads
        depth = source_of(model).backbone.num_layers
        layers = sorted({i for c in (config, *beside) for i in resolve_layers(c.fusion_layers, depth)})
    return cache_layer_states(
        model, rows, folder, collator, dtype=dtype, layers=layers, means=means, tokenizer=tokenizer, max_length=length
    )


def adapter_config(recipe: Recipe) -> FusionConfig:
    """The adapter that a recipe describes."""
    fields = copy.deepcopy(recipe.adapter)  # peft adds to the config's lists when it attaches
    try:
        return FusionConfig(task_type=recipe.task.peft_type, **fields)  # type: ignore[arg-type]
    except (TypeError, AttributeError, KeyError) as error:  # whatever a wrong type meets first
        raise ValueError(
            f"The recipe's section 'adapter' does not fit: {type(error).__name__}: {' '.join(str(error).split())}. Check the types of its "
            f"values ({', '.join(f'{key}: {value!r}' for key, value in recipe.adapter.items())})."
        ) from error


def load_attached(
    recipe: Recipe, config: FusionConfig, labels: list[str], cut: bool = True
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Seeds, loads backbone and tokenizer, and attaches the adapter with a fresh head.

    What the recipe leaves to the backbone (`data.label_at`) is settled in it.

    Args:
        recipe: The recipe.
        config: Its adapter; a fraction in `fusion_depth` becomes a number of blocks.
        labels: The label set.
        cut: Whether blocks above `fusion_depth` are left out of the model.
    """
    set_seed(recipe.seed)
    tokenizer = load_tokenizer(recipe.backbone, recipe.task)
    trained, depth = config.modules_to_save or (), config.fusion_depth if cut else None
    backbone, blocks = load_lower(recipe.backbone, recipe.task, labels, trained, depth)
    if blocks is not None:  # a fraction was one of all blocks
        config.fusion_depth = blocks
    match_padding(backbone, tokenizer)
    settle_label_at(recipe.data, recipe.task, backbone, config)
    return get_peft_model(backbone, config), tokenizer  # type: ignore[arg-type]


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
    task = recipe.task
    encoded = splits.encoded(task, tokenizer, recipe.data)
    sets = evaluations(model, task, splits, encoded, cache)
    check_lengths(model, [row for part in encoded.values() for row in part.rows])
    trainer = make_trainer(model, tokenizer, recipe, sets["train"], sets["dev"], folder / "checkpoints")
    begun = time.perf_counter()
    with warnings.catch_warnings():
        # peft looks beside a backbone whether its vocabulary has grown; beside a GGUF file there is no configuration to tell
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        trainer.train()
    trained = time.perf_counter()
    _check_finite(model, trainer.args.learning_rate)
    scores = {name: sets[name].predicted_scores(trainer) for name in ("dev", "test") if name in sets}
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    name = task.main.name
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
        "notes": {name: part.notes for name, part in encoded.items()},
        "seconds": {"train": round(trained - begun, 2)},
        "peak_memory_mib": peak_of_process(),
        "device": str(trainer.args.device),
        "seed": recipe.seed,
        "versions": versions(),
    }


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
