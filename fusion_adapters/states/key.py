"""What a cache belongs to: backbone, quantisation, tokenizer, versions; and the signature of a row."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..backbone.base_tensors import base_tensors
from ..backbone.blocks import Backbone
from ..backbone.fingerprint import weights_signature
from ..backbone.settings import settings
from .source import Source, source_of

LABELS = ("labels", "label", "label_ids")  # of a row: the states do not depend on them
NEUTRAL = {"token_type_ids": 0, "attention_mask": 1}  # what a backbone assumes of a text without them


def check_rows(rows: Any) -> None:
    """Raises TypeError for rows without number: those of a stream (IterableDataset, a generator)."""
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise TypeError(
            f"The rows are a {type(rows).__name__}, which has no length and cannot be read by number; a cache sorts its rows by length "
            "and finds them again. Give a list or a datasets.Dataset: list(rows), or Dataset.from_list(list(rows)) (load_dataset "
            "without streaming=True)."
        )


def cache_key(
    model: nn.Module | Source, tokenizer: PreTrainedTokenizerBase | None = None, max_length: int | None = None
) -> dict[str, Any]:
    """What the states of a model depend on, besides the rows: a dictionary of named parts.

    Args:
        model: A transformers model, attached or not, or a `Source`.
        tokenizer: The tokenizer of the rows, if there is one.
        max_length: The length to which texts were cut.
    """
    source = source_of(model)
    backbone = source.backbone
    config: Any = getattr(backbone.base, "config", None)
    quantised = getattr(config, "quantization_config", None)
    key: dict[str, Any] = {
        "backbone": f"{backbone.model_type}, {backbone.num_layers} blocks of width {backbone.hidden_size}",
        "weights": weights_signature(backbone, source.idle, source.scalings),
        "adapters": source.adapters,
        "quantization": _quantization_name(quantised),
        "dtype": str(_dtype_of(backbone)).removeprefix("torch."),
        "tokenizer": None if tokenizer is None else tokenizer_signature(tokenizer),
        "max_length": max_length,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    key.update({f"configuration, {name}": value for name, value in settings(backbone).items()})
    if quantised is not None:
        key["quantization library"] = _library_version(key["quantization"])
    return key


def key_differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The parts that differ, in words; a part that one side does not know (None) is left out."""
    names = [n for n in {**stored, **wanted} if None not in (stored.get(n), wanted.get(n))]
    return [f"{n}: {stored[n]} in the cache, {wanted[n]} now" for n in names if stored[n] != wanted[n]]


def made_by_other_versions(stored: Mapping[str, Any]) -> bool:
    """Whether the states of a key were computed with other versions of the libraries than those that are here."""
    now = {"torch": torch.__version__, "transformers": version("transformers")}
    if "quantization library" in stored:
        now["quantization library"] = _library_version(stored["quantization"])
    return any(stored.get(name) != here for name, here in now.items())


def input_names(backbone: Backbone, columns: Iterable[str]) -> list[str]:
    """Those of the columns that the backbone is called with; labels and columns that it does not know are none."""
    known = set(known_inputs(backbone))
    return sorted(known.intersection(columns))


def known_inputs(backbone: Backbone) -> list[str]:
    """The names of all inputs that the backbone takes."""
    return sorted(set(inspect.signature(backbone.base.forward).parameters) - set(LABELS))


def uncached_inputs(row: Mapping[str, Any], known: Sequence[str], cached: Sequence[str]) -> list[str]:
    """Inputs of a row that states computed without them do not know, and that say more than a backbone assumes without."""
    new = [name for name in known if name not in cached and row.get(name) is not None]
    return [n for n in new if n not in NEUTRAL or bool((torch.as_tensor(row[n]) != NEUTRAL[n]).any())]


def completed(row: Mapping[str, Any], names: Iterable[str]) -> Mapping[str, Any]:
    """A row of text with those of the named inputs that it lacks and a backbone assumes without: its states are the same.

    Args:
        row: The row; without `input_ids` it is returned as it is.
        names: Model inputs, those of the rows of a cache.
    """
    if row.get("input_ids") is None:
        return row
    lacking = [name for name in names if name in NEUTRAL and row.get(name) is None]
    return {**row, **{name: [NEUTRAL[name]] * len(row["input_ids"]) for name in lacking}} if lacking else row


def row_signature(row: Mapping[str, Any], names: Sequence[str]) -> bytes:
    """Sixteen bytes that stand for the model inputs of a row.

    Args:
        row: The row.
        names: Which of its entries count; one that is not there or None is left out.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        if row.get(name) is None:
            continue
        value = torch.as_tensor(row[name])
        value = value.float() if value.is_floating_point() else value.long()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.contiguous().cpu().numpy().tobytes())
    return digest.digest()


def _dtype_of(backbone: Backbone) -> torch.dtype:
    return next((t.tensor.dtype for t in base_tensors(backbone) if t.before and t.readable), torch.float32)


def tokenizer_signature(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that turns a text into pieces, padding and truncation left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        text = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    else:
        content = json.loads(backend.to_str())
        # padding and truncation belong to the last call, not to the tokenizer
        text = json.dumps({k: v for k, v in content.items() if k not in ("padding", "truncation")}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _quantization_name(config: Any) -> str:
    if config is None:
        return "none"
    values = config if isinstance(config, dict) else config.to_dict()
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
    signature = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return f"{method} {signature}"


def _library_version(name: str) -> str:
    package = name.split(maxsplit=1)[0]
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package
