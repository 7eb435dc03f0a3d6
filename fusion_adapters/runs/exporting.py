"""A run as a program without its backbone: fusion and head for states that are computed elsewhere, with a note of which they are."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.families import input_embeddings, output_embeddings, reads_last_token, text_config
from ..tuner import FusionLayer
from ..tuner.card import class_of
from ..tuner.digest import weights_digests
from ..tuner.program import Program, export_program, exportable, largest_difference
from ..tuner.weights import tensors_in_file
from .contents import short_fingerprint
from .environment import versions
from .files import EXPORT, check_output, json_text, written_aside
from .loading import fewest_positions
from .predicting import load_run
from .program_card import program_card

PROGRAM, CARD = "program.pt2", "README.md"
# The batches, rows and positions: the first is traced, and on all of them the program is compared with the model.
SIZES = ((2, 6), (3, 17), (1, 9))


def export_run(folder: str | Path, output: str | Path, overwrite: bool = False) -> dict[str, Any]:
    """Writes fusion and head of a run as a program that takes layer states, see `export_model`.

    Args:
        folder: A folder that `fusion-adapters train` wrote.
        output: The folder to write; it appears when it is complete.
        overwrite: Whether it may take the place of an earlier export.

    Raises:
        FileExistsError: If the output folder holds something else.
        ValueError: If the run has no such program, see `export_model`, or its adapter does not fit the backbone.
    """
    check_output(output, overwrite, "export")
    run = load_run(folder)
    task = run.recipe.task
    told: dict[str, Any] = {"task": task.name, "title": task.title, "backbone": run.recipe.backbone.model}
    if task.of_words:
        told["tag_of_a_word_at"] = run.data.label_at
    told["texts"] = {"max_length": run.data.max_length, "padding_side": run.tokenizer.padding_side}
    return export_model(run.model, output, overwrite, told)


def export_model(
    model: nn.Module, output: str | Path, overwrite: bool = False, told: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Writes fusion and head of a model as one program of `torch.export`, with a note of which states it wants.

    `program.pt2` needs torch alone: `torch.export.load(...).module()(states=...)` returns the logits that the model gives. In it
    is all that comes after the layer states (fusion, final norm, pooler, head, the choice of a position), and neither blocks nor, unless
    the head predicts word pieces by them, embeddings. Before the folder appears, the file is loaded and compared with the model on random
    texts of several sizes.

    Args:
        model: A `PeftModel` with an active adapter; it is put into evaluation mode.
        output: The folder to write; it appears when it is complete.
        overwrite: Whether it may take the place of an earlier export.
        told: What the note says besides what the model knows: `task`, and `backbone`, the name under which that is to be had.

    Returns:
        The note, as `program.json` holds it.

    Raises:
        FileExistsError: If the output folder holds something else.
        ValueError: If the adapter has LoRA inside the backbone, the model is an encoder-decoder, or the program that comes out does not
            answer as the model does.
    """
    path = check_output(output, overwrite, "export")
    layer = exportable(model.eval())
    batches = _batches(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # of torch, which copies its own trees
        program = export_program(model, batches[0])
        with written_aside(path, overwrite, "export") as aside:
            torch.export.save(program.exported, aside / PROGRAM)
            call = torch.export.load(aside / PROGRAM).module()
            difference = largest_difference(program, call, model, batches)
            note = _note(model, layer, program, told or {})
            note["bytes"] = (aside / PROGRAM).stat().st_size
            sizes = [list(batch["input_ids"].shape) for batch in batches]
            note["compared"] = {"sizes": sizes, "largest_difference": difference}
            (aside / EXPORT).write_text(json_text(note), encoding="utf-8")
            (aside / CARD).write_text(program_card(note), encoding="utf-8")
    return note


def _batches(model: Any) -> list[dict[str, Tensor]]:
    """Random texts: a row of the first batch is padded on the right, one of the second on the left."""
    config, words = text_config(model), input_embeddings(model)
    padding = getattr(config, "pad_token_id", None)
    known = words.num_embeddings if hasattr(words, "num_embeddings") else config.vocab_size
    positions, generator = fewest_positions(model), torch.Generator().manual_seed(0)
    batches = []
    for number, (rows, wanted) in enumerate(SIZES):
        length = wanted if positions is None else min(wanted, positions)
        ids = torch.randint(known - 1, (rows, length), generator=generator)
        if padding is not None:
            ids += ids >= padding
        mask = torch.ones_like(ids)
        if rows > 1 and padding is not None:
            cut = slice(length - 2, None) if number == 0 else slice(None, 2)
            mask[-1, cut], ids[-1, cut] = 0, padding
        batches.append({"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)})
    return batches


def _note(model: Any, layer: FusionLayer, program: Program, told: Mapping[str, Any]) -> dict[str, Any]:
    """All that a caller must know, as JSON holds it."""
    config, running = model.active_peft_config, layer.running
    inputs: dict[str, Any] = {
        "states": {"shape": [len(program.layers), "batch", "positions", program.width], "dtype": _named(program.dtype)}
    }
    for name in program.beside:
        inputs[name] = {"shape": ["batch", "positions"], "dtype": "int64", "why": _why(model, name)}
    if "input_ids" in inputs:
        inputs["input_ids"]["padding"] = getattr(text_config(model), "pad_token_id", None)
    labels = [str(label) for label in class_of(model).labels]
    digests = weights_digests(tensors_in_file(model, model.active_adapter)) or {}
    return {
        "task": getattr(config.task_type, "value", config.task_type),
        **told,
        "layers": list(program.layers),
        "hidden_states": _in_transformers(program, running.num_layers, config.fusion_num_layers),
        "inputs": inputs,
        "scores": {
            "shape": list(program.shape),
            "dtype": _named(program.answer),
            "labels": labels if len(labels) > 1 else None,  # one is a number's
            "of_word_pieces": not labels and output_embeddings(model) is not None,
        },
        "backbone": {
            "name": told.get("backbone") or config.base_model_name_or_path,
            "revision": config.revision,
            "gguf": config.fusion_gguf,
            "type": config.fusion_model_type,
            "hidden_size": program.width,
            "blocks": config.fusion_num_layers,
            "blocks_name": running.path,
            "causal": running.causal,
            "fingerprint": short_fingerprint(config.fusion_fingerprint),
        },
        "adapter": {
            "method": config.fusion,
            "options": {
                **config.options,
                "norm": config.fusion_norm,
                "pool": config.fusion_pool,
                "depth": config.fusion_depth,
            },
            "digest": digests.get("float32"),
        },
        "versions": versions(),
    }


def _in_transformers(program: Program, depth: int, blocks: int) -> dict[str, int | None] | None:
    """For each layer its place in `hidden_states` of the whole backbone, None where it is not there; None if there are none at all."""
    if program.listed is None:
        return None
    # below other blocks a state is listed as it is; those blocks may not be in this model, whose last state is then normed
    there = {*program.listed, *((depth,) if depth < blocks else ())}
    return {str(layer): layer if layer in there else None for layer in program.layers}


def _why(model: nn.Module, name: str) -> str:
    """What an input beside the states is for."""
    if name == "attention_mask":
        return "1 at tokens, 0 at padding"
    if reads_last_token(model):
        return "the head reads the last token that is not padding, which it knows by its id"
    return "the head reads them"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
