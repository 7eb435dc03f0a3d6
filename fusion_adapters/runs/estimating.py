"""What a recipe needs, from its configuration alone: memory of a training step, disk of a cache, bytes of the adapter."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..backbone.families import HEAD_NAMES, output_embeddings
from ..backbone.truncate import cut_model
from ..fusions import Fusion
from ..states.formats import DTYPES, state_bytes
from ..tasks.splits import Splits, load_splits
from ..tuner import FusionConfig, FusionLayer, fusion_layers
from ..tuner.costs import BYTES_PER_PARAMETER
from ..tuner.counts import count_trainable, skeleton
from .attaching import adapter_config
from .dry import Footprint, footprint
from .environment import quiet
from .pretrained import locate
from .recipe import Recipe, chooses_depth
from .tokenizers import load_tokenizer
from .trainers import TRAINING_DEFAULTS

ASSUMED_LABELS = 2  # where the data are not at hand
SAMPLE = 256  # texts whose pieces are counted
# Bytes a weight of a linear map takes beyond its bits: a scale a row in float32 (8 bits), or NF4's scales, themselves in 8 bits.
BITS = {8: 1.0, 4: 0.5 + 1 / 64 + 4 / (64 * 256)}


def estimate_recipe(recipe: Recipe, length: int | None = None) -> dict[str, Any]:
    """Estimates what the run of a recipe needs. No weights are loaded, nothing is computed.

    A training step runs on tensors without values (torch's FakeTensorMode), so that the operations are those of the real step, of
    any backbone, fusion and LoRA; each counts from when it is there until nothing holds it any more. Allocators add a few percent.

    Args:
        recipe: The recipe. Its data are read for their labels and lengths if they are at hand.
        length: Tokens of a row; None means `data.max_length`, with which the longest batch is as large as it can be.

    Returns:
        `backbone` (parameters, and bytes of its weights by format), `adapter` (parameters by part, bytes of its file), `batch`,
        `steps` (by kind of training the bytes of a `Footprint`), `cache` (bytes a token, or a text, by format, and how many there
        are) and `assumed` (what was not known).

    Raises:
        OSError: If the backbone's configuration is not to be had.
        ValueError: If the adapter does not fit it.
    """
    if chooses_depth(recipe.adapter):
        raise ValueError(
            "adapter.fusion_depth: auto is chosen on development data, when the recipe is trained. For an estimate give a number of "
            "blocks (--set adapter.fusion_depth=12), or 1.0 of them by leaving it out."
        )
    assumed: list[str] = []
    splits = _splits(recipe, assumed)
    labels = splits.labels if splits is not None else [str(i) for i in range(ASSUMED_LABELS)]
    training = {**TRAINING_DEFAULTS, **recipe.training}
    size, tokens = int(training["per_device_train_batch_size"]), length or recipe.data.max_length
    config = adapter_config(recipe)
    with quiet():
        model = _bare(recipe, config, labels)
        dense, packed = _weights(model)
        model = _attached(model, config)
        layer, fusion = _fused(model)
        counts = count_trainable(model)
        try:
            found = _steps(model, config, recipe, training, size, tokens)
        except RuntimeError as error:
            raise ValueError(
                f"A step of {recipe.backbone.model!r} cannot be run without values ({_first_sentence(error)}): some operation of its asks "
                "for them, or for another dtype. Of a mixture of experts try backbone.dtype=bfloat16; else measure a step of a small batch."
            ) from error
    if recipe.backbone.bits is not None:  # the step ran with weights of 16 or 32 bits in their place
        saved = round(packed * (_dtype(recipe).itemsize - BITS[recipe.backbone.bits]))
        found = {name: replace(each, weights=each.weights - saved, peak=each.peak - saved) for name, each in found.items()}
    read = {*fusion.layers, layer.backbone.num_layers}
    return {
        "backbone": {"model": recipe.backbone.model, "parameters": dense, "bytes": _by_format(dense, packed)},
        "adapter": {**counts, "bytes": BYTES_PER_PARAMETER * counts["total"]},
        "batch": {"rows": size, "tokens": tokens},
        "steps": {name: asdict(each) for name, each in found.items()},
        "cache": _cache(recipe, config, splits, len(read), layer.backbone.hidden_size, assumed),
        "assumed": assumed,
    }


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0].removesuffix(".")


def _dtype(recipe: Recipe) -> torch.dtype:
    return getattr(torch, recipe.backbone.dtype)  # type: ignore[no-any-return]


def _splits(recipe: Recipe, assumed: list[str]) -> Splits | None:
    try:
        return load_splits(recipe.data, recipe.task, recipe.seed)
    except (OSError, ValueError) as error:
        assumed.append(
            f"{ASSUMED_LABELS} labels, and a million tokens: the data cannot be read here ({_first_sentence(error)})"
        )
        return None


def _bare(recipe: Recipe, config: FusionConfig, labels: list[str]) -> nn.Module:
    """The backbone with its head on the meta device, cut as the adapter has it."""
    name, options = locate(recipe.backbone)
    model = skeleton(name, recipe.task.auto_model, **options, **recipe.task.head_options(labels))
    if config.fusion_depth is not None and output_embeddings(model) is None:
        cut_model(model, config.fusion_depth)
    model = model.to(_dtype(recipe))
    model.tie_weights()  # type: ignore[operator]
    return model


def _weights(model: nn.Module) -> tuple[int, int]:
    """All parameters of a model, and those that bitsandbytes would pack: of its linear maps, without heads."""
    head = output_embeddings(model)
    packed = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not set(name.split(".")) & set(HEAD_NAMES)
    )
    return sum(p.numel() for p in model.parameters()), packed


def _by_format(parameters: int, packed: int) -> dict[str, int]:
    """Bytes of a backbone's weights; in 8 and 4 bits what is not packed has 16."""
    wide = {"float32": 4 * parameters, "bfloat16": 2 * parameters}
    return {**wide, **{f"{bits} bits": round(packed * size + 2 * (parameters - packed)) for bits, size in BITS.items()}}


def _attached(model: nn.Module, config: FusionConfig) -> Any:
    config = copy.deepcopy(config)
    config.init_lora_weights = True  # others compute with weights that are not there
    with init_empty_weights(), torch.device("meta"):
        return get_peft_model(model, config, low_cpu_mem_usage=True)  # type: ignore[arg-type]


def _fused(model: Any) -> tuple[FusionLayer, Fusion]:
    """Where the fusion hangs, and the fusion; of an encoder-decoder those of the last stack."""
    layer = fusion_layers(model)[-1]
    assert layer.active_fusion is not None
    return layer, layer.active_fusion


def _steps(
    model: Any, config: FusionConfig, recipe: Recipe, training: dict[str, Any], size: int, tokens: int
) -> dict[str, Footprint]:
    """The step of each kind of training that the adapter allows: live, with checkpointing, from a cache."""
    autocast = torch.bfloat16 if training.get("bf16") else torch.float16 if training.get("fp16") else None
    found = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.get_base_model().tie_weights()
        batch = _batch(model, recipe, size, tokens)
        found["live"] = footprint(model, batch, autocast)
        if not config.has_lora and _fused(model)[0].backbone.stack is None:
            found["cached"] = footprint(model, {**batch, "layer_states": _states(model, size, tokens)}, autocast)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        found["live, gradient checkpointing"] = footprint(model, batch, autocast)
    return found


def _batch(model: Any, recipe: Recipe, size: int, tokens: int) -> dict[str, Any]:
    """The longest batch: rows of one length, without padding."""
    ids = torch.zeros(size, tokens, dtype=torch.long)
    kinds = {True: torch.zeros(size, tokens, dtype=torch.long), False: torch.zeros(size, dtype=torch.long)}
    labels = kinds[recipe.task.of_words or recipe.task.vocabulary_head]
    if model.config.problem_type == "regression":
        labels = labels.float()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _states(model: Any, size: int, tokens: int) -> dict[str, Any]:
    """Layer states as a cache's collator gives them: float32 on a machine without GPU, else in 16 bits, as stored."""
    layer, fusion = _fused(model)
    depth = layer.backbone.num_layers
    layers = sorted({*fusion.layers, depth})
    dtype = torch.float16 if torch.cuda.is_available() else torch.float32
    places = torch.arange(size * tokens)
    if fusion.pools:
        places = places[tokens - 1 :: tokens]
    states = torch.empty(len(layers), len(places), fusion.hidden_size, dtype=dtype)
    kept = "means" if fusion.pools else "all"
    return {"states": states, "positions": places, "layers": tuple(layers), "kept": kept}


def _cache(
    recipe: Recipe, config: FusionConfig, splits: Splits | None, layers: int, hidden_size: int, assumed: list[str]
) -> dict[str, Any]:
    if config.has_lora:
        return {"refused": "LoRA trains inside the backbone, whose states change at every step: nothing can be cached."}
    unit = "text" if config.fusion_pool is not None else "token"
    found: dict[str, Any] = {"layers": layers, "unit": unit}
    found["bytes"] = {dtype: layers * state_bytes(dtype, hidden_size) for dtype in DTYPES}
    found["count"] = None if splits is None else _count(recipe, splits, unit, assumed)
    return found


def _count(recipe: Recipe, splits: Splits, unit: str, assumed: list[str]) -> int | None:
    """How many states of a layer the recipe's data have: tokens, counted in a sample of each part; or texts."""
    parts = [part for part in (splits.train, splits.dev, splits.test) if part]
    if unit == "text":
        return sum(map(len, parts))
    try:
        tokenizer = load_tokenizer(recipe.backbone, recipe.task)
    except (OSError, ValueError, ImportError) as error:
        assumed.append(f"a million tokens: the tokenizer cannot be loaded here ({_first_sentence(error)})")
        return None
    total, data = 0.0, recipe.data
    if data.label_at == "auto":  # whichever piece has the label, there are as many
        data = data.model_copy(update={"label_at": "first"})
    for part in parts:
        sample = part[:: max(1, len(part) // SAMPLE)]
        rows = recipe.task.encoded(sample, tokenizer, splits.labels, data).rows
        total += len(part) / len(sample) * sum(len(row["input_ids"]) for row in rows)
    return round(total)
