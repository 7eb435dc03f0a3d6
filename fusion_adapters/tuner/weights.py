"""The tensors in an adapter's file, and whether they are those of the adapter in the model."""

from __future__ import annotations

import contextlib

from peft.utils import AuxiliaryTrainingWrapper, load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn

from .config import FusionConfig

MODEL_PREFIX = "base_model.model."


def read_weights(config: FusionConfig) -> dict[str, Tensor] | None:
    """The tensors of the file that the config was loaded with, on the CPU; None for a new one, and one saved without an adapter."""
    if config.source is None or not config.bound:
        return None
    folder, where = config.source
    try:
        return load_peft_weights(folder, device="cpu", **where)
    except SafetensorError as error:
        raise ValueError(
            f"The weights of the adapter in {folder!r} cannot be read: adapter_model.safetensors is damaged or cut short "
            f"({error}). Copy or download the file again, or train the adapter anew."
        ) from error


def wrapped_keys(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Key in the file to key in the model, for what peft keeps in wrappers: heads and fusions."""
    return {
        f"{name}.{file_key}": f"{name}.{model_key}"
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for file_key, model_key in module.adapter_state_dict_load_map(adapter_name).items()
    }


def check_wrapped_tensors(model: nn.Module, adapter_name: str, weights: dict[str, Tensor]) -> None:
    """Raises ValueError if the file lacks tensors of a head or a fusion, which peft would look up with a bare KeyError.

    All tensors are compared when they are loaded, after peft has renamed those of older architectures.
    """
    state = model.state_dict()
    expected = {file_key: state[model_key] for file_key, model_key in wrapped_keys(model, adapter_name).items()}
    given = {k.removeprefix(MODEL_PREFIX): v for k, v in weights.items()}
    compare_tensors(expected, {k: v for k, v in given.items() if k in expected})


def without_embeddings(model: nn.Module, given: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file without those that peft adds of embeddings (`save_embedding_layers`) beside what was trained."""
    layers = []
    for getter in (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings")):
        with contextlib.suppress(NotImplementedError, TypeError):  # sound has none, a class of one's own no such method
            layers.append(getter())  # type: ignore[misc]
    names = tuple(f"{n}." for n, m in model.named_modules() if any(m is layer for layer in layers))
    return {k: v for k, v in given.items() if k in expected or not k.startswith(names or ("\0",))}


def compare_tensors(expected: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """Raises ValueError, with the names, if tensors are missing, surplus, or of another shape."""
    missing = sorted(expected.keys() - given.keys())
    surplus = sorted(given.keys() - expected.keys())
    shapes = [
        f"{k} has {list(given[k].shape)} in the file, {list(expected[k].shape)} in the model"
        for k in sorted(expected.keys() & given.keys())
        if given[k].shape != expected[k].shape
    ]
    if not (missing or surplus or shapes):
        return
    found = [
        *([f"{len(missing)} of {len(expected)} tensors are missing ({_some(missing)})"] if missing else []),
        *([f"{len(surplus)} have no place in the model ({_some(surplus)})"] if surplus else []),
        *([f"{len(shapes)} have another shape ({_some(shapes)})"] if shapes else []),
    ]
    raise ValueError(
        f"The adapter's file does not fit its config and this model: {'; '.join(found)}. Nothing was loaded. Check that "
        "adapter_config.json and adapter_model.safetensors come from the same save, and that the model has the head "
        "(class and number of labels) that the adapter was trained with."
        + (" ignore_mismatched_sizes does not help here." if shapes else "")
    )


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")
