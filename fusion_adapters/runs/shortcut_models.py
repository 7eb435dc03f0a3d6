"""What a recipe of shortcuts stands on: a model with its head, as it is, and rows of text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from transformers import AutoConfig, DataCollatorWithPadding, PreTrainedTokenizerBase

from ..tasks.base import Encoded
from ..tasks.splits import load_splits
from .loading import check_lengths, load_model
from .predicting import load_run, read_run
from .pretrained import load_pretrained
from .recipe import BackboneRecipe
from .shortcut_recipe import ShortcutRecipe
from .tokenizers import load_tokenizer, match_padding

PLAIN = "last"  # the fusion that hands on the last state


@dataclass
class Subject:
    """A model whose layers are cast, and what it reads.

    Attributes:
        model: In evaluation mode, with its head; nothing in it trains.
        tokenizer: Its tokenizer.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase

    @property
    def collator(self) -> DataCollatorWithPadding:
        """Pads rows on the right."""
        return DataCollatorWithPadding(self.tokenizer)


def load_subject(recipe: ShortcutRecipe) -> Subject:
    """Loads the model of a recipe: a checkpoint with its own head, or what a run of `fusion-adapters train` made, its LoRA folded in.

    Raises:
        OSError: If there is no such model.
        FileNotFoundError: If there is no such run.
        ValueError: If the checkpoint has no trained head for the task, or the run is of another task, or its fusion reads more than the
            last layer, so that no state could stand for what its head gets.
    """
    if recipe.run is not None:
        return _of_run(recipe, recipe.run)
    backbone = backbone_recipe(recipe)
    labels: list[str] = []
    if not recipe.task.vocabulary_head:
        config: Any = load_pretrained(AutoConfig, backbone)
        labels = [str(config.id2label[i]) for i in sorted(config.id2label)]
    tokenizer = load_tokenizer(backbone, recipe.task)
    model = load_model(backbone, recipe.task, labels, fresh_head=False)
    if backbone.bits is None:  # a quantised model is where it was loaded
        model.to(PartialState().device)
    match_padding(model, tokenizer)
    model.requires_grad_(False)
    return Subject(model.eval(), tokenizer)


def backbone_recipe(recipe: ShortcutRecipe) -> BackboneRecipe:
    """Which model it is. Raises FileNotFoundError if the run that would tell is not there."""
    return recipe.backbone or read_run(recipe.run or "")[0].backbone


def rows_of(recipe: ShortcutRecipe, subject: Subject) -> dict[str, Encoded]:
    """The rows of `train`, `dev` and `test`; a split that the data do not have is left out.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is empty or not as its format asks, or a row is longer than the backbone has positions.
    """
    splits = load_splits(recipe.data, recipe.task, recipe.seed)
    found = splits.encoded(recipe.task, subject.tokenizer, recipe.data)
    for part in found.values():
        check_lengths(subject.model, part.rows)
    return found


def _of_run(recipe: ShortcutRecipe, folder: str) -> Subject:
    trained, _ = read_run(folder)
    if trained.task != recipe.task:
        raise ValueError(
            f"The recipe asks for task: {recipe.task.name}, and the run {folder!r} is of task: {trained.task.name}. Set the run's task, "
            "or name another run."
        )
    method, depth = trained.adapter.get("fusion", "dwatt"), trained.adapter.get("fusion_depth")
    if method != PLAIN or depth is not None:
        below = "" if depth is None else f", below block {depth}"
        raise ValueError(
            f"The run {folder!r} has fusion: {method}{below}, whose head reads other layers than the last, so a state that stands for the "
            f"last one does not decide. Train the head, with or without LoRA, by adapter.fusion: {PLAIN}, and name that run."
        )
    run = load_run(folder)
    pools, config = trained.adapter.get("fusion_pool") is not None, run.model.active_peft_config
    if pools and config.has_lora:
        raise ValueError(
            f"The run {folder!r} has LoRA beside fusion_pool: {trained.adapter['fusion_pool']}: LoRA is folded into the weights here, and "
            "the mean that the head reads is the adapter's. Train the head with one of the two, and name that run."
        )
    # LoRA is in the weights then, which the fingerprint covers; a mean stays with the model, between blocks and head
    model: Any = run.model.get_base_model() if pools else run.model.merge_and_unload()
    if trained.backbone.bits is None:
        model.to(PartialState().device)
    model.requires_grad_(False)
    return Subject(model.eval(), run.tokenizer)
