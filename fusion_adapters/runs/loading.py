"""Models as a recipe names them: the frozen backbone with a fresh task head."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GgufConfig

from ..backbone.blocks import find_backbones
from ..backbone.decoders import mark_gguf, settle_gguf
from ..backbone.families import positions_of, text_config
from ..backbone.quantization import quantization_config
from ..backbone.truncate import CutClass, UncuttableError
from ..tasks.base import Task
from ..tasks.data import DataRecipe
from ..tuner import TASK_HEADS, FusionConfig
from .checkpoints import class_of
from .pretrained import load_pretrained, locate, path_of_gguf
from .recipe import BackboneRecipe


def load_model(
    recipe: BackboneRecipe,
    task: Task,
    labels: Sequence[str],
    trained: Sequence[str] = (),
    depth: int | float | None = None,
    fresh_head: bool = True,
) -> nn.Module:
    """Loads the backbone with a fresh task head, quantised if the recipe says so.

    The head of a language model is its own, tied to the embeddings; where the checkpoint lacks parts of it, they
    must be in `trained`, the bias of the output excepted: it starts at zero, which is none, and stays there.

    Args:
        recipe: Model, dtype and quantisation.
        task: Which head.
        labels: The label set, in the order of the outputs.
        trained: Names of further modules that will be trained (`modules_to_save`).
        depth: The adapter's `fusion_depth`: blocks above it are not loaded, if the model can be cut.
        fresh_head: Whether the checkpoint may lack the task head; where nothing is trained it may not.

    Raises:
        OSError: If the model is neither a folder nor to be had from a hub.
        ImportError: If quantisation is asked for without bitsandbytes.
        ValueError: If the checkpoint lacks weights of the backbone, which would stay at random values, or the model has no
            head for the task, or `trained` covers embeddings that the head shares, or the task predicts the next piece and the
            backbone sees it.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, recipe.dtype)}
    if recipe.bits is not None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ImportError(
                f"backbone.bits={recipe.bits} needs bitsandbytes, which is not installed. Install fusion-adapters "
                "with its extra [quantised]."
            )
        options["quantization_config"] = quantization_config(recipe.bits)
        options["device_map"] = {"": 0 if torch.cuda.is_available() else "cpu"}
    if (gguf := locate(recipe)[1].get("gguf_file")) is not None:
        if recipe.bits is not None:
            raise ValueError(
                f"backbone.bits={recipe.bits} and a GGUF file ({gguf!r}): bitsandbytes cannot quantise what was quantised already. Leave "
                "bits out (the file's weights are unpacked), or give a checkpoint that is not a GGUF file."
            )
        options["quantization_config"] = GgufConfig(dequantize=True)
    try:
        auto_model = class_of(recipe, task.auto_model)
        model, info = load_pretrained(
            auto_model if depth is None else CutClass(auto_model, depth),
            recipe,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a head for other labels gives way to a fresh one; anything else is refused below
            **options,
            **task.head_options(labels),
        )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f"The model {recipe.model!r} has no head for {task.title} in transformers ({task.auto_model.__name__}). Choose a model that "
            f"has one (BERT, RoBERTa and MiniLM do), or another task than {task.name}."
        ) from error
    if gguf is not None:
        settle_gguf(model)
        mark_gguf(model, path_of_gguf(recipe))
    if task.predicts_next:
        _check_causal(model, recipe)
    if task.vocabulary_head:
        _check_tied_head(model, trained)
    fresh = (*(TASK_HEADS.get(task.peft_type or "", ()) if fresh_head else ()), *trained)
    absent = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    random = sorted(
        key for key in absent if not any(f".{name}." in f".{key}." for name in fresh) and not _zero_output_bias(model, key)
    )
    if random:
        modules = sorted({key.rpartition(".")[0].rpartition(".")[0] or key.partition(".")[0] for key in random})
        named = ", ".join(random[:6]) + (", ..." if len(random) > 6 else "")
        remedy = (
            f"Train them with the adapter (adapter.modules_to_save, for example {modules}), or use another checkpoint."
            if fresh_head
            else "Use a checkpoint that has them, or a run of fusion-adapters train that trained them (run: FOLDER)."
        )
        raise ValueError(
            f"The checkpoint {recipe.model!r} lacks {len(random)} tensors that {type(model).__name__} needs, or has them in other "
            f"shapes ({named}); frozen, they would stay at random values. {remedy}"
        )
    return model


