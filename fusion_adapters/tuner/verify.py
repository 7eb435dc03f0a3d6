"""A saved adapter looked through, with whatever of its backbone is at hand: weights, a configuration, or nothing."""

from __future__ import annotations

import copy
import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from peft import get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor, nn

from ..backbone.blocks import LAYER_NAME
from ..backbone.fingerprint import fingerprints, join_fingerprints
from ..fusions import build_fusion
from .binding import bind
from .card import auto_class
from .config import FusionConfig
from .configfile import wrong_types
from .digest import MODEL_PREFIX, holds_digest
from .labels import check_labels
from .lower import lower_backbones
from .weights import check_digest, check_finite, tensor_differences, tensors_in_file, without_embeddings

WEIGHTS = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
BESIDE = ("embed_tokens", "lm_head")  # what peft may save beside an adapter (save_embedding_layers), by their usual names
UNSEEN = 7919  # a number of labels that no width of a model equals
# What loads the model of a task; without a task the config names the model's class.
AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


def config_problems(folder: Path) -> list[str]:
    """The fields of a folder's adapter_config.json with values of a wrong type; none where the file cannot be read at all."""
    try:
        values = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [*wrong_types(values, folder / CONFIG_NAME)] if isinstance(values, dict) else []


def weights_file(folder: Path) -> Path | None:
    """The file with an adapter's tensors; None if there is none."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def model_class(config: FusionConfig) -> Any:
    """The class of transformers that loads the model of an adapter with its head; None if that is somebody's own."""
    task = getattr(config.task_type, "value", config.task_type)
    name = AUTO_CLASSES.get(task or "")
    if name is None and config.auto_mapping:
        name = auto_class(str(config.auto_mapping.get("base_model_class")), config.fusion_model_type)
    return None if name is None else getattr(transformers, name)


def expected_tensors(config: FusionConfig, skeleton: nn.Module) -> dict[str, Tensor]:
    """The tensors that an adapter has on a model, without values, named as in its file but for peft's prefix.

    Args:
        config: The saved config; it is not changed.
        skeleton: A model without values (meta device), to which the adapter is attached.

    Raises:
        ValueError: If the adapter was made for a backbone of another type, width or depth, or does not fit the head.
    """
    config = copy.deepcopy(config)
    config.source, config.init_lora_weights = None, True  # others compute with weights that are not there
    skeleton.__dict__["name_or_path"] = config.base_model_name_or_path  # peft would take the config's name from here
    with init_empty_weights(), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attached = get_peft_model(skeleton, config, low_cpu_mem_usage=True)  # type: ignore[arg-type]
    return tensors_in_file(attached, "default")


def labels_of(
    config: FusionConfig, weights: Mapping[str, Tensor], skeleton: Callable[[dict[str, Any]], nn.Module]
) -> dict[str, Any]:
    """What a model is told of its outputs so that an adapter's head fits: their names, or, where nobody named them, their number.

    Args:
        config: The saved config.
        weights: The tensors of the file, the number of rows of whose head is taken.
        skeleton: Builds the model without values, of such options.
    """
    if config.fusion_labels is not None:
        return _named(config.fusion_labels)
    given = _plain(weights)
    for name, tensor in expected_tensors(config, skeleton(_named(range(UNSEEN)))).items():
        if tensor.dim() and tensor.shape[0] == UNSEEN and name in given:
            return _named(f"LABEL_{i}" for i in range(given[name].shape[0]))  # as transformers has them
    return {}


def _named(labels: Iterable[Any]) -> dict[str, Any]:
    numbered = dict(enumerate(labels))
    return {"id2label": numbered, "label2id": {label: i for i, label in numbered.items()}}


def own_tensors(weights: Mapping[str, Tensor], model: nn.Module | None, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file without peft's prefix, and without embeddings that peft saved beside the adapter.

    Args:
        weights: The tensors of the file.
        model: The model, with or without values; None if it is not at hand, where embeddings are known by their names.
        expected: The adapter's tensors in that model.
    """
    given = _plain(weights)
    if model is not None:
        return without_embeddings(model, given, dict(expected))
    return {name: t for name, t in given.items() if not (set(name.split(".")) & set(BESIDE) and "lora_" not in name)}


def check_values(config: FusionConfig, folder: Path, own: dict[str, Tensor]) -> bool:
    """Compares tensors with the digest that was saved with them, and looks for NaN and infinity where there is none.

    Returns:
        Whether there is a digest.

    Raises:
        ValueError: If they are others, or not finite.
    """
    if holds_digest(config):
        check_digest(config, str(folder), own)
    else:
        check_finite(str(folder), own)
    return holds_digest(config)


def fusion_differences(config: FusionConfig, own: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the tensors of the fusion alone, by the sizes that its config holds; for want of the backbone's configuration.

    Args:
        config: The saved config.
        own: The tensors of the file, see `own_tensors`.
    """
    sizes: tuple[Any, ...] = (config.fusion_hidden_size, config.fusion_num_layers)
    widths, depths = (size if isinstance(size, list) else [size] for size in sizes)
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in own.items():
        before, here, after = name.partition(f"{LAYER_NAME}.")
        if here:
            found[before][after] = tensor
    stacks = [found[before] for before in sorted(found, key=lambda name: "decoder" in name)] or [{}]
    if len(stacks) != len(widths):
        return [f"the file holds {len(stacks)} fusions, and its config speaks of {len(widths)}"]
    told = []
    for width, blocks, given in zip(widths, depths, stacks, strict=True):
        depth = int(config.fusion_depth or blocks)
        with torch.device("meta"):
            fusion = build_fusion(config.fusion, width, depth, config.fusion_layers, **config.options)
        told += tensor_differences(dict(fusion.state_dict()), given)
    return told


def check_backbone(config: FusionConfig, model: nn.Module) -> bool:
    """Compares a saved config with a model that has its weights: type, width, depth, fingerprint, and the names of its outputs.

    Returns:
        Whether the config holds a fingerprint, and the model weights to compare with it.

    Raises:
        ValueError: If the adapter was made for another backbone.
    """
    backbones = lower_backbones(config, model)
    marks = [fingerprints(backbone, config.fusion_fingerprint) for backbone in backbones]
    bind(copy.deepcopy(config), backbones, join_fingerprints(marks))
    check_labels(config, model)
    return config.fusion_fingerprint is not None and all(marks)


def _plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(MODEL_PREFIX): tensor for name, tensor in weights.items()}
