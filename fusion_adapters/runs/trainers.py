"""Transformers' Trainer as our tasks need it: evaluation in order, and the vocabulary's logits only where they count."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from ..tasks.base import IGNORED
from .evaluation import Evaluation
from .recipe import SECRETS, Recipe

TORCH_WRITERS = ("inline_container", "PytorchStreamWriter")  # in what torch.save says when a file cannot be written
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


def make_trainer(
    model: Any, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, train_set: Evaluation, dev_set: Evaluation, folder: Path
) -> Trainer:
    """A Trainer with our defaults, the recipe's arguments, and the task's collator and score.

    Raises:
        ValueError: If a training argument has a value that transformers refuses.
    """
    task = recipe.task
    machine = {
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # transformers wants to be told before it takes bf16 there
    }
    given = {key: value for key, value in recipe.training.items() if key not in SECRETS}  # a checkpoint holds the arguments
    chosen = {**TRAINING_DEFAULTS, **task.training_defaults, **machine, **given}
    try:
        arguments = TrainingArguments(
            output_dir=str(folder),
            seed=recipe.seed,
            metric_for_best_model=task.main.name,
            greater_is_better=task.main.higher_is_better,
            label_names=["labels"],
            **chosen,
        )
    except (TypeError, ValueError, AttributeError, KeyError) as error:  # whatever a wrong type meets first
        raise ValueError(f"The recipe's section 'training' does not fit: {' '.join(str(error).split())}") from error
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # DataParallel would copy the backbone without the fusion
    collator: Any = task.collator(tokenizer)
    if train_set.cache is not None:
        collator = train_set.cache.collator(collator)
    trainer = (LabelledTrainer if task.vocabulary_head else OrderedTrainer)(
        model=model,
        args=arguments,
        train_dataset=train_set.dataset,
        eval_dataset=dev_set.dataset,
        data_collator=collator,
        compute_metrics=lambda result: dev_set.watched_scores(result.predictions, result.label_ids),
        preprocess_logits_for_metrics=None if task.vocabulary_head else task.predicted,
    )
    if isinstance(trainer, LabelledTrainer):
        trainer.predicts_next = task.predicts_next
    return trainer


class OrderedTrainer(Trainer):
    """A Trainer that evaluates every row, in the order of the dataset, whatever the sampling of the training data.

    The loss of an optimizer step is the mean over its batches. Left to itself, Trainer leaves the division by their number
    to every model whose forward takes further arguments, and BERT's heads take them and do not divide.
    """

    divides_by_items = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = self.divides_by_items

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(str(self.args.output_dir))
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (RuntimeError, OSError, SafetensorError) as error:
            # torch's writer has no error of its own for a full disk
            if isinstance(error, RuntimeError) and not any(name in str(error) for name in TORCH_WRITERS):
                raise
            free = shutil.disk_usage(folder.parent).free / 2**20
            raise OSError(
                f"A checkpoint of the training could not be written to {str(folder)!r} ({' '.join(str(error).split())}); the disk has "
                f"{free:,.0f} MiB left, or a limit on files is reached. Free some space, give another --output, or keep no checkpoints "
                "(training.save_strategy: no, training.load_best_model_at_end: false)."
            ) from error

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler:
        return SequentialSampler(eval_dataset)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        drops = self.args.dataloader_drop_last  # in training; a score is of all rows
        self.args.dataloader_drop_last = drops and kwargs.get("is_training", False)
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drops


class LabelledTrainer(OrderedTrainer):
    """A Trainer for heads that predict pieces of a vocabulary.

    The head, a product with the whole vocabulary, runs at labelled positions alone, also where a fusion that mixes
    positions, LoRA or a live backbone needs all of them. An evaluation keeps two numbers a position, not the logits.

    Attributes:
        predicts_next: Whether a label is predicted at the position before it, see `Task.predicts_next`.
    """

    divides_by_items = True
    predicts_next = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean negative log-likelihood of the labelled pieces.

        Args:
            model: The model, maybe wrapped by accelerate.
            inputs: A batch with `labels`, `(B, T)`; those that nothing predicts count as -100.
            return_outputs: Also return the predictions.
            num_items_in_batch: Labelled pieces of all batches of this optimizer step.

        Returns:
            The loss; with `return_outputs` also `predicted` (the likeliest piece) and `nll`, both `(B, T)` and -100
            where there is no label.
        """
        labels = _predictable(inputs["labels"], self.predicts_next)
        logits = labelled_logits(model, inputs, self.accelerator.unwrap_model(model), self.predicts_next)
        nll = F.cross_entropy(logits.float(), labels[labels != IGNORED], reduction="none")
        if num_items_in_batch is None:
            loss = nll.mean()
        else:
            loss = nll.sum() / num_items_in_batch
            if self.args.average_tokens_across_devices:  # as Trainer: the processes' gradients are averaged
                loss = loss * self.accelerator.num_processes
        if not return_outputs:
            return loss
        predicted = torch.full_like(labels, IGNORED)
        predicted[labels != IGNORED] = logits.argmax(-1)
        nlls = torch.full(labels.shape, float(IGNORED), device=labels.device)
        nlls[labels != IGNORED] = nll.detach()
        return loss, {"predicted": predicted, "nll": nlls}


def labelled_logits(
    model: nn.Module, inputs: dict[str, Any], unwrapped: nn.Module | None = None, predicts_next: bool = False
) -> Tensor:
    """The logits that predict the labelled pieces, in the order of the flattened batch.

    Args:
        model: An attached language model.
        inputs: A batch with `labels`, `(B, T)`, and `layer_states` if it comes from a cache.
        unwrapped: The model below a wrapper for several processes.
        predicts_next: Whether they are those of the positions before the labels, not of the labels' own.

    Returns:
        `(labelled positions, V)`.
    """
    inputs = dict(inputs)
    labelled = _predictable(inputs.pop("labels"), predicts_next) != IGNORED
    if predicts_next:
        labelled = labelled.roll(-1, 1)  # the first of a row is none
    with _only_at(model if unwrapped is None else unwrapped, labelled) as cut:
        logits = model(**inputs).logits
    return logits[0] if cut else logits[labelled]


def _predictable(labels: Tensor, predicts_next: bool) -> Tensor:
    """Labels `(B, T)` without those that nothing predicts: the first of each row, where the position before would."""
    return F.pad(labels[:, 1:], (1, 0), value=IGNORED) if predicts_next else labels


@contextlib.contextmanager
def _only_at(model: nn.Module, labelled: Tensor) -> Iterator[bool]:
    """Lets the head see only some positions, as one row, `(1, positions, d)`; yields whether that was possible."""
    whole: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    below = getattr(whole, "base_model", whole)
    if below is whole:  # no head of its own beside the backbone: nothing to hook between them
        yield False
        return

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0][labelled][None], *output[1:])
        output["last_hidden_state"] = output.last_hidden_state[labelled][None]
        return output

    handle = below.register_forward_hook(cut)
    try:
        yield True
    finally:
        handle.remove()