def load_lower(
    recipe: BackboneRecipe, task: Task, labels: Sequence[str], trained: Sequence[str], depth: int | float | None
) -> tuple[nn.Module, int | None]:
    """Loads what an adapter with that `fusion_depth` needs of a model, see `load_model`.

    Returns:
        The model, and the number of its blocks if it was cut; None if it was loaded whole, where such an adapter skips blocks.
    """
    if depth is None:
        return load_model(recipe, task, labels, trained), None
    try:
        model = load_model(recipe, task, labels, trained, depth)
    except UncuttableError:
        return load_model(recipe, task, labels, trained), None
    return model, text_config(model).num_hidden_layers


def _zero_output_bias(model: nn.Module, key: str) -> bool:
    """Whether a tensor is the bias over the vocabulary, at zero: the same as a head without one."""
    output = model.get_output_embeddings()  # type: ignore[operator]
    bias: torch.Tensor | None = getattr(output, "bias", None)
    return bias is not None and not bool(bias.any()) and model.state_dict(keep_vars=True).get(key) is bias


def _check_causal(model: nn.Module, recipe: BackboneRecipe) -> None:
    """Refuses to predict the next piece with a backbone that has read it."""
    try:
        backbone = find_backbones(model, None, None)[0]
    except ValueError:  # its blocks are those that the adapter's config names, and found when it is attached
        return
    if not backbone.causal:
        raise ValueError(
            f"The backbone {recipe.model!r} ({type(model).__name__}) is not causal: each position has read the pieces after it, and would "
            "know what it is to predict. Use a causal language model (Llama, Qwen, SmolLM2, ...), or task: masked_lm."
        )


def _check_tied_head(model: nn.Module, trained: Sequence[str]) -> None:
    """Refuses to train embeddings that the head shares: peft's copy would untie them, and be saved with the adapter."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if outputs is None or outputs.weight is not inputs.weight:
        return
    names = {n for n, module in model.named_modules() if module is inputs or module is outputs}
    for key in trained:
        # as peft finds what it saves: by the ends of names, here of the matrix and of all that contains it
        above = {".".join(n.split(".")[:i]) for n in names for i in range(1, n.count(".") + 2)}
        if any(n.endswith(key) for n in above):
            raise ValueError(
                f"adapter.modules_to_save has {key!r}, which covers the {outputs.weight.numel():,} embeddings that "
                f"{type(model).__name__} shares between input and head: trained, they would come apart, and be saved with the "
                "adapter. Name the fresh parts of the head alone, for BERT modules_to_save: [transform]."
            )


def settle_label_at(data: DataRecipe, task: Task, model: nn.Module, config: FusionConfig) -> None:
    """Puts the piece that has a word's label in the place of `data.label_at: auto`: the last for causal backbones, else the first.

    Args:
        data: A recipe's section `data`, which is changed.
        task: Its task; for those that are not of words there is nothing to settle.
        model: The backbone with its head, with or without weights.
        config: Where the blocks are.
    """
    if task.of_words and data.label_at == "auto":
        backbone = find_backbones(model, config.fusion_blocks, config.fusion_stack)[0]
        data.label_at = "last" if backbone.causal else "first"


def check_lengths(model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> None:
    """Checks that a backbone with an embedding for each position has one for every position of the rows.

    Raises:
        ValueError: If a row is longer; the message gives both numbers.
    """
    longest, positions = max((len(row["input_ids"]) for row in rows), default=0), fewest_positions(model)
    if positions is not None and longest > positions:
        raise ValueError(
            f"The longest of {len(rows)} rows has {longest} pieces, but the backbone has {positions} positions. Set "
            f"data.max_length to {positions} or less."
        )


def fewest_positions(model: nn.Module) -> int | None:
    """For how many positions a backbone has an embedding; None if it has none for single positions."""
    found = (positions_of(name, table) for name, table in model.named_modules())
    return min((positions for positions in found if positions is not None), default=None)
