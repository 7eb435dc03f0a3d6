"""A finished run, reloaded from its folder: predictions for new text, and the weights over depth behind them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..tasks.data import DataRecipe
from ..tuner import depth_weights, fusion_layers
from .attaching import ADAPTER
from .loading import check_lengths, fewest_positions, load_lower
from .recipe import Recipe, parse_recipe
from .tokenizers import load_tokenizer, match_padding, pieces_as_text


@dataclass
class TrainedRun:
    """A reloaded run: the attached model in evaluation mode, its tokenizer, recipe and labels."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    labels: list[str]

    @property
    def data(self) -> DataRecipe:
        """The recipe's section `data`."""
        return self.recipe.data

    def logits(self, rows: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """The logits of each row, float32 on the CPU, `(T, K)` or `(K,)`.

        Raises:
            ValueError: If a row is longer than the backbone has positions.
        """
        check_lengths(self.model, rows)
        found = []
        # one text at a time: with an 8-bit backbone an answer can depend on what else is in the batch
        for row in rows:
            batch = {k: torch.tensor([v], device=self.model.device) for k, v in row.items() if k != "labels"}
            with torch.no_grad():
                found.append(self.model(**batch).logits[0].float().cpu())
        return found

    def continued(self, pieces: Sequence[int], most: int, ends: Sequence[int]) -> list[int]:
        """The likeliest continuation of a row, piece by piece, see `FinishedRun`; the model's own ends count too.

        Raises:
            ValueError: If the backbone has fewer positions than the row and `most` pieces more.
        """
        positions = fewest_positions(self.model)
        if positions is not None and len(pieces) + most > positions:
            raise ValueError(
                f"The text has {len(pieces)} pieces, and up to {most} more are to be written (data.max_new_tokens of the run's recipe), "
                f"but the backbone has {positions} positions. Give a shorter text."
            )
        own = self.model.generation_config.eos_token_id
        own = [] if own is None else own if isinstance(own, list) else [own]
        # a fusion over positions has no cache of its own
        cached = not any(layer.mixes_positions for layer in fusion_layers(self.model))
        greedy = GenerationConfig(
            max_new_tokens=most,
            do_sample=False,
            num_beams=1,
            eos_token_id=list(dict.fromkeys([*ends, *own])),
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=cached,
        )
        row = torch.tensor([list(pieces)], device=self.model.device)
        with torch.no_grad():
            written = self.model.generate(input_ids=row, attention_mask=torch.ones_like(row), generation_config=greedy)
        return written[0, len(pieces) :].tolist()


def load_run(folder: str | Path) -> TrainedRun:
    """Reloads a run that `fusion-adapters train` wrote.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If the adapter does not fit the backbone, or its file is damaged.
    """
    recipe, labels = read_run(folder)
    trained, depth = recipe.adapter.get("modules_to_save") or (), recipe.adapter.get("fusion_depth")
    model, _ = load_lower(recipe.backbone, recipe.task, labels, trained, depth)
    return attach_run(model, load_tokenizer(recipe.backbone, recipe.task), folder, recipe, labels)


def read_run(folder: str | Path) -> tuple[Recipe, list[str]]:
    """The recipe and the labels of a run, without its model.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If its description is damaged.
    """
    folder = Path(folder)
    description = folder / "run.json"
    if not description.is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} holds no run: there is no run.json in it. Give the folder that was --output of fusion-adapters train."
        )
    try:
        content = json.loads(description.read_text(encoding="utf-8"))
        values, labels = content["recipe"], content["labels"]
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise TypeError("'labels' is no list of names")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{description} is damaged ({reason}). Train again, or restore the file.") from error
    return parse_recipe(values, str(description), finished=True), labels


def attach_run(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    recipe: Recipe,
    labels: list[str],
    name: str = ADAPTER,
) -> TrainedRun:
    """Loads a run's adapter, under a name, onto a model that has its head.

    Raises:
        ValueError: If the adapter does not fit the backbone, or its file is damaged.
    """
    match_padding(model, tokenizer)
    model = PeftModel.from_pretrained(model, Path(folder) / "adapter", adapter_name=name)
    return TrainedRun(model.eval(), tokenizer, recipe, labels)


def predict(run: TrainedRun, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Predicts what the run's task asks of each text, see `Task.predict`.

    Args:
        run: The reloaded run.
        texts: Plain texts; for tasks of two texts with a tab between them.

    Returns:
        For each text a dictionary that begins with `text`; what follows is the task's: `entities`, `label` and
        `probability`, `filled` and `masks`, `value`, or `completion` and `ended`.

    Raises:
        ValueError: If a text does not fit the task, or is longer than the backbone has positions.
    """
    for text in texts:
        check_text(text)
    return run.recipe.task.predict(run, texts)


def check_text(text: str) -> None:
    """Raises ValueError for a text that is none: bytes in another encoding, as Python takes them from a command line."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The text {text[:80]!a} is not UTF-8 (character {error.start}). Give it in UTF-8; of a file in another encoding, "
            "iconv -f latin1 -t utf-8 FILE makes one."
        ) from None


def depth_map(run: TrainedRun, text: str) -> tuple[list[str], list[int], Tensor]:
    """The weights over depth for the word pieces of a text.

    Returns:
        The pieces as text, the layers, and the weights, `(pieces, layers)` or `(pieces, heads, layers)`.

    Raises:
        ValueError: If the run's fusion has no weights over depth, or the text is empty.
    """
    check_text(text)
    if not text.strip():
        raise ValueError("The text is empty. Give at least one word.")
    parts = run.recipe.task.parts(text, run.data)
    batch = run.tokenizer(*parts, truncation=True, max_length=run.data.max_length, return_tensors="pt").to(run.model.device)
    check_lengths(run.model, [{"input_ids": row} for row in batch["input_ids"]])
    weights = depth_weights(run.model, **batch)[0]
    layers = [layer.active_fusion.layers for layer in fusion_layers(run.model) if layer.active_fusion is not None][-1]
    pieces = [str(piece) for piece in run.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())]
    return pieces_as_text(run.tokenizer, pieces), list(layers), weights.cpu()
