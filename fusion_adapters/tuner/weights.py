"""The tensors in an adapter's file, and whether they are those of the adapter in the model."""

from __future__ import annotations

import contextlib
import pickle

from peft.utils import AuxiliaryTrainingWrapper, load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn

from .config import FusionConfig
from .digest import MODEL_PREFIX, weights_differ


def read_weights(config: FusionConfig) -> dict[str, Tensor] | None:
    """The tensors of the file that the config was loaded with, on the CPU; None for a new one, and one saved without an adapter."""
    if config.source is None or not config.bound:
        return None
    folder, where = config.source
    try:
        return load_peft_weights(folder, device="cpu", **where)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, KeyError) as error:  # the others of a .bin file
        name = "adapter_model.safetensors" if isinstance(error, SafetensorError) else "adapter_model.bin"
        raise ValueError(
            f"The weights of the adapter in {folder!r} cannot be read: {name} is damaged or cut short "
            f"({' '.join(str(error).split())}). Copy or download the file again, or train the adapter anew."
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


def check_digest(config: FusionConfig, weights: dict[str, Tensor], model: nn.Module, expected: dict[str, Tensor]) -> None:
    """Raises ValueError if a file's tensors are not those that its config was saved with.

    Args:
        config: The config that was loaded.
        weights: The tensors of the file.
        model: The model, in which the adapter has its place by now.
        expected: The adapter's tensors there, named as in the file but for its prefix.
    """
    own = without_embeddings(model, {k.removeprefix(MODEL_PREFIX): v for k, v in weights.items()}, expected)
    if not weights_differ(config, own):
        return
    compare_tensors(expected, own)  # says which, where names or shapes are others
    folder = config.source[0] if config.source else ""
    raise ValueError(
        f"The weights of the adapter in {folder!r} are not those that it was saved with: their digest is not the one in "
        "adapter_config.json. The file is damaged, or comes from another save than the config (a save that was interrupted leaves such "
        "a pair). Copy both again, or save the adapter anew. If you changed the weights on purpose, remove fusion_digest from "
        "adapter_config.json."
    )


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
